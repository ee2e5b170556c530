"""The gateway: the OpenAI API over a `ControlPlaneManager`, and the command `sage-gateway`.

`/v1/chat/completions`, `/v1/completions`, `/v1/models`, `/health`, `/metrics`, and a welcome at `/`. Every failure is
an OpenAI error body with the status of its code; a client that goes away aborts its request.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import typer
from fastapi import APIRouter, FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from fastapi.responses import Response as HttpResponse
from prometheus_client import CollectorRegistry

from sagellm_control_plane import BackendConfig, ControlPlaneManager, EngineConfig, EngineState
from sagellm_core.answers import Answers, answer_completion, read_prompts, stream_completion
from sagellm_core.command import run_command
from sagellm_core.engine_metrics import EngineCollector
from sagellm_core.http import (
    install_error_handlers,
    metrics_page,
    read_json_object,
    start_event_stream,
    while_connected,
)
from sagellm_core.serving import run_server
from sagellm_core.version import __version__
from sagellm_gateway.chat import answer_chat, refuse_unbuilt, stream_chat
from sagellm_protocol import NotFoundError, parse
from sagellm_protocol.openai import ChatCompletionRequest, CompletionRequest, ModelCard, ModelList
from sagellm_protocol.openai.render import to_body

router = APIRouter()


def create_app(manager: ControlPlaneManager, *, default_model: str | None = None) -> FastAPI:
    """An application that starts the manager's engines with the server and stops them at the end.

    `default_model` answers requests that name no model or the model `default`; without it any engine does.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with manager:
            yield

    app = FastAPI(title="sageLLM gateway", version=__version__, lifespan=lifespan)
    app.state.manager = manager
    app.state.default_model = default_model or "default"
    app.state.created = int(time.time())
    app.state.collector = EngineCollector()
    app.state.registry = CollectorRegistry()
    app.state.registry.register(app.state.collector)
    app.state.answers = Answers(manager.execute_request, manager.stream_request, app.state.collector)
    install_error_handlers(app)
    app.include_router(router)
    return app


# ---- routes -------------------------------------------------------------------------------------------


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(http: HttpRequest) -> HttpResponse:
    """Answer a conversation."""
    call = parse(ChatCompletionRequest, await _body(http), what="chat completion request")
    refuse_unbuilt(call)
    answers: Answers = http.app.state.answers
    if call.stream:
        return await start_event_stream(http, stream_chat(answers, call))
    return JSONResponse(to_body(await while_connected(http, answer_chat(answers, call))))


@router.post("/v1/completions", response_model=None)
async def completions(http: HttpRequest) -> HttpResponse:
    """Continue one or several prompts."""
    call = parse(CompletionRequest, await _body(http), what="completion request")
    answers: Answers = http.app.state.answers
    prompts = read_prompts(call)
    if call.stream:
        return await start_event_stream(http, stream_completion(answers, call, prompts))
    return JSONResponse(to_body(await while_connected(http, answer_completion(answers, call, prompts))))


@router.get("/v1/models", response_model=None)
async def models(http: HttpRequest) -> HttpResponse:
    """The models that can be asked for."""
    cards = _model_cards(http)
    return JSONResponse(ModelList(data=list(cards.values())).model_dump(mode="json", exclude_none=True))


@router.get("/v1/models/{model:path}", response_model=None)
async def model(http: HttpRequest, model: str) -> HttpResponse:
    """One model."""
    cards = _model_cards(http)
    if model not in cards:
        raise NotFoundError(f"no model {model!r}; there is {', '.join(cards) or 'none'}", field="model")
    return JSONResponse(cards[model].model_dump(mode="json", exclude_none=True))


@router.get("/health", response_model=None)
async def health(http: HttpRequest) -> HttpResponse:
    """200 while an engine takes requests, else 503; with the state of each."""
    manager = _manager(http)
    is_healthy = await manager.health_check()
    body = {"status": "ok" if is_healthy else "unavailable", **manager.get_status()}
    return JSONResponse(body, status_code=200 if is_healthy else 503)


@router.get("/metrics", response_model=None)
async def metrics(http: HttpRequest) -> HttpResponse:
    """Prometheus metrics of every engine."""
    http.app.state.collector.stats = await _manager(http).engine_stats()
    return metrics_page(http.app.state.registry)


@router.get("/", response_model=None)
async def welcome(http: HttpRequest) -> HttpResponse:
    """How to call this server."""
    base = str(http.base_url).rstrip("/")
    names = list(_model_cards(http))
    body = {"model": names[0] if names else "default", "messages": [{"role": "user", "content": "Hello"}]}
    return JSONResponse(
        {
            "name": "sageLLM gateway",
            "version": __version__,
            "models": names,
            "openai_base_url": f"{base}/v1",
            "documentation": f"{base}/docs",
            "example": {"url": f"{base}/v1/chat/completions", "body": body},
        }
    )


# ---- steps of the above -------------------------------------------------------------------------------


def _manager(http: HttpRequest) -> ControlPlaneManager:
    manager: ControlPlaneManager = http.app.state.manager
    return manager


async def _body(http: HttpRequest) -> dict[str, Any]:
    body = await read_json_object(http)
    if body.get("model") in (None, "default"):
        body["model"] = http.app.state.default_model
    return body


def _model_cards(http: HttpRequest) -> dict[str, ModelCard]:
    """One card a model: of the engines that can take requests for it, that with the longest context."""
    cards: dict[str, ModelCard] = {}
    for info in _manager(http).list_engines():
        if info.state in (EngineState.READY, EngineState.STARTING):
            known = cards[info.model].max_model_len or 0 if info.model in cards else 0
            length = max(known, info.max_model_len)
            cards[info.model] = ModelCard(
                id=info.model, root=info.model, created=http.app.state.created, max_model_len=length
            )
    return cards


# ---- the command --------------------------------------------------------------------------------------


def serve_gateway(
    model: Annotated[
        list[str] | None, typer.Option(help="Model id, folder, .gguf file or `builtin`; several give one engine each.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    backend: Annotated[str, typer.Option(help="auto, cpu, cuda, ascend, kunlun or haiguang.")] = "auto",
    scheduling_policy: Annotated[
        str, typer.Option(help="fifo, priority, slo_aware, cost_optimized or adaptive.")
    ] = "adaptive",
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the engines' log.")] = False,
) -> None:
    """Serve models over the OpenAI API."""
    names = model or ["builtin"]
    manager = ControlPlaneManager(
        backend_config=BackendConfig(kind=backend),
        engine_configs=[EngineConfig(model=name) for name in names],
        scheduling_policy=scheduling_policy,
    )

    def announce(url: str) -> None:
        typer.echo(f"Serving {', '.join(names)} at {url}/v1", err=True)

    run_server(create_app(manager, default_model=names[0]), host, port, start=manager.start, announce=announce)


def main() -> None:
    """The `sage-gateway` command."""
    run_command(serve_gateway)


if __name__ == "__main__":
    main()
