"""`/v1/embeddings` over engines without models, and over a server process with OpenAI's own client."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from asgi_client import LeavingClient, client_of
from cli_process import server
from encoder_zoo import build_encoder
from fake_engine import FakeEngine
from sagellm_control_plane import ControlPlaneManager
from sagellm_gateway import create_app
from sagellm_gateway.app import Gateway
from sagellm_gateway.keys import new_key
from sagellm_gateway.settings import GatewaySettings
from tiny_engine import make_engine
from waiting import until

PATH = "/v1/embeddings"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(max_model_len=64, max_batch_size=4)


def make_app(engine: FakeEngine, **sections: Any) -> Gateway:
    manager = ControlPlaneManager(max_num_waiting=100)
    manager.register_engine(engine, engine_id="fake", model="m")
    return create_app(manager, default_model="m", settings=GatewaySettings.model_validate(sections))


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(make_app(engine)) as client:
        yield client


async def test_the_answer_is_openais(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, json={"model": "m", "input": ["one", "one two"], "user": "u"})
    assert answer.status_code == 200
    assert answer.json() == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [1.0, 0.5, 0.25, 0.125]},
            {"object": "embedding", "index": 1, "embedding": [2.0, 0.5, 0.25, 0.125]},
        ],
        "model": "m",
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
    }


async def test_base64_is_little_endian_float32(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, json={"model": "m", "input": "one two three", "encoding_format": "base64"})
    (item,) = answer.json()["data"]
    assert struct.unpack("<4f", base64.b64decode(item["embedding"])) == (3.0, 0.5, 0.25, 0.125)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ("one two", [["one two"]]),
        ([5, 6, 7], [[[5, 6, 7]]]),
        (["a", "b"], [["a", "b"]]),
        ([[5, 6], [7]], [[[5, 6], [7]]]),
    ],
)
async def test_inputs_are_texts_or_token_ids(
    client: httpx.AsyncClient, engine: FakeEngine, inputs: Any, expected: Any
) -> None:
    answer = await client.post(PATH, json={"input": inputs, "dimensions": 2, "encoding_format": None})
    assert [len(item["embedding"]) for item in answer.json()["data"]] == [2] * len(expected[0])
    assert sorted([request.prompt for request in engine.requests], key=str) == sorted(expected[0], key=str)


async def test_headers_reach_the_requests(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    headers = {"x-priority": "high", "x-request-id": "mine"}
    await client.post(PATH, json={"input": ["a", "b"]}, headers=headers)
    assert [request.priority for request in engine.requests] == [-1, -1]
    assert all(request.request_id.startswith("mine-") for request in engine.requests)


async def test_as_many_texts_as_openai_takes(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, json={"input": ["x"] * 2048})
    assert len(answer.json()["data"]) == 2048


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": ["x"] * 2049}, 400, "input"),
        ({"input": [[]]}, 400, "input"),
        ({"input": 5}, 400, "input"),
        ({"input": {"a": "b"}}, 400, "input"),
        ({"input": "x", "dimensions": 0}, 400, "dimensions"),
        ({"input": "x", "dimensions": 10**9}, 400, "dimensions"),
        ({"input": "x", "encoding_format": "int8"}, 400, "encoding_format"),
        ({"input": "x", "truncate_prompt_tokens": -2}, 400, "truncate_prompt_tokens"),
        ({"input": "x", "stream": True}, 400, "stream"),
        ({"input": "x", "model": "nobody"}, 404, "model"),
        ({"input": "refuse"}, 400, "input"),
        ({"input": ["a", "refuse"]}, 400, "input[1]"),
        ({"input": "fail"}, 500, None),
    ],
)
async def test_what_is_wrong_is_named(
    client: httpx.AsyncClient, fields: dict[str, Any], status: int, param: str | None
) -> None:
    answer = await client.post(PATH, json=fields)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert (error["param"] or "").partition(".")[0].startswith(param or "")


async def test_who_goes_away_ends_the_work(engine: FakeEngine) -> None:
    app = make_app(engine)
    async with client_of(app):
        leaving = LeavingClient(app, PATH, {"input": ["wait"] * 10})
        await until(lambda: len(engine.running) == 4)
        leaving.leave()
        await leaving.done
        assert not engine.running
        assert app.manager.num_waiting == 0


async def test_an_engine_that_stops_in_the_midst_is_told(engine: FakeEngine) -> None:
    app = make_app(engine)
    async with client_of(app) as client:
        answering = asyncio.ensure_future(client.post(PATH, json={"input": "wait"}))
        await until(lambda: engine.running)
        for request_id in list(engine.running):
            engine.abort(request_id)
        answer = await answering
        assert answer.status_code == 503
        assert "cut off" in answer.json()["error"]["message"]


async def test_texts_count_for_limits_and_metrics(engine: FakeEngine) -> None:
    key, entry = new_key("ada", limits={"tokens_per_minute": 5})
    app = make_app(engine, auth={"keys": [entry]})
    headers = {"authorization": f"Bearer {key}"}
    async with client_of(app) as client:
        first = await client.post(PATH, json={"input": "one two"}, headers=headers)
        assert first.status_code == 200
        assert first.headers["x-ratelimit-remaining-tokens"] == "3"
        second = await client.post(PATH, json={"input": "x" * 80}, headers=headers)
        assert second.status_code == 429
        metrics = (await client.get("/metrics", headers=headers)).text
    assert 'vllm:request_prompt_tokens_sum{engine="fake",model_name="m"} 2.0' in metrics
    assert 'vllm:request_generation_tokens_sum{engine="fake",model_name="m"} 0.0' in metrics


# ---- OpenAI's client and a server process -------------------------------------------------------------


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    home = tmp_path_factory.mktemp("home")
    with server(["serve", "--model", "builtin", "--backend", "cpu"], Path(home)) as running:
        yield OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


@pytest.mark.slow
def test_likeness_shows_in_the_vectors(remote: OpenAI) -> None:
    texts = ["What is a token?", "What is a token", "The cat sleeps on the warm stove."]
    made = remote.embeddings.create(model="builtin", input=texts)
    same, other = (
        sum(a * b for a, b in zip(made.data[0].embedding, item.embedding, strict=True)) for item in made.data[1:]
    )
    assert same > other
    assert made.usage.prompt_tokens == made.usage.total_tokens > 10
    for item in made.data:
        assert sum(x * x for x in item.embedding) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_both_formats_hold_the_same_numbers(remote: OpenAI) -> None:
    numbers = remote.embeddings.create(model="builtin", input="Hello", encoding_format="float").data[0].embedding
    decoded = remote.embeddings.create(model="builtin", input="Hello").data[0].embedding  # asks for base64
    assert decoded == pytest.approx(numbers, abs=0)
    cut = remote.embeddings.create(model="builtin", input="Hello", dimensions=16).data[0].embedding
    assert len(cut) == 16
    assert len(decoded) == 256


@pytest.mark.slow
def test_token_ids_are_the_text_they_stand_for(remote: OpenAI) -> None:
    tokens = httpx.post(f"{remote.base_url}".replace("/v1/", "/tokenize"), json={"prompt": "Hello there"}).json()
    both = remote.embeddings.create(model="builtin", input=[tokens["tokens"]]).data[0].embedding
    assert both == remote.embeddings.create(model="builtin", input="Hello there").data[0].embedding


@pytest.mark.slow
def test_errors_are_openais(remote: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="input is empty"):
        remote.embeddings.create(model="builtin", input="")
    with pytest.raises(openai.BadRequestError, match="the model's vectors have 256"):
        remote.embeddings.create(model="builtin", input="x", dimensions=257)
    with pytest.raises(openai.BadRequestError, match="split it into shorter texts"):
        remote.embeddings.create(model="builtin", input="a " * 1500)
    with pytest.raises(openai.NotFoundError):
        remote.embeddings.create(model="nobody", input="x")


# ---- an embedding model -------------------------------------------------------------------------------


async def test_an_embedding_model_makes_vectors_and_no_text(tmp_path: Path) -> None:
    build_encoder("bert", tmp_path)
    manager = ControlPlaneManager()
    manager.register_engine(make_engine(tmp_path, max_model_len=64), model="vectors")
    async with client_of(create_app(manager, default_model="vectors")) as client:
        answer = await client.post(PATH, json={"model": "vectors", "input": ["One.", "Two."]})
        assert [len(item["embedding"]) for item in answer.json()["data"]] == [64, 64]
        for path, body in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
            ("/v1/completions", {"prompt": "hi"}),
        ):
            for stream in (False, True):
                refused = await client.post(path, json={"model": "vectors", "stream": stream, **body})
                assert refused.status_code == 400
                error = refused.json()["error"]
                assert (error["param"], "makes vectors of texts" in error["message"]) == ("model", True)
        refused = await client.post("/v1/completions", json={"model": "default", "prompt": "hi"})
        assert refused.status_code == 400
        split = await client.post("/tokenize", json={"prompt": "One."})
        assert split.json()["token_strs"] is None
        assert split.json()["count"] > 3
