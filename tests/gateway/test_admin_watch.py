"""`/admin/requests`, `/admin/events`, and the header `x-explain`."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import pytest

from asgi_client import LeavingClient
from fake_engine import FakeEngine
from sagellm_control_plane import ControlPlaneManager
from sagellm_control_plane.events import EventKind
from sagellm_gateway import create_app
from sagellm_gateway.app import Gateway
from waiting import until

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


@pytest.fixture
def app() -> Gateway:
    manager = ControlPlaneManager(routing_policy="round_robin")
    for name in ("one", "two"):
        manager.register_engine(FakeEngine(), engine_id=name, model="m")
    return create_app(manager, default_model="m")


# ---- requests -----------------------------------------------------------------------------------------


async def test_a_call_is_explained_by_its_id_and_its_requests_by_theirs(client: httpx.AsyncClient) -> None:
    await client.post(CHAT, json=HELLO, headers={"x-request-id": "ours"})
    await client.post(CHAT, json=HELLO, headers={"x-request-id": "ours-too"})
    found = (await client.get("/admin/requests/ours")).json()
    assert found["request_id"] == "ours"
    (trace,) = (entry for entry in found["requests"] if not entry["request_id"].startswith("ours-too"))
    assert trace["outcome"] == "length"
    assert trace["policy"] == "fifo"
    assert trace["router"] == "round_robin"
    assert [stay["engine_id"] for stay in trace["stays"]] == ["one"]
    assert trace["latency_s"] >= 0
    assert abs(trace["time"] - time.time()) < 60
    assert (await client.get(f"/admin/requests/{trace['request_id']}")).json()["requests"] == [trace | {"time": ANY}]


class _Any:
    def __eq__(self, other: object) -> bool:
        return True


ANY = _Any()


async def test_a_call_with_several_prompts_has_several_traces(client: httpx.AsyncClient) -> None:
    body = {"model": "m", "prompt": ["a", "b", "c"], "max_tokens": 2}
    await client.post("/v1/completions", json=body, headers={"x-request-id": "three"})
    traces = (await client.get("/admin/requests/three")).json()["requests"]
    assert [trace["stays"][0]["engine_id"] for trace in traces] == ["one", "two", "one"]


async def test_the_last_requests_newest_first(client: httpx.AsyncClient) -> None:
    for name in ("a", "b", "c"):
        await client.post(CHAT, json=HELLO, headers={"x-request-id": name})
    found = (await client.get("/admin/requests?limit=2")).json()["requests"]
    assert [entry["request_id"].split("-")[0] for entry in found] == ["c", "b"]
    assert len((await client.get("/admin/requests")).json()["requests"]) == 3
    for limit in ("0", "1001", "x", "-1", "1" * 30):
        assert (await client.get(f"/admin/requests?limit={limit}")).status_code == 400


async def test_what_is_not_known_and_who_may_not_ask(client: httpx.AsyncClient) -> None:
    answer = await client.get("/admin/requests/nothing")
    assert answer.status_code == 404
    assert "4096 are kept" in answer.json()["error"]["message"]
    for path in ("/admin/requests", "/admin/requests/x", "/admin/events"):
        assert (await client.get(path, headers={"x-forwarded-for": "10.0.0.1"})).status_code == 403


# ---- headers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_who_asks_is_told_in_headers(client: httpx.AsyncClient, stream: bool) -> None:
    answer = await client.post(CHAT, json={**HELLO, "stream": stream}, headers={"x-explain": "1"})
    assert answer.headers["x-explain-engine"] == "one"
    assert answer.headers["x-explain-router"] == "round_robin"
    assert answer.headers["x-explain-policy"] == "fifo"
    assert float(answer.headers["x-explain-queue-ms"]) >= 0
    assert int(answer.headers["x-explain-cached-tokens"]) == 0
    plain = await client.post(CHAT, json={**HELLO, "stream": stream})
    assert not any(name.startswith("x-explain") for name in plain.headers)


async def test_a_call_without_an_engine_has_nothing_to_explain(client: httpx.AsyncClient) -> None:
    for path in ("/v1/models", "/v1/models/none"):
        answer = await client.get(path, headers={"x-explain": "1"})
        assert not any(name.startswith("x-explain") for name in answer.headers)


# ---- events -------------------------------------------------------------------------------------------


def reader_of(app: Gateway, query: str = "", **headers: str) -> LeavingClient:
    reader = LeavingClient(app, "/admin/events", {})
    reader.scope["method"] = "GET"
    reader.scope["query_string"] = query.encode()
    given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    reader.scope["headers"] = [(b"host", b"localhost"), *given]
    return reader


def events_of(reader: LeavingClient) -> list[dict[str, Any]]:
    text = b"".join(message.get("body", b"") for message in reader.sent).decode()
    events = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line and not line.startswith(":"))
        if fields:
            data = json.loads(fields["data"])
            assert fields["id"] == str(data["sequence"])
            assert fields["event"] == data["kind"]
            events.append(data)
    return events


async def test_events_from_now_on_or_from_a_number_on(app: Gateway, client: httpx.AsyncClient) -> None:
    num_before = len(app.manager.events.recent())
    now, all_of_them = reader_of(app), reader_of(app, "since=0")
    again = reader_of(app, last_event_id=str(num_before - 1))
    await until(lambda: all(len(reader.sent) > 1 for reader in (now, all_of_them, again)))
    app.manager.events.publish(EventKind.SCALE, "two engines more", engine_id="three", count=2)
    await until(lambda: events_of(now) and events_of(again) and len(events_of(all_of_them)) > num_before)
    (event,) = events_of(now)
    assert event["message"] == "two engines more"
    assert event["details"] == {"count": 2}
    assert event["num_missed"] == 0
    assert abs(event["time"] - time.time()) < 60
    assert [entry["sequence"] for entry in events_of(again)] == [num_before]
    states = {entry["engine_id"] for entry in events_of(all_of_them) if entry["kind"] == "engine"}
    assert {"one", "two"} <= states
    for reader in (now, all_of_them, again):
        reader.leave()
        await reader.done


async def test_a_wrong_number_is_refused(client: httpx.AsyncClient) -> None:
    for since in ("-1", "x", "1" * 25):
        assert (await client.get(f"/admin/events?since={since}")).status_code == 400


async def test_events_end_when_the_server_is_about_to(
    app: Gateway, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sagellm_gateway.routes.admin_watch._LOOK_EVERY_S", 0.01)
    reader = reader_of(app)
    await until(lambda: reader.sent)
    app.drain()
    await asyncio.wait_for(reader.done, 60)
    assert reader.sent[-1]["more_body"] is False


async def test_stats_show_the_last_events_and_where_requests_go(client: httpx.AsyncClient) -> None:
    data = (await client.get("/admin/stats")).json()
    assert {"one", "two"} <= {event["engine_id"] for event in data["events"]}
    assert data["policies"] == {"scheduling": "fifo", "routing": "round_robin"}
    assert data["engines"][0]["load"] == 0
    assert data["engines"][0]["pid"] is None
    assert data["process"]["num_tasks"] > 0
