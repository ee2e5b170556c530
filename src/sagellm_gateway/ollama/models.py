"""How Ollama's API tells of what is served.

Names are `name:tag`, where the tag `latest` may be left out. The digest is that of the description, not of the weights:
it changes when something else is served under the name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from sagellm_gateway.body import LATEST
from sagellm_gateway.chat_plan import formats_of
from sagellm_protocol import NotFoundError
from sagellm_protocol.model_description import ModelDescription
from sagellm_protocol.openai import ModelCard

_NEVER = "2300-01-01T00:00:00Z"  # what is served stays
_ARCHITECTURE_ENDS = ("ForCausalLM", "LMHeadModel", "Model")
_UNKNOWN: dict[str, Any] = {"size": 0, "digest": "", "details": {}}


def tagged(name: str) -> str:
    """A served model's name as this API shows it."""
    return name if ":" in name else name + LATEST


def find_model(cards: Mapping[str, ModelCard], name: str) -> ModelCard:
    """The one of the served models `cards` that a call names; `NotFoundError` that says how to serve it.

    Nothing is ever downloaded because of a call.
    """
    if name == "default" and cards:  # the body named none, and the gateway has no favourite
        return next(iter(cards.values()))
    for candidate in (name, name.removesuffix(LATEST)):
        if candidate in cards:
            return cards[candidate]
    raise NotFoundError(
        f"model {name!r} not found; served: {', '.join(map(tagged, cards)) or 'none'}; "
        f"serve it with `sage-llm serve --model {name.removesuffix(LATEST)}`",
        field="model",
    )


def tag_entry(card: ModelCard, description: ModelDescription | None) -> dict[str, Any]:
    """A model in the list of what can be asked for; one that isn't loaded yet has no `description`."""
    figures = _UNKNOWN if description is None else _figures(description)
    return {**_names(card), "modified_at": _date(card.created), **figures}


def running_entry(card: ModelCard, description: ModelDescription, *, is_on_cpu: bool) -> dict[str, Any]:
    """A model in the list of what is in memory."""
    return {
        **_names(card),
        **_figures(description),
        "expires_at": _NEVER,
        "size_vram": 0 if is_on_cpu else description.weight_bytes,
        "context_length": description.max_model_len,
    }


def show_body(card: ModelCard, description: ModelDescription) -> dict[str, Any]:
    """All that is known of a model; its template is in jinja2."""
    family, template = _family(description), description.chat_template or ""
    return {
        "modelfile": f"FROM {card.id}\n",
        "parameters": "",
        "template": template,
        "details": _details(description),
        "model_info": {
            "general.architecture": family,
            "general.basename": card.id,
            "general.parameter_count": description.num_parameters,
            f"{family}.context_length": description.max_model_len,
            f"{family}.embedding_length": description.hidden_size,
            f"{family}.vocab_size": description.vocab_size,
        },
        "capabilities": _capabilities(description, template),
        "modified_at": _date(card.created),
    }


def can_think(chat_template: str | None) -> bool:
    """Whether a model with this template thinks before it answers."""
    formats = formats_of(chat_template)
    return formats.reasoning is not None or formats.has_switch or formats.has_effort


def _names(card: ModelCard) -> dict[str, Any]:
    return {"name": tagged(card.id), "model": tagged(card.id)}


def _figures(description: ModelDescription) -> dict[str, Any]:
    digest = hashlib.sha256(description.model_dump_json().encode()).hexdigest()
    return {"size": description.weight_bytes, "digest": digest, "details": _details(description)}


def _details(description: ModelDescription) -> dict[str, Any]:
    family = _family(description)
    is_quantized = description.quantization not in ("", "none")
    return {
        "parent_model": "",
        "format": "",
        "family": family,
        "families": [family] if family else [],
        "parameter_size": _short(description.num_parameters),
        "quantization_level": (description.quantization if is_quantized else description.dtype).upper(),
    }


def _family(description: ModelDescription) -> str:
    name = description.architecture
    for ending in _ARCHITECTURE_ENDS:
        name = name.removesuffix(ending)
    return name.lower()


def _capabilities(description: ModelDescription, template: str) -> list[str]:
    if description.is_embedding:
        return ["embedding"]
    found = {"tools": "tools" in template, "thinking": can_think(template)}
    return ["completion", *(name for name, is_there in found.items() if is_there)]


def _short(number: int) -> str:
    """A number of parameters as people say it: `494.0M`, `1.2B`."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)


def _date(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
