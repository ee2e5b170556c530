"""The whole run against a small server of its own, which does what a test wants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from live_server import serving
from sagellm_benchmark.serve.benchmark import ServeLoad, run_serve_benchmark
from sagellm_benchmark.serve.prompts import RandomLengths
from sagellm_benchmark.serve.report import Objectives
from sagellm_protocol import (
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)


class Fake:
    """A server with OpenAI's API; `answer` decides on each request after the warm-up."""

    def __init__(self) -> None:
        self.app = FastAPI()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.behaviours: list[str] = []  # for each request in turn; "good" when there is none left
        self.models: list[dict[str, Any]] = [{"id": "m", "max_model_len": 1000}]
        self.has_tokenize = True
        self.pace_s = 0.001
        self.num_open = self.peak = 0
        self.app.get("/v1/models")(self.list_models)
        self.app.post("/tokenize")(self.tokenize)
        self.app.post("/v1/chat/completions")(self.complete)
        self.app.post("/v1/completions")(self.complete)

    async def list_models(self) -> Any:
        return {"object": "list", "data": self.models}

    async def tokenize(self, http: Request) -> Response:
        if not self.has_tokenize:
            return JSONResponse({"detail": "Not Found"}, status_code=404)
        words = (await http.json())["prompt"].split()
        return JSONResponse({"tokens": [len(word) for word in words] * 2, "count": 2 * len(words)})

    async def complete(self, http: Request) -> Response:
        body = await http.json()
        self.bodies.append(body)
        self.headers.append(dict(http.headers))
        behaviour = self.behaviours.pop(0) if self.behaviours else "good"
        if behaviour == "refuse":
            return JSONResponse({"error": {"code": "resource_exhausted", "message": "full"}}, status_code=429)
        if behaviour == "whole":
            return JSONResponse({"choices": []})
        return StreamingResponse(self.stream(body, behaviour), media_type="text/event-stream")

    async def stream(self, body: dict[str, Any], behaviour: str) -> AsyncIterator[str]:
        self.num_open += 1
        self.peak = max(self.peak, self.num_open)
        try:
            for _ in range(body["max_tokens"]):
                await asyncio.sleep(self.pace_s)
                yield f"data: {json.dumps({'choices': [{'text': 'x', 'delta': {'content': 'x'}}]})}\n\n"
                if behaviour == "error":
                    yield 'data: {"error": {"code": "unavailable", "message": "engine died"}}\n\n'
                    return
                if behaviour == "cut":
                    return
                if behaviour == "hang":
                    await asyncio.sleep(3600)
            usage = {"prompt_tokens": 9, "completion_tokens": body["max_tokens"]}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"
        finally:
            self.num_open -= 1


@pytest.fixture
async def fake() -> Fake:
    return Fake()


async def measure(fake: Fake, *, detailed: bool = False, **options: Any) -> dict[str, Any]:
    async with serving(fake.app) as url:
        settings: dict[str, Any] = {"num_prompts": 6, "lengths": RandomLengths(8, 4), **options}
        result = await run_serve_benchmark(ServeLoad(url, **settings), detailed=detailed)
    return json.loads(json.dumps(result))  # type: ignore[no-any-return]


async def test_a_run_sends_what_it_should_and_counts_what_came(fake: Fake) -> None:
    fake.pace_s = 0.005
    result = await measure(fake, endpoint="completions", api_key="k", detailed=True)
    assert len(fake.bodies) == 7  # one to warm up
    assert fake.headers[0]["authorization"] == "Bearer k"
    assert all(len(body["prompt"]) == 8 and body["model"] == "m" for body in fake.bodies)
    assert len({tuple(body["prompt"]) for body in fake.bodies}) > 4
    assert result["num_requests"] == 6
    assert result["num_failed"] == 0
    assert (result["num_prompt_tokens"], result["num_output_tokens"]) == (54, 24)
    assert result["load"]["lengths_are_exact"]
    assert result["tpot_ms"]["mean"] >= 1
    assert result["ttft_ms"]["p50"] <= result["latency_ms"]["p50"]
    assert [len(request["arrivals"]) for request in result["requests"]] == [4] * 6


async def test_chat_prompts_are_texts_of_about_the_length(fake: Fake) -> None:
    result = await measure(fake)
    assert not result["load"]["lengths_are_exact"]
    assert len(fake.bodies[0]["messages"][0]["content"].split()) == 4  # two tokens a word, says the server
    fake.has_tokenize = False
    await measure(fake)
    assert len(fake.bodies[-1]["messages"][0]["content"].split()) == 6


