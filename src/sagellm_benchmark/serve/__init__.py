"""`sage-llm bench serve`: load for any server with OpenAI's API, and what its clients saw.

A run in four steps, one module each: `prompts` (what is asked), `arrivals` (when), `drive` (asking), `report`
(figures).
"""

from __future__ import annotations
