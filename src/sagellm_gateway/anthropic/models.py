"""How Anthropic's API tells of models."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from sagellm_protocol.openai import ModelCard


def model_info(card: ModelCard) -> dict[str, Any]:
    """One model; what it can read and write at most is its whole context."""
    created = datetime.fromtimestamp(card.created, timezone.utc).isoformat().replace("+00:00", "Z")
    return {
        "type": "model",
        "id": card.id,
        "display_name": card.id,
        "created_at": created,
        "lifecycle": "active",
        "max_input_tokens": card.max_model_len,
        "max_tokens": card.max_model_len,
    }


def model_list(cards: Sequence[ModelCard]) -> dict[str, Any]:
    """All models, on one page."""
    return {
        "data": [model_info(card) for card in cards],
        "has_more": False,
        "first_id": cards[0].id if cards else None,
        "last_id": cards[-1].id if cards else None,
    }
