"""Executors: how a step reaches the workers that compute it."""
