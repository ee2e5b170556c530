"""How models mark their thoughts, chosen by the model's chat template."""

from __future__ import annotations

from sagellm_gateway.reasoning.base import ReasoningFormat, ReasoningParser

__all__ = ["FORMATS", "ReasoningFormat", "ReasoningParser", "for_template"]

# A new notation is one line here, or one class with the same methods where marks are not enough.
FORMATS: tuple[ReasoningFormat, ...] = (
    ReasoningFormat("think", "<think>", "</think>"),  # DeepSeek R1, Qwen 3, SmolLM3 and others
    ReasoningFormat("mistral", "[THINK]", "[/THINK]", marks_are_special=True),  # Magistral
)


def for_template(chat_template: str | None) -> ReasoningFormat | None:
    """The notation that a chat template uses; None for models that don't think aloud."""
    text = chat_template or ""
    return next((form for form in FORMATS if form.closing in text), None)
