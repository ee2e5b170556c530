"""`/admin`: the figures of this moment, and engines that come and go. For operators, see `admin_access`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response as HttpResponse
from pydantic import Field

from sagellm_core.http import read_json_object, start_event_stream
from sagellm_core.version import __version__
from sagellm_gateway.admin_access import require_admin
from sagellm_gateway.context import gateway_of
from sagellm_gateway.documents import EVENTS, described
from sagellm_gateway.live_stats import engine_entry
from sagellm_gateway.settings import GatewaySettings
from sagellm_protocol import InvalidArgumentError, NotFoundError, ResourceExhaustedError, parse
from sagellm_protocol.model import EdgeModel, Remedy

if TYPE_CHECKING:
    from sagellm_control_plane import ControlPlaneManager
    from sagellm_core.config import EngineConfig
    from sagellm_gateway.app import Gateway

MAX_ENGINES = 64

_STREAM_EVERY_S = 1.0
# What an engine loads and what it may run; its name is the control plane's.
_OPERATORS_OPTIONS = ("model_path", "revision", "packed_cache_dir", "trust_remote_code", "engine_id")

router = APIRouter(prefix="/admin", tags=["Administration"])

# It stands in paths.
EngineName = Annotated[
    str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$"), Remedy("use 1 to 64 letters, digits, underscores, dots or dashes")
]


class NewEngine(EdgeModel):
    """The body of `POST /admin/engines`: a model that the operator has configured, never a path."""

    model: str = Field(min_length=1, max_length=512)
    engine_id: EngineName | None = None


class Replacement(EdgeModel):
    """The body of `POST /admin/models/{model}/replace`: again what the operator has configured, and what differs."""

    model: str | None = Field(
        default=None, min_length=1, max_length=512, description="whose configuration is taken; None: its own"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="of the engine, over those configured")


# ---- figures ------------------------------------------------------------------------------------------


@router.get("/stats", response_model=None)
@described()
async def stats(http: HttpRequest) -> HttpResponse:
    """Engines, queue, rates and latencies of this moment."""
    require_admin(http)
    return _json(await gateway_of(http).live_stats.snapshot())


@router.get("/stats/stream", response_model=None)
@described(media=EVENTS)
async def stats_stream(http: HttpRequest) -> HttpResponse:
    """The same as server-sent events, one a second."""
    require_admin(http)
    return await start_event_stream(http, _snapshots(gateway_of(http)))


async def _snapshots(gateway: Gateway) -> AsyncGenerator[bytes, None]:
    while not gateway.is_draining:
        yield msgspec.json.encode(await gateway.live_stats.snapshot())
        await asyncio.sleep(_STREAM_EVERY_S)


@router.get("/config", response_model=None)
@described()
async def config(http: HttpRequest) -> HttpResponse:
    """What this server runs with; no secrets."""
    require_admin(http)
    gateway = gateway_of(http)
    manager = gateway.manager
    return _json(
        {
            "version": __version__,
            "default_model": gateway.default_model,
            "models": sorted(manager.allowed_models),
            "engines": {
                info.engine_id: manager.get_engine_config(info.engine_id).model_dump(mode="json")
                for info in manager.list_engines()
            },
            "settings": _without_secrets(gateway.settings),
        }
    )


# ---- engines ------------------------------------------------------------------------------------------


@router.get("/engines", response_model=None)
@described()
async def engines(http: HttpRequest) -> HttpResponse:
    """All engines, and the models that `POST` takes."""
    require_admin(http)
    manager = gateway_of(http).manager
    figures = await manager.engine_stats()
    entries = [engine_entry(manager, info, figures.get(info.engine_id)) for info in manager.list_engines()]
    return _json({"engines": entries, "models": sorted(manager.allowed_models)})


@router.post("/engines", response_model=None)
@described(body=NewEngine, status=202, fails=(404,))
async def add_engine(http: HttpRequest) -> HttpResponse:
    """Begin to start an engine for a configured model: 202, and its state says how far it is."""
    require_admin(http)
    manager = gateway_of(http).manager
    call = parse(NewEngine, await read_json_object(http), what="new engine")
    configured = _configured(manager, call.model)
    if len(manager.list_engines()) >= MAX_ENGINES:
        raise ResourceExhaustedError(f"there are {MAX_ENGINES} engines already; delete one first", retryable=False)
    engine_id = manager.register_config(configured.model_copy(update={"engine_id": call.engine_id}))
    manager.start_engine(engine_id)
    return await _engine(http, engine_id, status=202)


@router.get("/engines/{engine_id}", response_model=None)
@described(fails=(404,))
async def engine(http: HttpRequest, engine_id: str) -> HttpResponse:
    """One engine."""
    require_admin(http)
    return await _engine(http, engine_id)


@router.post("/engines/{engine_id}/start", response_model=None)
@described(status=202, fails=(404, 503))
async def start_engine(http: HttpRequest, engine_id: str) -> HttpResponse:
    """Begin to load a stopped engine, or let a drained one take requests again."""
    require_admin(http)
    gateway_of(http).manager.start_engine(engine_id)
    return await _engine(http, engine_id, status=202)


@router.post("/engines/{engine_id}/drain", response_model=None)
@described(status=202, fails=(404, 503))
async def drain_engine(http: HttpRequest, engine_id: str) -> HttpResponse:
    """Send the engine no more requests; those in flight end, the model stays loaded."""
    require_admin(http)
    gateway_of(http).manager.drain_engine(engine_id)
    return await _engine(http, engine_id, status=202)


@router.post("/engines/{engine_id}/stop", response_model=None)
@described(fails=(404, 503))
async def stop_engine(http: HttpRequest, engine_id: str) -> HttpResponse:
    """End the engine's requests and free its model; it stays stopped until it is started."""
    require_admin(http)
    await gateway_of(http).manager.stop_engine(engine_id)
    return await _engine(http, engine_id)


