"""The other APIs over the whole gateway: its keys, its chat service, the built-in model."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from asgi_client import client_of
from fake_engine import FakeEngine
from sagellm_control_plane import ControlPlaneManager, EngineConfig
from sagellm_gateway import create_app
from sagellm_gateway.keys import key_of
from sagellm_gateway.settings import AuthSettings, GatewaySettings

QUESTION = "What is LLM inference?"
MESSAGES = [{"role": "user", "content": QUESTION}]
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/responses", {"input": QUESTION, "max_output_tokens": 12}),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 12}),
    ("/api/chat", {"messages": MESSAGES, "options": {"num_predict": 12}}),
    ("/api/generate", {"prompt": QUESTION, "options": {"num_predict": 12}}),
]
ADA, BOB = "ada-has-a-key-of-her-own", "bob-has-a-key-of-his-own"


@pytest.fixture
async def builtin() -> AsyncIterator[httpx.AsyncClient]:
    options = {"max_model_len": 256, "kv_cache_memory_bytes": 2**22}
    manager = ControlPlaneManager(engine_configs=[EngineConfig(kind="cpu", model="builtin", options=options)])
    async with client_of(create_app(manager)) as client:
        yield client


def text_of(path: str, body: dict[str, Any]) -> str:
    """The text of a whole answer."""
    if path == "/v1/responses":
        return str(body["output"][0]["content"][0]["text"])
    if path == "/v1/messages":
        return str(body["content"][0]["text"])
    return str(body["message"]["content"] if path == "/api/chat" else body["response"])


def streamed_text(path: str, text: str) -> str:
    """The text of a streamed answer."""
    if path.startswith("/api/"):
        return "".join(text_of(path, json.loads(line)) for line in text.splitlines())
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    deltas = [event["delta"] for event in events if event["type"].endswith(("output_text.delta", "block_delta"))]
    return "".join(delta if isinstance(delta, str) else delta["text"] for delta in deltas)


async def test_the_built_in_model_answers_the_same_everywhere(builtin: httpx.AsyncClient) -> None:
    texts = set()
    for path, body in CALLS:
        whole = await builtin.post(path, json={**body, "stream": False})
        assert whole.status_code == 200, whole.text
        streamed = await builtin.post(path, json={**body, "stream": True})
        texts |= {text_of(path, whole.json()), streamed_text(path, streamed.text)}
    assert len(texts) == 1
    assert texts.pop().startswith("LLM inference")


async def test_an_answer_that_has_begun_goes_on(builtin: httpx.AsyncClient) -> None:
    whole = (await builtin.post("/v1/messages", json={"messages": MESSAGES, "max_tokens": 20})).json()
    first, rest = text_of("/v1/messages", whole)[:20], text_of("/v1/messages", whole)[20:]
    messages = [*MESSAGES, {"role": "assistant", "content": first}]
    more = (await builtin.post("/v1/messages", json={"messages": messages, "max_tokens": 20})).json()
    assert text_of("/v1/messages", more).startswith(rest)


async def test_what_the_built_in_model_is(builtin: httpx.AsyncClient) -> None:
    (listed,) = (await builtin.get("/api/tags")).json()["models"]
    assert listed["name"] == "builtin:latest"
    assert listed["size"] > 100_000
    assert listed["details"]["family"] == "llama"
    assert listed["details"]["parameter_size"].endswith(("K", "M"))
    (running,) = (await builtin.get("/api/ps")).json()["models"]
    assert (running["context_length"], running["size_vram"], running["size"]) == (256, 0, listed["size"])
    shown = (await builtin.post("/api/show", json={"name": "builtin"})).json()
    assert shown["model_info"]["llama.context_length"] == 256
    assert "messages" in shown["template"]


async def test_vectors_are_those_of_the_openai_api(builtin: httpx.AsyncClient) -> None:
    texts = ["LLM inference", "a word " * 1000]  # the second is too long, and cut
    made = (await builtin.post("/api/embed", json={"input": texts})).json()
    same = (await builtin.post("/v1/embeddings", json={"input": texts, "truncate_prompt_tokens": -1})).json()
    assert made["embeddings"] == [item["embedding"] for item in same["data"]]
    assert made["prompt_eval_count"] == same["usage"]["prompt_tokens"]
    refused = await builtin.post("/api/embed", json={"input": texts, "truncate": False})
    assert refused.status_code == 400
    assert "input[1]" in refused.json()["error"]


async def test_a_count_is_that_of_the_prompt(builtin: httpx.AsyncClient) -> None:
    for messages in (MESSAGES, [*MESSAGES, {"role": "assistant", "content": "LLM"}]):
        prompt = {"messages": messages, "system": "Be brief."}
        count = (await builtin.post("/v1/messages/count_tokens", json=prompt)).json()["input_tokens"]
        usage = (await builtin.post("/v1/messages", json={**prompt, "max_tokens": 1})).json()["usage"]
        assert count == usage["input_tokens"] + usage["cache_read_input_tokens"] > 5


async def test_errors_of_the_engine_name_them_too(builtin: httpx.AsyncClient) -> None:
    form = {"type": "json_schema", "schema": {"type": "nothing"}}
    body = {"messages": MESSAGES, "max_tokens": 1, "output_config": {"format": form}}
    answer = await builtin.post("/v1/messages", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("output_config.format: it cannot be compiled")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "fields", "named"),
    [
        ("/v1/responses", {"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ("/api/chat", {"think": "high"}, "think"),
    ],
)
async def test_errors_name_the_fields_of_the_api_that_was_called(
    guarded: httpx.AsyncClient, path: str, fields: dict[str, Any], named: str, stream: bool
) -> None:
    body = {**dict(CALLS)[path], **fields, "stream": stream}
    answer = await guarded.post(path, json=body, headers={"x-api-key": ADA})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    message = error if isinstance(error, str) else error["message"]
    assert message.startswith(f"{named} is not supported")
    assert path != "/v1/responses" or error["param"] == named


# ---- keys ---------------------------------------------------------------------------------------------


@pytest.fixture
async def guarded() -> AsyncIterator[httpx.AsyncClient]:
    manager = ControlPlaneManager()
    manager.register_engine(FakeEngine(max_model_len=64), model="m")
    auth = AuthSettings(keys=[key_of(ADA, name="ada"), key_of(BOB, name="bob")])
    async with client_of(create_app(manager, default_model="m", settings=GatewaySettings(auth=auth))) as client:
        yield client


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/v1/responses", {"error": {"message": ..., "type": "authentication_error", "param": None, "code": ...}}),
        ("/v1/messages", {"type": "error", "error": {"type": "authentication_error", "message": ...}}),
        ("/v1/messages/count_tokens", {"type": "error", "error": {"type": "authentication_error", "message": ...}}),
        ("/api/chat", {"error": ...}),
    ],
)
async def test_a_missing_key_is_told_in_each_apis_form(guarded: httpx.AsyncClient, path: str, error: Any) -> None:
    answer = await guarded.post(path, json={})
    assert answer.status_code == 401
    assert shape(answer.json(), error) == error


def shape(value: Any, like: Any) -> Any:
    """`value` with an ellipsis wherever `like` has one."""
    if like is ... or not isinstance(like, dict):
        return ... if like is ... else value
    return {name: shape(entry, like.get(name)) for name, entry in value.items()}


async def test_anthropics_clients_send_their_key_in_a_header_of_their_own(guarded: httpx.AsyncClient) -> None:
    body = {"messages": MESSAGES, "max_tokens": 2}
    assert (await guarded.post("/v1/messages", json=body, headers={"x-api-key": ADA})).status_code == 200


async def test_a_key_cannot_read_or_continue_anothers_response(guarded: httpx.AsyncClient) -> None:
    ada, bob = ({"authorization": f"Bearer {key}"} for key in (ADA, BOB))
    first = (await guarded.post("/v1/responses", json={"input": "hi", "max_output_tokens": 2}, headers=ada)).json()
    path = f"/v1/responses/{first['id']}"
    for call in (guarded.get, guarded.delete):
        assert (await call(path, headers=bob)).status_code == 404
    assert (await guarded.get(f"{path}/input_items", headers=bob)).status_code == 404
    refer = [{"type": "item_reference", "id": first["output"][0]["id"]}]
    for fields in ({"input": "hi", "previous_response_id": first["id"]}, {"input": refer}):
        assert (await guarded.post("/v1/responses", json=fields, headers=bob)).status_code == 400
        body = {**fields, "max_output_tokens": 2}
        assert (await guarded.post("/v1/responses", json=body, headers=ada)).status_code == 200
