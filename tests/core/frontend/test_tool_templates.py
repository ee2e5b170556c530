"""Tools, calls, results and thoughts reach the real templates as transformers would hand them over."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sagellm_core.chat_template import ChatTemplate
from sagellm_core.input_processor import _template_message
from sagellm_protocol import ChatMessage, InvalidArgumentError, Tool

TEMPLATES = [
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    "Qwen-Qwen2.5-7B-Instruct",
    "Qwen-Qwen3-0.6B",
    "deepseek-ai-DeepSeek-V3.1",
    "meta-llama-Llama-3.1-8B-Instruct",
    "minja_cases/Qwen-Qwen3-Coder-30B-A3B-Instruct",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "HuggingFaceTB-SmolLM3-3B",
    "openai-gpt-oss-120b",
]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Its name"},
                "days": {"type": "integer", "description": "How many"},
            },
            "required": ["city"],
        },
    },
}


def call(number: int, **arguments: Any) -> dict[str, Any]:
    """A call as a client sends it back: its arguments are a text."""
    function = {"name": "get_weather", "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": f"call0000{number}", "type": "function", "function": function}


ASK = {"role": "user", "content": "How is Zürich?"}
FIRST = {"role": "assistant", "content": "", "tool_calls": [call(1, city="Zürich", days=2)]}
BOTH = {"role": "assistant", "content": "", "tool_calls": [call(1, city="Zürich"), call(2, city="Bern")]}
SUNNY = {"role": "tool", "tool_call_id": "call00001", "content": '{"sky": "sunny"}'}
RAINY = {"role": "tool", "tool_call_id": "call00002", "content": "rain"}
THOUGHT = {**FIRST, "reasoning_content": "I must look it up."}
CONVERSATIONS = {
    "tools": [ASK],
    "call": [ASK, FIRST],
    "result": [ASK, FIRST, SUNNY],
    "two calls": [ASK, BOTH, SUNNY, RAINY],
    "thought": [ASK, THOUGHT, SUNNY],
    "answered": [ASK, THOUGHT, SUNNY, {"role": "assistant", "content": "Sunny.", "reasoning_content": "Easy."}, ASK],
}


def as_transformers_wants(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Arguments as objects, and thoughts under the name that gpt-oss reads, too."""
    copies: list[dict[str, Any]] = json.loads(json.dumps(messages))
    for message in copies:
        for made in message.get("tool_calls", ()):
            made["function"]["arguments"] = json.loads(made["function"]["arguments"])
        if "reasoning_content" in message:
            message["thinking"] = message["reasoning_content"]
    return copies


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": True}, {"enable_thinking": False}], ids=str)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_equals_transformers(shared: Path, name: str, conversation: str, variables: dict[str, Any]) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    source = (shared / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    messages = CONVERSATIONS[conversation]
    options = {"bos_token": "<bos>", "eos_token": "<eos>", "add_generation_prompt": True, **variables}
    protocol = [_template_message(ChatMessage.model_validate(message)) for message in messages]
    tools = [Tool.model_validate(TOOL).model_dump(mode="json", exclude_none=True)]
    refusal = None
    try:
        (expected,), _ = render_jinja_template(
            [as_transformers_wants(messages)], chat_template=source, tools=[TOOL], **options
        )
    except Exception as error:
        refusal = str(error).rstrip(".")
    if refusal is None:
        assert ChatTemplate(source).render(protocol, tools=tools, **options) == expected
    else:
        with pytest.raises(InvalidArgumentError, match=re.escape(refusal)):
            ChatTemplate(source).render(protocol, tools=tools, **options)


def test_what_qwen3_sees(shared: Path) -> None:
    source = (shared / "chat_templates" / "Qwen-Qwen3-0.6B.jinja").read_text(encoding="utf-8")
    protocol = [_template_message(ChatMessage.model_validate(message)) for message in (ASK, THOUGHT, SUNNY)]
    prompt = ChatTemplate(source).render(protocol, tools=[TOOL], enable_thinking=False)
    assert '"name": "get_weather", "description": "The weather of a city."' in prompt
    assert "<think>\nI must look it up.\n</think>\n\n" in prompt
    assert '{"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}' in prompt
    assert '<tool_response>\n{"sky": "sunny"}\n</tool_response>' in prompt
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
