"""What the real templates show a model as its own calls is what the parser of its family reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sagellm_core.chat_template import ChatTemplate
from sagellm_gateway import reasoning, tool_formats
from sagellm_gateway.pieces import Piece, TextPiece, collect
from sagellm_protocol import Tool

FAMILIES = {
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "hermes",
    "Qwen-Qwen2.5-7B-Instruct": "hermes",
    "Qwen-Qwen3-0.6B": "hermes",
    "deepseek-ai-DeepSeek-V3.1": "deepseek",
    "meta-llama-Llama-3.1-8B-Instruct": "llama3",
    "minja_cases/Qwen-Qwen3-Coder-30B-A3B-Instruct": "qwen3_coder",
    "mistralai-Mistral-Nemo-Instruct-2407": "mistral",
    "HuggingFaceTB-SmolLM3-3B": "plain",
    "google-gemma-2-2b-it": "plain",
    "microsoft-Phi-3.5-mini-instruct": "plain",
    "openai-gpt-oss-120b": "plain",
}
THINKING = {"Qwen-Qwen3-0.6B": "think", "HuggingFaceTB-SmolLM3-3B": "think", "deepseek-ai-DeepSeek-V3.1": "think"}
PROPERTIES = {
    "city": {"type": "string", "description": "x"},
    "days": {"type": "integer", "description": "x"},
    "where": {"type": "object", "description": "x"},
}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "description": "x", "parameters": {"type": "object", "properties": PROPERTIES}},
}
ARGUMENTS = {"city": 'Zürich <"x">\n\\ 5', "days": 2, "where": {"x": [1.5, None, True]}}
NINE = "call00001"


def source_of(shared: Path, name: str) -> str:
    return (shared / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_family_is_found(shared: Path, name: str) -> None:
    thoughts = reasoning.for_template(source_of(shared, name))
    assert tool_formats.for_template(source_of(shared, name)).name == FAMILIES[name]
    assert (None if thoughts is None else thoughts.name) == THINKING.get(name)


@pytest.mark.parametrize("num_calls", [1, 2])
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family != "plain"])
def test_a_rendered_turn_reads_as_its_calls(shared: Path, name: str, num_calls: int) -> None:
    source = source_of(shared, name)
    call = {"id": NINE, "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}
    turn = {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [call] * num_calls}
    if num_calls == 2 and "single tool-calls at once" in source:
        pytest.skip("the template refuses several calls in one turn")
    asked, template = [{"role": "user", "content": "Hello"}], ChatTemplate(source)
    options: dict[str, Any] = {"tools": [TOOL], "bos_token": "<s>", "eos_token": "</s>", "enable_thinking": True}
    prompt = template.render(asked, **options)
    whole = template.render([*asked, turn], add_generation_prompt=False, **options)
    written = whole[whole.index("<｜Assistant｜>") :] if "DeepSeek" in name else whole.removeprefix(prompt.rstrip())
    assert written != whole
    thoughts = reasoning.for_template(source)
    pieces: list[Piece] = [TextPiece(0, written.removeprefix("<｜Assistant｜>"))]
    if thoughts is not None:
        reader = thoughts.parser(0, prompt_opens=False)
        pieces = [*reader.feed(written.removeprefix("<｜Assistant｜>")), *reader.end()]
    parser = tool_formats.for_template(source).parser(0, [Tool.model_validate(TOOL)])
    read = [p for piece in pieces for p in (parser.feed(piece.text) if isinstance(piece, TextPiece) else [piece])]
    answer = collect([*read, *parser.end()]).choices[0]
    assert [json.loads(made.function.arguments) for made in answer.tool_calls] == [ARGUMENTS] * num_calls
    assert answer.text.strip() in ("<|im_end|>", "<|eot_id|>", "</s>", "<｜end▁of▁sentence｜>")
    assert answer.reasoning == ("Hm." if name == "Qwen-Qwen3-0.6B" else "")


def test_whether_a_prompt_opens_a_thought(shared: Path) -> None:
    asked = [{"role": "user", "content": "What does <think> mean?"}]
    r1 = ChatTemplate("<｜User｜>{{ messages[0].content }}<｜Assistant｜><think>\n")
    for source, variables, is_open in (
        (source_of(shared, "Qwen-Qwen3-0.6B"), {"enable_thinking": True}, False),
        (source_of(shared, "Qwen-Qwen3-0.6B"), {"enable_thinking": False}, False),
        (source_of(shared, "deepseek-ai-DeepSeek-V3.1"), {"thinking": True, "bos_token": ""}, True),
        (source_of(shared, "deepseek-ai-DeepSeek-V3.1"), {"bos_token": ""}, False),
        (r1.source + "</think>", {}, False),
        (r1.source, {}, True),
    ):
        thoughts = reasoning.for_template("</think>")
        assert thoughts is not None
        assert thoughts.is_open(ChatTemplate(source).render(asked, **variables)) is is_open