@router.delete("/engines/{engine_id}", response_model=None)
@described(status=202, fails=(404, 503))
async def delete_engine(http: HttpRequest, engine_id: str) -> HttpResponse:
    """Let the requests in flight end, then take the engine away: 202 while that goes on."""
    require_admin(http)
    gateway = gateway_of(http)
    gateway.manager.get_engine(engine_id)
    gateway.background(gateway.manager.unregister_engine(engine_id))
    await asyncio.sleep(0)
    return _json({"engine_id": engine_id, "deleted": True}, status=202)


@router.post("/models/{model:path}/replace", response_model=None)
@described(body=Replacement, fails=(404,))
async def replace_model(http: HttpRequest, model: str) -> HttpResponse:
    """Put new engines in the place of a model's old ones, one after the other; answers when the last has left."""
    require_admin(http)
    manager = gateway_of(http).manager
    call = parse(Replacement, await read_json_object(http), what="replacement")
    refused = next((name for name in _OPERATORS_OPTIONS if name in call.options), None)
    if refused is not None:
        raise InvalidArgumentError(
            f"options.{refused} is the operator's alone; configure it and name its model", field=f"options.{refused}"
        )
    config = _configured(manager, call.model or model)
    options = {**config.options, **call.options}
    engine_ids = await manager.replace_model(model, config.model_copy(update={"options": options}))
    return _json({"model": model, "engines": engine_ids})


@router.post("/cache/reset", response_model=None)
@described()
async def reset_cache(http: HttpRequest) -> HttpResponse:
    """Forget the cached prefixes of all engines; false for an engine whose requests hold blocks."""
    require_admin(http)
    return _json({"reset": await gateway_of(http).manager.reset_prefix_cache()})


def _configured(manager: ControlPlaneManager, model: str) -> EngineConfig:
    allowed = manager.allowed_models
    if model not in allowed:
        known = ", ".join(sorted(allowed)) or "none"
        raise NotFoundError(f"no model {model!r} is configured; configured: {known}", field="model")
    return allowed[model]


async def _engine(http: HttpRequest, engine_id: str, *, status: int = 200) -> HttpResponse:
    manager = gateway_of(http).manager
    info = manager.get_engine(engine_id)
    figures = await manager.engine_stats()
    return _json(engine_entry(manager, info, figures.get(engine_id)), status=status)


def _without_secrets(settings: GatewaySettings) -> dict[str, Any]:
    """The settings with the names of keys, and nothing else of them; addresses without what may be a password."""
    body = settings.model_dump(mode="json")
    body["auth"]["keys"] = [key.name for key in settings.auth.keys]
    for section, name in (("sessions", "url"), ("tracing", "endpoint")):
        if body[section][name] is not None:
            body[section][name] = body[section][name].rsplit("@", 1)[-1]
    return body


def _json(value: Any, *, status: int = 200) -> HttpResponse:
    return HttpResponse(msgspec.json.encode(value), status_code=status, media_type="application/json")
