"""How model families write tool calls: one file a family, chosen by the model's chat template."""

from __future__ import annotations

from sagellm_gateway.tool_formats.base import ToolFormat, ToolParser
from sagellm_gateway.tool_formats.deepseek import DeepSeekFormat
from sagellm_gateway.tool_formats.hermes import HermesFormat
from sagellm_gateway.tool_formats.llama3 import Llama3Format
from sagellm_gateway.tool_formats.mistral import MistralFormat
from sagellm_gateway.tool_formats.plain import PlainFormat
from sagellm_gateway.tool_formats.qwen3_coder import Qwen3CoderFormat

__all__ = ["FORMATS", "ToolFormat", "ToolParser", "for_template"]

# The first whose `matches` says so; the last claims what no other does.
FORMATS: tuple[type[ToolFormat], ...] = (
    Qwen3CoderFormat,
    HermesFormat,
    MistralFormat,
    DeepSeekFormat,
    Llama3Format,
    PlainFormat,
)


def for_template(chat_template: str | None) -> ToolFormat:
    """The format of the family that a chat template belongs to."""
    template = chat_template or ""
    return next(form for form in FORMATS if form.matches(template)).for_template(template)
