"""OpenAI's Responses API: its types, their translation into chat requests, its events, and the store of responses."""
