"""Ollama's API: its types, their translation into chat requests, its lines, and how it tells of models."""
