"""`/tokenize`, `/detokenize` and `/tokenizer_info` over the built-in model."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from asgi_client import client_of
from sagellm_control_plane import ControlPlaneManager
from sagellm_core import LLMEngine, LLMEngineConfig
from sagellm_gateway import create_app

HELLO = [{"role": "user", "content": "Hello there"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def engine() -> LLMEngine:
    config = {"model_path": "builtin", "backend_type": "cpu", "num_kv_blocks": 64, "max_model_len": 512}
    return LLMEngine(LLMEngineConfig.model_validate(config))


@pytest.fixture
async def client(engine: LLMEngine) -> AsyncIterator[httpx.AsyncClient]:
    manager = ControlPlaneManager()
    manager.register_engine(engine, model="little")
    async with client_of(create_app(manager, default_model="little")) as client:
        yield client


async def post(client: httpx.AsyncClient, path: str, **body: Any) -> Any:
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_a_text_goes_and_comes_back(client: httpx.AsyncClient) -> None:
    text = "Once upon a time, 推理 🐌."
    split = await post(client, "/tokenize", model="little", prompt=text, add_special_tokens=False)
    assert split["count"] == len(split["tokens"]) > 3
    assert split["max_model_len"] == 512
    assert split["token_strs"] is None
    assert (await post(client, "/detokenize", model="little", tokens=split["tokens"])) == {"prompt": text}


async def test_the_texts_of_single_tokens(client: httpx.AsyncClient) -> None:
    split = await post(client, "/tokenize", prompt="Hello there", add_special_tokens=False, return_token_strs=True)
    assert "".join(split["token_strs"]).strip() == "Hello there"
    assert len(split["token_strs"]) == split["count"]


async def test_a_conversation_has_the_tokens_of_its_request(client: httpx.AsyncClient) -> None:
    counted = await post(client, "/tokenize", messages=HELLO)
    answer = await post(client, "/v1/chat/completions", messages=HELLO, max_tokens=1)
    assert counted["count"] == answer["usage"]["prompt_tokens"]
    opened = await post(client, "/tokenize", messages=HELLO, add_generation_prompt=False)
    assert opened["tokens"] == counted["tokens"][: opened["count"]]
    assert opened["count"] < counted["count"]


async def test_a_last_message_can_be_left_open(client: httpx.AsyncClient) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Well, I"}]
    split = await post(client, "/tokenize", messages=messages, continue_final_message=True)
    assert (await post(client, "/detokenize", tokens=split["tokens"]))["prompt"].endswith("Well, I")


async def test_an_empty_text_has_no_tokens_of_its_own(client: httpx.AsyncClient) -> None:
    assert (await post(client, "/tokenize", prompt="", add_special_tokens=False))["tokens"] == []
    assert (await post(client, "/detokenize", tokens=[])) == {"prompt": ""}


@pytest.mark.parametrize("length", [100, 20_000])
async def test_long_texts_have_the_same_tokens_as_short_ones(
    client: httpx.AsyncClient, engine: LLMEngine, length: int
) -> None:
    text = ("All good things come in threes. " * length)[:length]
    tokens = (await post(client, "/tokenize", prompt=text, add_special_tokens=False))["tokens"]
    whole = engine.tokenizer._backend._tokenizer.encode(text, add_special_tokens=False)  # type: ignore[attr-defined]
    assert tokens == whole.ids
    assert (await post(client, "/detokenize", tokens=tokens))["prompt"] == text


async def test_what_a_client_needs_to_do_it_itself(client: httpx.AsyncClient, engine: LLMEngine) -> None:
    for path in ("/tokenizer_info", "/tokenizer_info?model=little"):
        info = (await client.get(path)).json()
        assert info["eos_token"] == engine.tokenizer.special_tokens["eos_token"]
        assert "messages" in info["chat_template"]
        assert info["model_max_length"] == 512
    assert (await client.get("/tokenizer_info?model=large")).status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": HELLO}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "tools": [TOOL]}, 400, "tools"),
        ("/tokenize", {"messages": HELLO, "add_special_tokens": True}, 400, "add_special_tokens"),
        ("/tokenize", {"messages": HELLO, "chat_template_kwargs": {"tools": []}}, 400, "chat_template_kwargs"),
        ("/tokenize", {"prompt": "x" * (4 * 2**20 + 1)}, 400, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, 400, None),
        ("/tokenize", {"prompt": "x", "model": "large"}, 404, "model"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [1, -1]}, 400, "tokens[1]"),
        ("/detokenize", {"tokens": [10**6]}, 400, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [1] * (2**20 + 1)}, 400, "tokens"),
    ],
)
async def test_what_is_wrong_is_named(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], status: int, param: str | None
) -> None:
    answer = await client.post(path, content=json.dumps(body))
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"]
    if param is not None:
        assert error["param"] == param