async def test_at_most_so_many_are_on_their_way(fake: Fake) -> None:
    fake.pace_s = 0.1
    result = await measure(fake, max_concurrency=2, num_prompts=6)
    assert fake.peak == result["peak_concurrency"] == 2
    assert result["late_ms_p99"] < 700  # waiting for a turn, 800 ms for the third, is no lateness


async def test_requests_come_at_their_rate(fake: Fake) -> None:
    result = await measure(fake, rate=100.0, num_prompts=20, detailed=True)
    sent = [request["sent_at"] for request in result["requests"]]
    assert sent == sorted(sent)
    assert all(request["sent_at"] >= request["due_at"] for request in result["requests"])
    assert sent[-1] > 0.05


async def test_failures_are_told_apart(fake: Fake) -> None:
    fake.behaviours = ["good", "refuse", "error", "cut", "whole", "hang", "good"]
    result = await measure(fake, timeout_s=2.0)
    assert {error["kind"]: error["count"] for error in result["errors"]} == {
        "status 429 resource_exhausted": 1,
        "error in the stream: unavailable": 1,
        "cut off": 1,
        "no stream": 1,
        "timeout": 1,
    }
    assert result["errors"][0]["messages"]
    assert result["num_failed"] == 5
    assert result["latency_ms"] is not None


async def test_objectives_are_sent_and_judged(fake: Fake) -> None:
    objectives = Objectives(ttft_ms=60_000, latency_ms=1e-6)
    result = await measure(fake, objectives=objectives, objectives_to_server=True)
    assert fake.headers[-1]["x-slo-ttft-ms"] == "60000"
    assert result["goodput"]["attainment"] == 0
    assert (await measure(fake, objectives=Objectives(ttft_ms=60_000)))["goodput"]["attainment"] == 1
    assert "x-slo-ttft-ms" not in fake.headers[-1]


async def test_a_trace_is_replayed_at_its_pace_and_cut_to_the_context(fake: Fake, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 400 * i, "input_length": 5120, "output_length": 40, "hash_ids": [7, *range(10 * i, 10 * i + 9)]}
        for i in range(3)
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    result = await measure(
        fake, endpoint="completions", dataset="trace", path=trace, length_scale=0.25, speed=4.0, detailed=True
    )
    prompts = [body["prompt"] for body in fake.bodies[1:]]
    assert result["num_requests"] == 3
    assert result["load"]["num_cut_to_context"] == 3
    assert [len(prompt) for prompt in prompts] == [990] * 3
    assert prompts[0][:128] == prompts[1][:128] != prompts[0][128:256]
    due = [request["due_at"] for request in result["requests"]]
    assert due == pytest.approx([0, 0.1, 0.2])
    assert all(request["sent_at"] >= request["due_at"] for request in result["requests"])


async def test_a_file_is_asked_as_it_stands(fake: Fake, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "what?", "output_len": 2}\n')
    result = await measure(fake, dataset="file", path=file, num_prompts=3)
    assert [body["messages"][0]["content"] for body in fake.bodies[1:]] == ["what?"] * 3
    assert result["num_output_tokens"] == 6


async def test_a_server_that_refuses_the_first_request_is_not_measured(fake: Fake) -> None:
    fake.behaviours = ["refuse"]
    with pytest.raises(ResourceExhaustedError, match="full; nothing was measured"):
        await measure(fake)
    assert len(fake.bodies) == 1


async def test_servers_that_cannot_be_measured(fake: Fake) -> None:
    with pytest.raises(UnavailableError, match="no server answers"):
        await run_serve_benchmark(ServeLoad("http://127.0.0.1:9"))
    fake.models = []
    with pytest.raises(NotFoundError, match="no model ready"):
        await measure(fake)
    locked = FastAPI()

    @locked.get("/v1/models")
    async def refuse() -> Response:
        return JSONResponse({"error": {"message": "no key"}}, status_code=401)

    async with serving(locked) as url:
        with pytest.raises(UnauthenticatedError, match="no key"):
            await run_serve_benchmark(ServeLoad(url))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"endpoint": "chats"}, "endpoint is 'chats'; choose chat or completions"),
        ({"dataset": "trace"}, "read from a file"),
        ({"path": Path("x")}, "takes no file"),
        ({"length_scale": 0}, "length_scale"),
        ({"objectives_to_server": True}, "no objectives"),
    ],
)
def test_impossible_loads(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        ServeLoad("http://host", **options)
