"""Traces: one server span a call, by the conventions for generative AI."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

import sagellm_gateway.tracing
from asgi_client import LeavingClient, client_of
from fake_engine import FakeEngine
from sagellm_control_plane import ControlPlaneManager
from sagellm_gateway import create_app
from sagellm_gateway.app import Gateway
from sagellm_gateway.settings import GatewaySettings
from sagellm_gateway.tracing import TracingSettings
from waiting import until

CHAT = "/v1/chat/completions"
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"


def hello(text: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": 3, **fields}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(sagellm_gateway.tracing, "make_processor", lambda _: SimpleSpanProcessor(exporter))
    return exporter


@pytest.fixture
def app(engine: FakeEngine, exporter: InMemorySpanExporter) -> Gateway:
    manager = ControlPlaneManager()
    manager.register_engine(engine, model="m")
    tracing = TracingSettings(endpoint="http://127.0.0.1:1/v1/traces")
    return create_app(manager, default_model="m", settings=GatewaySettings(tracing=tracing))


def only_span(exporter: InMemorySpanExporter) -> ReadableSpan:
    (span,) = exporter.get_finished_spans()
    return span


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_call_is_one_server_span(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter, engine: FakeEngine, stream: bool
) -> None:
    body = hello(stream=stream, temperature=0.5, n=2, seed=7, stop=["x"])
    answer = await client.post(CHAT, json=body, headers={"traceparent": TRACEPARENT})
    assert answer.status_code == 200, answer.text
    span = only_span(exporter)
    assert span.kind is SpanKind.SERVER
    assert span.name == "chat m"
    attributes = dict(span.attributes or {})
    ours = {name: attributes.pop(name) for name in list(attributes) if name.startswith("sagellm.")}
    assert ours.pop("sagellm.queue_s") >= 0  # type: ignore[operator]
    ours.pop("sagellm.predicted_ttft_s", None)
    assert ours == {"sagellm.engines": ("fake",), "sagellm.policy": "fifo", "sagellm.router": "marginal_cost"}
    assert attributes.pop("gen_ai.response.time_to_first_chunk") == pytest.approx(0.002, abs=1.0)
    assert attributes == {
        "http.request.method": "POST",
        "http.route": CHAT,
        "url.path": CHAT,
        "url.scheme": "http",
        "http.response.status_code": 200,
        "client.address": "127.0.0.1",
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "sagellm",
        "gen_ai.request.model": "m",
        "gen_ai.response.model": "m",
        "gen_ai.response.id": engine.requests[0].request_id,
        "gen_ai.request.stream": stream,
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 7,
        "gen_ai.request.stop_sequences": ("x",),
        "gen_ai.request.choice.count": 2,
        "gen_ai.usage.input_tokens": 1,
        "gen_ai.usage.cache_read.input_tokens": 1,
        "gen_ai.usage.output_tokens": 6,
        "gen_ai.response.finish_reasons": ("length", "length"),
    }
    assert span.resource.attributes["service.name"] == "sagellm"


async def test_the_span_is_the_callers_child_and_the_engine_knows_its_trace(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter, engine: FakeEngine
) -> None:
    await client.post(CHAT, json=hello(), headers={"traceparent": TRACEPARENT, "tracestate": "a=b"})
    span = only_span(exporter)
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == PARENT_ID
    assert f"{span.context.trace_id:032x}" == TRACE_ID == engine.requests[0].trace_id
    assert span.context.trace_state["a"] == "b"


async def test_without_a_caller_the_trace_is_fresh_and_shared(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter, engine: FakeEngine
) -> None:
    for headers in ({}, {"traceparent": "00-nonsense"}):
        await client.post(CHAT, json=hello(), headers=headers)
    first, second = exporter.get_finished_spans()
    assert first.parent is None
    assert [f"{span.context.trace_id:032x}" for span in (first, second)] == [r.trace_id for r in engine.requests]
    assert first.context.trace_id != second.context.trace_id


async def test_a_caller_who_does_not_sample_is_not_traced(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter, engine: FakeEngine
) -> None:
    await client.post(CHAT, json=hello(), headers={"traceparent": TRACEPARENT[:-1] + "0"})
    assert exporter.get_finished_spans() == ()
    assert engine.requests[0].trace_id == TRACE_ID


async def test_several_prompts_add_up(client: httpx.AsyncClient, exporter: InMemorySpanExporter) -> None:
    await client.post("/v1/completions", json={"model": "m", "prompt": ["a", "b c"], "max_tokens": 2})
    span = only_span(exporter)
    attributes = span.attributes or {}
    assert span.name == "text_completion m"
    assert attributes["gen_ai.usage.input_tokens"] == 3
    assert attributes["gen_ai.usage.output_tokens"] == 4
    assert attributes["gen_ai.response.finish_reasons"] == ("length", "length")


async def test_an_embedding_is_no_completion(client: httpx.AsyncClient, exporter: InMemorySpanExporter) -> None:
    answer = await client.post("/v1/embeddings", json={"model": "m", "input": "a"})
    assert answer.status_code == 200, answer.text
    span = only_span(exporter)
    assert span.name == "embeddings m"
    assert not {"gen_ai.request.max_tokens", "gen_ai.request.stream"} & set(span.attributes or {})


async def test_failures_are_marked(client: httpx.AsyncClient, exporter: InMemorySpanExporter) -> None:
    await client.post(CHAT, json=hello("fail"))
    span = only_span(exporter)
    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes or {})["error.type"] == "internal"
    exporter.clear()
    await client.post(CHAT, json={"messages": []})
    span = only_span(exporter)
    assert span.status.status_code is StatusCode.UNSET
    assert (span.attributes or {})["http.response.status_code"] == 400
    assert span.name == f"POST {CHAT}"


async def test_a_caller_who_leaves_ends_the_span(
    app: Gateway, exporter: InMemorySpanExporter, engine: FakeEngine
) -> None:
    async with client_of(app):
        caller = LeavingClient(app, CHAT, {**hello("wait"), "stream": True})
        await until(lambda: engine.running)
        caller.leave()
        await caller.done
    attributes = only_span(exporter).attributes or {}
    assert attributes["gen_ai.response.finish_reasons"] == ("abort",)


async def test_what_was_said_is_in_no_span_and_probes_make_none(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter
) -> None:
    for path in ("/health", "/metrics"):
        await client.get(path)
    assert exporter.get_finished_spans() == ()
    await client.post(CHAT, json=hello("my secret"))
    assert "my secret" not in only_span(exporter).to_json()


def test_without_an_endpoint_nothing_is_loaded() -> None:
    code = """
import sys
from sagellm_control_plane import ControlPlaneManager
from sagellm_gateway import create_app
app = create_app(ControlPlaneManager())
assert app.tracing is None
assert not [name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter", "redis"))]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
