"""The HTTP face of one engine: `sage-engine`, or `engine_server_app` under any ASGI server.

It takes OpenAI completion bodies and the protocol's own requests on the same path: a body with `request_id`
or `trace_id` is a protocol request and gets a `Response`; any other is an OpenAI body and gets a `Completion`. What a
control plane asks besides stands in `engine_control`.
Chat, sessions, authentication and many engines belong to the gateway.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Annotated, Any

import typer
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from fastapi.responses import Response as HttpResponse
from prometheus_client import CollectorRegistry

from sagellm_core.addresses import refuse_exposed
from sagellm_core.answers import Answers, answer_completion, read_prompts, stream_completion
from sagellm_core.command import run_command
from sagellm_core.config import LLMEngineConfig
from sagellm_core.engine_control import add_control_routes
from sagellm_core.engine_metrics import EngineCollector
from sagellm_core.http import (
    install_error_handlers,
    metrics_page,
    read_json_object,
    start_event_stream,
    while_connected,
)
from sagellm_core.llm_engine import LLMEngine
from sagellm_core.serving import run_server
from sagellm_core.version import __version__
from sagellm_protocol import InvalidArgumentError, NotFoundError, Request, parse
from sagellm_protocol.openai import CompletionRequest


def create_engine_app(make_engine: Callable[[], LLMEngine]) -> FastAPI:
    """An application that starts its engine with the server and stops it at the end."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with make_engine() as engine:
            app.state.engine = engine
            app.state.collector = EngineCollector(lambda _: engine.config.model_path)
            app.state.registry = CollectorRegistry()
            app.state.registry.register(app.state.collector)
            app.state.answers = Answers(engine.execute, engine.stream, app.state.collector.observe)
            yield

    app = FastAPI(title="sageLLM engine", version=__version__, lifespan=lifespan)
    install_error_handlers(app)
    app.add_api_route("/v1/completions", completions, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions/stream", stream_completions, methods=["POST"], response_model=None)
    app.add_api_route("/health", health, methods=["GET"], response_model=None)
    app.add_api_route("/info", info, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", metrics, methods=["GET"], response_model=None)
    add_control_routes(app)
    return app


# ---- routes -------------------------------------------------------------------------------------------


async def completions(http: HttpRequest) -> HttpResponse:
    """Answer a completion; `stream: true` streams OpenAI chunks, or a protocol request's own events."""
    answers: Answers = http.app.state.answers
    body = await read_json_object(http)
    if _is_protocol_request(body):
        request = _protocol_request(http, body)
        if request.stream:
            return await start_event_stream(http, _events(answers, request))
        response = await while_connected(http, answers.execute(request))
        status = 200 if response.error is None else response.error.code.http_status
        return JSONResponse(response.model_dump(mode="json"), status_code=status)
    call = _completion_request(http, body)
    prompts = await read_prompts(call, _engine(http).detokenize)
    if call.stream:
        return await start_event_stream(http, stream_completion(answers, call, call.to_requests(), prompts))
    answer = await while_connected(http, answer_completion(answers, call, call.to_requests(), prompts))
    return HttpResponse(answer, media_type="application/json")


async def stream_completions(http: HttpRequest) -> HttpResponse:
    """Answer with the protocol's stream events, one SSE message each."""
    body = await read_json_object(http)
    if _is_protocol_request(body):
        request = _protocol_request(http, body)
    else:
        requests = _completion_request(http, body).to_requests()
        if len(requests) > 1:
            raise InvalidArgumentError("prompt must be a single one on this path; send one stream each", field="prompt")
        request = requests[0]
    return await start_event_stream(http, _events(http.app.state.answers, request))


async def health(http: HttpRequest) -> HttpResponse:
    """200 while the step loop answers, else 503."""
    healthy = await _engine(http).health_check()
    return JSONResponse({"status": "ok" if healthy else "unavailable"}, status_code=200 if healthy else 503)


async def info(http: HttpRequest) -> HttpResponse:
    """Model, device, kernels, limits and the load of this moment."""
    engine = _engine(http)
    stats = await engine.stats()
    load = {name: getattr(stats, name) for name in ("num_running", "num_waiting", "kv_usage", "num_free_blocks")}
    return JSONResponse({"version": __version__, **engine.get_info(), "load": load})


async def metrics(http: HttpRequest) -> HttpResponse:
    """Prometheus metrics."""
    engine = _engine(http)
    http.app.state.collector.stats[engine.engine_id] = await engine.stats()
    return metrics_page(http.app.state.registry)


# ---- steps of the above -------------------------------------------------------------------------------


def _engine(http: HttpRequest) -> LLMEngine:
    engine: LLMEngine = http.app.state.engine
    return engine


def _is_protocol_request(body: dict[str, Any]) -> bool:
    return "request_id" in body or "trace_id" in body


def _protocol_request(http: HttpRequest, body: dict[str, Any]) -> Request:
    request = parse(Request, body, what="request")
    _check_model(http, request.model)
    return request


def _completion_request(http: HttpRequest, body: dict[str, Any]) -> CompletionRequest:
    call = parse(CompletionRequest, body, what="completion request")
    _check_model(http, call.model)
    return call


def _check_model(http: HttpRequest, model: str) -> None:
    served = _engine(http).config.model_path
    if model not in (served, "default"):
        raise NotFoundError(f"this engine serves {served!r}, not {model!r}; use that name or 'default'", field="model")


async def _events(answers: Answers, request: Request) -> AsyncGenerator[bytes, None]:
    async with aclosing(answers.stream(request)) as events:
        async for event in events:
            yield event.model_dump_json().encode()


ENGINE_REMEDY = "serve it through the gateway, listen on 127.0.0.1, or allow it with --allow-no-key"

# ---- entry points -------------------------------------------------------------------------------------

engine_server_app = create_engine_app(lambda: LLMEngine(LLMEngineConfig(model_path="builtin")))
"""The built-in model behind HTTP, for `uvicorn sagellm_core.engine_server:engine_server_app`."""


def serve_engine(
    model: Annotated[str, typer.Option(help="Model id, folder, .gguf file or `builtin`.")] = "builtin",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    backend: Annotated[str, typer.Option(help="auto, cpu, cuda, ascend, kunlun or haiguang.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Prompt + output tokens of one request.")] = None,
    max_batch_size: Annotated[int | None, typer.Option(help="Requests that run at the same time.")] = None,
    allow_no_key: Annotated[
        bool, typer.Option("--allow-no-key", help="Listen beyond this machine, although it has no keys.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the engine's log.")] = False,
) -> None:
    """Serve one engine over HTTP."""
    if not allow_no_key:
        refuse_exposed(host, ENGINE_REMEDY, field="host")
    fields = {"max_model_len": max_model_len, "max_batch_size": max_batch_size}
    given = {name: value for name, value in fields.items() if value is not None}
    config = {"model_path": model, "backend_type": backend, **given}
    engine = LLMEngine(parse(LLMEngineConfig, config, what="engine configuration"))
    app = create_engine_app(lambda: engine)
    run_server(
        app, host, port, start=engine.start, announce=lambda url: typer.echo(f"Serving {model} at {url}", err=True)
    )


def main() -> None:
    """The `sage-engine` command."""
    run_command(serve_engine)


if __name__ == "__main__":
    main()
