"""Rendering equals transformers' own; refusals and mistakes are one clear error."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from sagellm_core.chat_template import ChatTemplate, render_plain_chat
from sagellm_protocol.errors import InvalidArgumentError
from sagellm_protocol.messages import ChatMessage

TEMPLATES = [
    "HuggingFaceTB-SmolLM3-3B",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    "Qwen-Qwen2.5-7B-Instruct",
    "Qwen-Qwen3-0.6B",
    "deepseek-ai-DeepSeek-V3.1",
    "google-gemma-2-2b-it",
    "meta-llama-Llama-3.1-8B-Instruct",
    "microsoft-Phi-3.5-mini-instruct",
    "minja_cases/Qwen-Qwen3-Coder-30B-A3B-Instruct",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "openai-gpt-oss-120b",
]
USER = [{"role": "user", "content": "hi"}]


def with_parsed_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, which some templates insist on."""
    parsed: list[dict[str, Any]] = json.loads(json.dumps(messages))
    for message in parsed:
        for call in message.get("tool_calls") or ():
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return parsed


def test_all_shared_templates_are_listed(shared: Path) -> None:
    folder = shared / "chat_templates"
    assert sorted(str(f.relative_to(folder).with_suffix("")) for f in folder.rglob("*.jinja")) == sorted(TEMPLATES)


@pytest.mark.parametrize("as_objects", [False, True])
@pytest.mark.parametrize("case", ["simple", "system", "tool_use"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_equals_transformers(shared: Path, name: str, case: str, as_objects: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    source = (shared / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    values = json.loads((shared / "chat_templates/minja_cases" / f"{case}.json").read_text(encoding="utf-8"))
    messages, tools = values.pop("messages"), values.pop("tools", None)
    messages = with_parsed_arguments(messages) if as_objects else messages
    values.pop("add_generation_prompt")
    for add_generation_prompt in (True, False):
        options = {"tools": tools, "add_generation_prompt": add_generation_prompt, **values}
        template = ChatTemplate(source)
        refusal = None
        try:
            rendered, _ = render_jinja_template([messages], chat_template=source, **options)
        except Exception as error:
            refusal = str(error).rstrip(".")
        if refusal is None:
            assert template.render(messages, **options) == rendered[0]
        else:
            with pytest.raises(InvalidArgumentError, match=re.escape(refusal)):
                template.render(messages, **options)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ {'ü<&>': [1, true, none]} | tojson }}", '{"ü<&>": [1, true, null]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
        ("{{ strftime_now('%d %b %Y') }}", "06 Jul 2024"),
        ("{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }}", "True True True"),
        ("{% for m in messages %}{{ m.role }}{{ 'content' in m }}{% endfor %}", "userTrue"),
    ],
)
def test_what_templates_rely_on(source: str, text: str) -> None:
    assert ChatTemplate(source, clock=lambda: datetime(2024, 7, 6)).render(USER) == text


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10000000) %}{% endfor %}",
    ],
)
def test_templates_cannot_leave_the_sandbox(source: str) -> None:
    with pytest.raises(InvalidArgumentError, match="cannot render these messages"):
        ChatTemplate(source).render(USER)


def test_refusals_and_mistakes_are_told() -> None:
    with pytest.raises(InvalidArgumentError, match="cannot render these messages: System role not supported; check"):
        ChatTemplate("{{ raise_exception('System role not supported') }}").render(USER)
    with pytest.raises(InvalidArgumentError, match=r"not valid jinja2 \(line 2: "):
        ChatTemplate("\n{% if %}").render(USER)
    with pytest.raises(InvalidArgumentError, match="cannot render"):
        ChatTemplate("{{ 1 / 0 }}").render(USER)


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "at least one"),
        ("hi", "must be a list"),
        (["hi"], r"messages\[0\] must be an object"),
        ([{"content": "hi"}], "string `role`"),
        ([{"role": "user", "content": 3}], "must be a string or a list of text parts, got int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "type 'image_url'; this engine reads text only"),
        ([{"role": "user", "content": "x", "extra": object()}], "JSON data only, got object"),
    ],
)
def test_messages_are_checked(messages: Any, match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        ChatTemplate("x").render(messages)
    with pytest.raises(InvalidArgumentError, match=match):
        render_plain_chat(messages)


def test_messages_may_be_protocol_types() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}")
    assert template.render([ChatMessage(role="user", content="hi")]) == "user: hi;"  # type: ignore[list-item]


def test_content_takes_the_shape_the_template_reads() -> None:
    as_text = ChatTemplate("{{ messages[0].content }}")
    as_parts = ChatTemplate("{% for part in messages[0].content if part.type == 'text' %}<{{ part.text }}>{% endfor %}")
    either = ChatTemplate(
        "{% set c = messages[0].content %}{% if c is string %}{{ c }}{% else %}<{{ c[0].text }}>{% endif %}"
    )
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert [template.render(parts) for template in (as_text, as_parts, either)] == ["a\nb", "<a><b>", "a\nb"]
    assert [template.render(USER) for template in (as_text, as_parts, either)] == ["hi", "<hi>", "hi"]


def test_absent_and_null_are_the_same() -> None:
    template = ChatTemplate("{{ 'tool_calls' in messages[0] }}{{ 'content' in messages[0] }}")
    assert template.render([{"role": "assistant", "content": None, "tool_calls": None}]) == "FalseFalse"


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_found_under_all_its_names(key: str) -> None:
    template = ChatTemplate("{{ messages[0].reasoning_content }}|{{ messages[0].thinking }}")
    assert template.render([{"role": "assistant", "content": "x", key: "because"}]) == "because|because"


def test_the_last_message_can_be_continued() -> None:
    source = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<{% endif %}"
    )
    trimming = source.replace("m.content", "m.content | trim")
    chat = [*USER, {"role": "assistant", "content": "Sure: "}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert ChatTemplate(source).render(chat, **options) == "<user>hi</><assistant>Sure: "
    assert ChatTemplate(trimming).render(chat, **options) == "<user>hi</><assistant>Sure:"
    with pytest.raises(InvalidArgumentError, match="set only one"):
        ChatTemplate(source).render(chat, continue_final_message=True)
    with pytest.raises(InvalidArgumentError, match="drops the last message"):
        ChatTemplate("nothing").render(chat, **options)
    with pytest.raises(InvalidArgumentError, match="needs text in the last message"):
        ChatTemplate(source).render([{"role": "assistant", "content": None}], **options)


def test_plain_rendering() -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi "}]},
        {"role": "assistant", "content": "Hello."},
        {"role": "critic", "content": "Go on."},
    ]
    lines = "System: Be brief.\nUser: Hi\nAssistant: Hello.\nCritic: Go on."
    assert render_plain_chat(chat) == f"{lines}\nAssistant:"
    assert render_plain_chat(chat, add_generation_prompt=False) == lines
