"""Engines that hand the whole work to another library instead of running our own models."""
