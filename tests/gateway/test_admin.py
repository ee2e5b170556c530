"""`/admin`: figures of the moment, engines that come and go, and who may."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

import httpx
import pytest
from fastapi import Request as HttpRequest

from asgi_client import LeavingClient, client_of
from fake_engine import FakeEngine
from sagellm_control_plane import ControlPlaneManager, EngineConfig, EngineState
from sagellm_gateway import create_app
from sagellm_gateway.admin_access import require_admin
from sagellm_gateway.app import Gateway
from sagellm_gateway.context import CALLER, Caller
from sagellm_gateway.keys import key_of
from sagellm_gateway.live_stats import LiveStats
from sagellm_gateway.routes.admin import config
from sagellm_gateway.sessions import SessionSettings
from sagellm_gateway.settings import AuthSettings, GatewaySettings
from sagellm_protocol import NotFoundError, PermissionDeniedError, Request, UnavailableError
from waiting import until

CHAT = "/v1/chat/completions"
WAIT = {"messages": [{"role": "user", "content": "wait"}]}
KEY = "sk-sage-0123456789abcdef0123"


class Made(list[FakeEngine]):
    """The engines that a manager has made."""

    def make(self, config: Any) -> FakeEngine:
        self.append(FakeEngine(config))
        return self[-1]


@pytest.fixture
def made() -> Made:
    return Made()


@pytest.fixture
def app(made: Made) -> Gateway:
    manager = ControlPlaneManager(engine_configs=[EngineConfig(model="m")], make_engine=made.make)
    return create_app(manager, default_model="m")


def hello(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, **fields}


# ---- figures ------------------------------------------------------------------------------------------


async def test_stats_tell_what_happened(client: httpx.AsyncClient) -> None:
    assert (await client.get("/admin/stats")).json()["ttft_ms"] == {"p50": None, "p90": None, "p99": None}
    await client.post(CHAT, json=hello())
    await client.post(CHAT, json=hello(stream=True))
    await client.post(CHAT, json={"messages": [{"role": "user", "content": "fail"}]})
    data = (await client.get("/admin/stats")).json()
    assert data["totals"] == {"requests": 3, "failed": 1, "prompt_tokens": 3, "output_tokens": 6}
    assert 2.0 <= data["ttft_ms"]["p50"] <= data["ttft_ms"]["p99"] < 1000.0
    assert data["tpot_ms"]["p50"] == 1.0
    assert data["queue_depth"] == 0
    assert data["models"] == ["m"]
    engine = data["engines"][0]
    assert (engine["engine_id"], engine["state"], engine["num_blocks"]) == ("engine-0", "ready", 8)
    assert engine["error"] is None


async def test_stats_show_what_runs_and_waits(client: httpx.AsyncClient, app: Gateway, made: Made) -> None:
    caller = LeavingClient(app, CHAT, WAIT)
    await until(lambda: made[0].running)
    data = (await client.get("/admin/stats")).json()
    assert data["engines"][0]["num_running"] == 1
    made[0].gate.set()
    await caller.done


async def test_percentiles_are_nearest_ranks_and_old_requests_leave_the_window() -> None:
    now = 0.0
    manager = ControlPlaneManager()
    manager.register_engine(FakeEngine(), model="m")
    live = LiveStats(manager, lambda: now)
    async with manager:
        answer = await manager.execute_request(prompt="hi", model="m", max_tokens=1)
        request = Request(prompt="hi")
        for ttft_ms in range(1, 101):
            metrics = answer.metrics.model_copy(update={"ttft_ms": float(ttft_ms)})
            live.observe(request, answer.model_copy(update={"metrics": metrics}), 0.001)
        assert (await live.snapshot())["ttft_ms"] == {"p50": 51.0, "p90": 91.0, "p99": 100.0}
        now = 301.0
        data = await live.snapshot()
        assert data["ttft_ms"]["p50"] is None
        assert data["totals"]["requests"] == 100


async def test_rates_count_tokens_of_requests_that_still_run() -> None:
    now, tokens = 0.0, 0
    engine = FakeEngine()
    manager = ControlPlaneManager()
    manager.register_engine(engine, model="m")

    async def stats() -> Any:
        return dataclasses.replace(await FakeEngine.stats(engine), num_output_tokens=tokens)

    engine.stats = stats  # type: ignore[method-assign]
    live = LiveStats(manager, lambda: now)
    async with manager:
        await live.snapshot()
        now, tokens = 2.0, 50
        assert (await live.snapshot())["rates"]["output_tokens_per_s"] == 25.0
        now, tokens = 3.0, 10  # the engine was started again and has sampled 10 since
        assert (await live.snapshot())["rates"]["output_tokens_per_s"] == 20.0
        now = 60.0
        assert (await live.snapshot())["rates"]["output_tokens_per_s"] == 0.0


async def test_the_stream_of_stats_goes_on_until_its_reader_leaves(app: Gateway) -> None:
    async with client_of(app):
        reader = LeavingClient(app, "/admin/stats/stream", {})
        reader.scope["method"] = "GET"
        reader.scope["headers"] = [(b"host", b"localhost")]
        await until(lambda: sum(b"data: " in message.get("body", b"") for message in reader.sent) >= 2)
        first = next(message["body"] for message in reader.sent if message.get("body"))
        assert json.loads(first.removeprefix(b"data: "))["engines"][0]["engine_id"] == "engine-0"
        reader.leave()
        await reader.done


async def test_config_tells_engines_and_no_secret(made: Made) -> None:
    sessions = SessionSettings(store="redis", url="redis://me:secret@127.0.0.1:6379/0")
    auth = AuthSettings(keys=[key_of(KEY, name="root", admin=True)])
    settings = GatewaySettings(auth=auth, sessions=sessions)
    manager = ControlPlaneManager(engine_configs=[EngineConfig(model="m")], make_engine=made.make)
    answer = await config(a_call(create_app(manager, settings=settings), Caller("r", "t", "root", is_admin=True)))
    data = json.loads(answer.body)
    assert data["models"] == ["m"]
    assert data["engines"]["engine-0"]["max_batch_size"] == 32
    assert data["settings"]["auth"]["keys"] == ["root"]
    assert data["settings"]["sessions"]["url"] == "127.0.0.1:6379/0"
    assert b"sha256" not in answer.body
    assert b"secret" not in answer.body


def a_call(app: Gateway, caller: Caller) -> HttpRequest:
    return HttpRequest({"type": "http", "app": app, "headers": [], "client": ("127.0.0.1", 1), CALLER: caller})


# ---- engines ------------------------------------------------------------------------------------------


async def test_an_engine_is_added_and_taken_away(client: httpx.AsyncClient, app: Gateway, made: Made) -> None:
    answer = await client.post("/admin/engines", json={"model": "m", "engine_id": "second"})
    assert answer.status_code == 202, answer.text
    assert answer.json()["engine_id"] == "second"
    await until(lambda: app.manager.get_engine("second").state is EngineState.READY)
    data = (await client.get("/admin/engines")).json()
    assert [entry["engine_id"] for entry in data["engines"]] == ["engine-0", "second"]
    assert data["models"] == ["m"]
    assert (await client.delete("/admin/engines/second")).status_code == 202
    await until(lambda: len(app.manager.list_engines()) == 1)
    assert not made[1].is_running
    assert (await client.get("/admin/engines/second")).status_code == 404


@pytest.mark.parametrize("model", ["/etc/passwd", "owner/name", "builtin"])
async def test_only_configured_models_are_started(client: httpx.AsyncClient, made: Made, model: str) -> None:
    answer = await client.post("/admin/engines", json={"model": model})
    assert answer.status_code == 404
    assert "configured: m" in answer.json()["error"]["message"]
    assert len(made) == 1


@pytest.mark.parametrize("extra", [{"model_path": "/tmp"}, {"options": {}}, {"engine_id": "../x y"}])
async def test_a_new_engine_takes_no_further_fields(client: httpx.AsyncClient, extra: dict[str, Any]) -> None:
    assert (await client.post("/admin/engines", json={"model": "m", **extra})).status_code == 400


async def test_a_drained_engine_ends_its_requests_and_comes_back(
    client: httpx.AsyncClient, app: Gateway, made: Made
) -> None:
    caller = LeavingClient(app, CHAT, WAIT)
    await until(lambda: made[0].running)
    assert (await client.post("/admin/engines/engine-0/drain")).json()["state"] == "draining"
    refused = await client.post(CHAT, json=hello())
    assert refused.status_code == 503
    assert "take no requests now" in refused.json()["error"]["message"]
    assert made[0].running
    made[0].gate.set()
    await caller.done
    assert caller.sent[0]["status"] == 200
    assert (await client.post("/admin/engines/engine-0/start")).json()["state"] == "ready"
    assert (await client.post(CHAT, json=hello())).status_code == 200
    assert made[0].num_starts == 1


async def test_a_stopped_engine_stays_stopped_until_it_is_started(
    client: httpx.AsyncClient, app: Gateway, made: Made
) -> None:
    caller = LeavingClient(app, CHAT, WAIT)
    await until(lambda: made[0].running)
    assert (await client.post("/admin/engines/engine-0/stop")).json()["state"] == "stopped"
    await caller.done
    assert not made[0].is_running
    assert (await client.post(CHAT, json=hello())).status_code == 503
    assert not made[0].is_running
    assert (await client.post("/admin/engines/engine-0/start")).status_code == 202
    await until(lambda: app.manager.get_engine("engine-0").state is EngineState.READY)
    assert (await client.post(CHAT, json=hello())).status_code == 200


async def test_an_engine_on_its_way_out_is_not_started_again(
    client: httpx.AsyncClient, app: Gateway, made: Made
) -> None:
    caller = LeavingClient(app, CHAT, WAIT)
    await until(lambda: made[0].running)
    await client.delete("/admin/engines/engine-0")
    answer = await client.post("/admin/engines/engine-0/start")
    assert answer.status_code == 503
    assert "taken away" in answer.json()["error"]["message"]
    made[0].gate.set()
    await caller.done
    await until(lambda: not app.manager.list_engines())


async def test_a_model_is_replaced_while_it_streams(client: httpx.AsyncClient, app: Gateway, made: Made) -> None:
    caller = LeavingClient(app, CHAT, {**WAIT, "stream": True, "max_tokens": 3})
    await until(lambda: made[0].running)
    call = {"options": {"max_batch_size": 7, "max_model_len": 99}}
    replacing = asyncio.ensure_future(client.post("/admin/models/m/replace", json=call))
    await until(lambda: len(made) == 2 and app.manager.get_engine("engine-0").state is EngineState.DRAINING)
    assert (await client.post(CHAT, json=hello())).status_code == 200
    assert len(made[1].requests) == 1, "by the model's name, at the new engine"
    again = await client.post("/admin/models/m/replace", json={})
    assert again.status_code == 503
    assert "being replaced" in again.json()["error"]["message"]
    assert not replacing.done()
    made[0].gate.set()
    await caller.done
    body = b"".join(message.get("body", b"") for message in caller.sent)
    assert b"w2" in body
    assert body.endswith(b"data: [DONE]\n\n")
    answer = await replacing
    assert (answer.status_code, answer.json()) == (200, {"model": "m", "engines": ["engine-0.2"]})
    assert not made[0].is_running
    (entry,) = (await client.get("/admin/config")).json()["engines"].values()
    assert (entry["max_batch_size"], entry["max_model_len"]) == (7, 99)
    assert app.manager._pool.get("engine-0.2").instance.max_concurrent_requests == 7
    await client.post("/admin/engines", json={"model": "m"})
    assert made[2].config.max_batch_size == 7, "further engines are made of it"


async def test_a_replacement_that_does_not_start_changes_nothing(
    client: httpx.AsyncClient, app: Gateway, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine, "start", _refuse_to_start)
    answer = await client.post("/admin/models/m/replace", json={"options": {"max_batch_size": 7}})
    assert answer.status_code == 503
    assert "no memory for these weights" in answer.json()["error"]["message"]
    assert [info.engine_id for info in app.manager.list_engines()] == ["engine-0"]
    assert (await client.post(CHAT, json=hello())).status_code == 200
    assert app.manager.allowed_models["m"].options == {}


async def _refuse_to_start(_: FakeEngine) -> None:
    raise UnavailableError("no memory for these weights")


@pytest.mark.parametrize(
    ("model", "body", "status", "message"),
    [
        ("owner/name", {}, 404, "configured: m"),
        ("m", {"model": "/etc/passwd"}, 404, "configured: m"),
        ("m", {"options": {"model_path": "/tmp"}}, 400, "options.model_path"),
        ("m", {"options": {"max_batch_size": 0}}, 400, "max_batch_size"),
        ("m", {"options": {"nothing": 1}}, 400, "nothing"),
    ],
)
async def test_what_a_model_is_not_replaced_by(
    client: httpx.AsyncClient, made: Made, model: str, body: Any, status: int, message: str
) -> None:
    answer = await client.post(f"/admin/models/{model}/replace", json=body)
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]["message"]
    assert len(made) == 1


async def test_what_is_held_stays_held_when_it_is_replaced(client: httpx.AsyncClient, made: Made) -> None:
    await client.post("/admin/engines/engine-0/drain")
    assert (await client.post("/admin/models/m/replace", json={})).status_code == 200
    assert (await client.post(CHAT, json=hello())).status_code == 503
    assert made[1].num_starts == 0
    assert (await client.post("/admin/engines/engine-0.2/start")).status_code == 202
    await until(lambda: made[1].is_running)


async def test_the_name_stays_where_another_configuration_is_taken(made: Made) -> None:
    manager = ControlPlaneManager(engine_configs=[EngineConfig(model="m")], make_engine=made.make)
    async with manager:
        with pytest.raises(NotFoundError, match="no engine serves the model 'x'"):
            await manager.replace_model("x", EngineConfig(model="v2"))
        assert await manager.replace_model("m", EngineConfig(model="v2")) == ["engine-0.2"]
        assert made[-1].config.model_path == "v2"
        assert (await manager.execute_request(prompt="hi", model="m", max_tokens=1)).engine_id == "engine-0.2"


async def test_the_cache_is_reset(client: httpx.AsyncClient) -> None:
    assert (await client.post("/admin/cache/reset")).json() == {"reset": {"engine-0": True}}


# ---- who may ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "attacker.example"},
        {"x-forwarded-for": "203.0.113.9"},
        {"forwarded": "for=203.0.113.9"},
        {"sec-fetch-site": "cross-site"},
    ],
)
async def test_without_keys_only_this_machine_may(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    assert (await client.get("/admin/engines")).status_code == 200
    assert (await client.get("/admin/engines", headers=headers)).status_code == 403


async def test_without_keys_no_other_machine_may(app: Gateway) -> None:
    async with client_of(app):
        transport = httpx.ASGITransport(app=app, client=("203.0.113.9", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for method, path in (("GET", "stats"), ("GET", "config"), ("DELETE", "engines/engine-0")):
                assert (await client.request(method, f"/admin/{path}")).status_code == 403


def test_with_keys_an_admin_key_is_needed() -> None:
    keys = [key_of(KEY, name="root", admin=True)]
    app = create_app(ControlPlaneManager(), settings=GatewaySettings(auth=AuthSettings(keys=keys)))
    require_admin(a_call(app, Caller("r", "t", "root", is_admin=True)))
    for caller in (Caller("r", "t", "ada"), Caller("r", "t")):
        with pytest.raises(PermissionDeniedError, match="admin rights"):
            require_admin(a_call(app, caller))
