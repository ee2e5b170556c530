"""Anthropic's Messages API: its types, their translation into chat requests, and its events."""
