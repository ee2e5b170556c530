"""How the gateway is: `/health`, `/metrics`, and a welcome at `/`."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from fastapi.responses import Response as HttpResponse

from sagellm_core.http import metrics_page
from sagellm_core.version import __version__
from sagellm_gateway.context import gateway_of
from sagellm_gateway.documents import TEXT, described
from sagellm_gateway.routes.models import model_cards

router = APIRouter(tags=["sageLLM"])


@router.get("/health", response_model=None)
@described(fails=(503,))
async def health(http: HttpRequest) -> HttpResponse:
    """200 while an engine takes requests, else 503; with the state of each."""
    manager = gateway_of(http).manager
    is_healthy = await manager.health_check()
    body = {"status": "ok" if is_healthy else "unavailable", **manager.get_status()}
    return JSONResponse(body, status_code=200 if is_healthy else 503)


@router.get("/ready", response_model=None)
@described(fails=(503,))
async def ready(http: HttpRequest) -> HttpResponse:
    """200 while new requests are taken, else 503: no engine takes any, or the server is shutting down."""
    gateway = gateway_of(http)
    if gateway.is_leaving:
        return JSONResponse({"status": "draining"}, status_code=503)
    is_ready = await gateway.manager.health_check()
    return JSONResponse({"status": "ready" if is_ready else "unavailable"}, status_code=200 if is_ready else 503)


@router.get("/version", response_model=None)
@described()
async def version(_: HttpRequest) -> HttpResponse:
    """The version of this server."""
    return JSONResponse({"version": __version__})


@router.get("/metrics", response_model=None)
@described(media=TEXT)
async def metrics(http: HttpRequest) -> HttpResponse:
    """Prometheus metrics of the engines and of the gateway itself; docs/metrics.md says what each means."""
    gateway = gateway_of(http)
    gateway.collector.stats = await gateway.manager.engine_stats()
    gateway.collector.num_queued = gateway.manager.num_waiting_by_model()
    return metrics_page(gateway.registry)


async def welcome(http: HttpRequest) -> HttpResponse:
    """How to call this server: what `/` says to programs."""
    base = str(http.base_url).rstrip("/")
    names = list(model_cards(gateway_of(http)))
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
