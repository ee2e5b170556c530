"""What OpenAI's clients may send besides the plain fields: done, passed over where harmless, or refused by name."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from fake_engine import FakeEngine
from sagellm_control_plane import ControlPlaneManager
from sagellm_gateway import create_app
from sagellm_gateway.app import Gateway
from sagellm_protocol import ModelDescription

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
HELLO = [{"role": "user", "content": "hello you"}]
QWEN = '{% if tools %}<tool_call>{"name": ..., "arguments": ...}</tool_call>{% endif %}'


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}


class ToolEngine(FakeEngine):
    """Its template knows tools."""

    async def describe_model(self) -> ModelDescription:
        return (await super().describe_model()).model_copy(update={"chat_template": QWEN})


@pytest.fixture
def engine() -> FakeEngine:
    return ToolEngine(max_model_len=64)


@pytest.fixture
def app(engine: FakeEngine) -> Gateway:
    """With the chat service as it is."""
    manager = ControlPlaneManager()
    manager.register_engine(engine, engine_id="fake", model="m")
    return create_app(manager, default_model="m")


async def ask(client: httpx.AsyncClient, path: str = CHAT, **fields: Any) -> httpx.Response:
    body = {"input": "hello you"} if path.startswith(RESPONSES) else {"messages": HELLO, "max_tokens": 2}
    return await client.post(path, json={"model": "m", **body, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"modalities": ["text"]},
        {"prediction": {"type": "content", "content": "abc"}},
        {"prompt_cache_key": "k", "prompt_cache_retention": "24h", "prompt_cache_options": {"ttl": "30m"}},
        {"safety_identifier": "s", "service_tier": "auto", "store": True, "metadata": {"a": "b"}, "user": "u"},
        {"verbosity": "medium", "reasoning_effort": "none"},
        {"audio": None, "functions": None, "web_search_options": None, "verbosity": None},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "x"}}]}]},
        {"messages": [{"role": "developer", "name": "dev", "content": "Be kind."}, *HELLO]},
    ],
)
async def test_what_changes_no_answer_is_passed_over(client: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    answer = await ask(client, **fields)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == "w0 w1 "


@pytest.mark.parametrize(
    ("fields", "field", "remedy"),
    [
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio", "leave it out"),
        ({"modalities": ["text", "audio"]}, "modalities[1]", "answers are text alone"),
        ({"functions": [{"name": "f"}]}, "functions", "give them as tools"),
        ({"function_call": "auto"}, "function_call", "use tool_choice"),
        ({"web_search_options": {}}, "web_search_options", "as a tool"),
        ({"verbosity": "low"}, "verbosity", "say it in the system message"),
        ({"moderation": {"model": "x"}}, "moderation", "leave it out"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type", "'function'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "only text",
        ),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(
    client: httpx.AsyncClient, fields: dict[str, Any], field: str, remedy: str
) -> None:
    answer = await ask(client, **fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == field
    assert remedy in error["message"]


async def test_a_form_under_both_of_vllms_names_is_one(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    both = {"guided_grammar": 'start: "a"', "structured_outputs": {"grammar": 'start: "a"'}}
    answer = await ask(client, guided_decoding_backend="guidance", **both)
    assert answer.status_code == 200, answer.text
    form = engine.requests[-1].structured_output
    assert form is not None
    assert form.grammar == 'start: "a"'
    refused = await ask(client, guided_regex="b", **both)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "guided_regex")


async def test_allowed_tools_are_those_that_the_model_sees(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    allowed = {"mode": "auto", "tools": [tool("b")]}
    allowed["tools"][0]["function"].pop("parameters")
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    answer = await ask(client, tools=[tool("a"), tool("b")], tool_choice=choice)
    assert answer.status_code == 200, answer.text
    seen = engine.requests[-1]
    assert [one.function.name for one in seen.tools or ()] == ["b"]
    assert seen.structured_output is None
    allowed["mode"] = "required"
    await ask(client, tools=[tool("a"), tool("b")], tool_choice=choice)
    form = engine.requests[-1].structured_output
    assert form is not None
    assert '"\\"b\\""' in (form.grammar or "")
    assert '"\\"a\\""' not in (form.grammar or "")
    refused = await ask(client, tools=[tool("a")], tool_choice=choice)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tool_choice")
    assert "names 'b'" in refused.json()["error"]["message"]


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
async def test_an_agent_may_call_before_it_answers_in_a_form(
    client: httpx.AsyncClient, engine: FakeEngine, path: str
) -> None:
    """Agents send their tools and the form of the last answer with every call."""
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    if path == CHAT:
        form = {"type": "json_schema", "json_schema": {"name": "W", "schema": schema, "strict": True}}
        answer = await ask(client, path, tools=[tool("weather")], response_format=form)
    else:
        form = {"type": "json_schema", "name": "W", "schema": schema, "strict": True}
        flat = {"type": "function", **tool("weather")["function"]}
        answer = await ask(client, path, tools=[flat], text={"format": form}, max_output_tokens=2)
    assert answer.status_code == 200, answer.text
    wanted = engine.requests[-1].structured_output
    assert wanted is not None
    assert (wanted.grammar or "").startswith('start: "<tool_call>" calls | answer\nanswer: %json ')


async def test_input_tokens_are_those_of_the_prompt(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    counted = await ask(client, f"{RESPONSES}/input_tokens", instructions="Be kind.")
    assert counted.json() == {"object": "response.input_tokens", "input_tokens": 4}
    assert engine.requests == [], "nothing is generated"
    refused = await ask(client, f"{RESPONSES}/input_tokens", conversation="conv_1")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "conversation")


async def test_more_to_include_where_there_is_no_more(client: httpx.AsyncClient) -> None:
    include = ["web_search_call.action.sources", "file_search_call.results", "reasoning.encrypted_content"]
    assert (await ask(client, RESPONSES, include=include, max_output_tokens=2)).status_code == 200


async def test_what_the_responses_api_does_not_do_is_said(client: httpx.AsyncClient) -> None:
    response_id = (await ask(client, RESPONSES, max_output_tokens=2)).json()["id"]
    late = await client.post(f"{RESPONSES}/{response_id}/cancel")
    assert late.status_code == 400
    assert "has ended" in late.json()["error"]["message"]
    assert (await client.post(f"{RESPONSES}/resp_none/cancel")).status_code == 404
    compact = await ask(client, f"{RESPONSES}/compact")
    assert (compact.status_code, compact.json()["error"]["code"]) == (400, "not_implemented")


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/chat/completions", "but /v1/chat/completions; correct the client's base URL"),
        ("/completions", "but /v1/completions;"),
        ("/models", "but /v1/models;"),
        ("/v1/v1/chat/completions", "but /v1/chat/completions;"),
        ("/v1/api/chat", "but /api/chat;"),
        ("/v1/audio/speech", "not offered here"),
        ("/v1/moderations", "not offered here"),
        ("/v1/conversations", "previous_response_id"),
        ("/v1/conversations/conv_1/items", "previous_response_id"),
        ("/v1/nothing", "check it"),
        ("//", "check it"),
    ],
)
async def test_a_wrong_path_says_what_is_right(client: httpx.AsyncClient, path: str, told: str) -> None:
    answer = await client.post(f"http://test{path}", json={})
    assert answer.status_code == 404
    assert told in answer.json()["error"]["message"]
    assert answer.json()["error"]["code"] == "not_found"
