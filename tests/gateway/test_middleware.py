"""What calls pass on their way: context, keys, origins, rates, log, CORS."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from asgi_client import LeavingClient, client_of
from fake_engine import FakeEngine
from sagellm_control_plane import ControlPlaneManager
from sagellm_gateway import create_app
from sagellm_gateway.app import Gateway
from sagellm_gateway.keys import RateLimits, new_key
from sagellm_gateway.middleware.auth import check_exposure
from sagellm_gateway.settings import GatewaySettings
from sagellm_protocol import InvalidArgumentError, RequestPriority
from waiting import until

CHAT = "/v1/chat/completions"
KEY, ADA = new_key("ada")
ADMIN_KEY, ADMIN = new_key("boss", admin=True)
TRACE = "0af7651916cd43dd8448eb211c80319c"


def body(text: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 3, **fields}


class Site:
    """A gateway over one fake engine, and a client of it."""

    def __init__(self, app: Gateway, engine: FakeEngine, client: httpx.AsyncClient) -> None:
        self.app, self.engine, self.client = app, engine, client

    async def post(self, key: str | None = None, /, **fields: Any) -> httpx.Response:
        headers = fields.pop("headers", {}) | ({} if key is None else {"authorization": f"Bearer {key}"})
        return await self.client.post(CHAT, json=body(**fields), headers=headers)


@asynccontextmanager
async def site(**sections: Any) -> AsyncIterator[Site]:
    engine = FakeEngine(max_model_len=64)
    manager = ControlPlaneManager()
    manager.register_engine(engine, engine_id="fake", model="m")
    app = create_app(manager, default_model="m", settings=GatewaySettings.model_validate(sections))
    async with client_of(app) as client:
        yield Site(app, engine, client)


# ---- context ------------------------------------------------------------------------------------------


async def test_headers_reach_the_engine_and_the_request_id_comes_back() -> None:
    headers = {
        "x-request-id": "mine-1",
        "traceparent": f"00-{TRACE}-b7ad6b7169203331-01",
        "x-priority": "High",
        "x-slo-ttft-ms": "250",
        "x-slo-tpot-ms": "4e1",
    }
    async with site() as here:
        answer = await here.post(headers=headers)
        assert answer.headers["x-request-id"] == "mine-1"
        request = here.engine.requests[0]
        assert (request.request_id.startswith("mine-1"), request.trace_id) == (True, TRACE)
        assert request.priority is RequestPriority.HIGH
        assert request.slo is not None
        assert (request.slo.ttft_ms, request.slo.tpot_ms, request.slo.deadline_ms) == (250, 40, 600_000)


async def test_without_headers_there_are_fresh_ids_and_the_gateways_deadline() -> None:
    async with site(limits={"request_timeout_s": 5}) as here:
        first, second = await here.post(), await here.post()
        assert first.headers["x-request-id"] != second.headers["x-request-id"]
        assert here.engine.requests[0].request_id.startswith(first.headers["x-request-id"])
        assert here.engine.requests[0].slo is not None
        assert here.engine.requests[0].slo.deadline_ms == 5000
        await here.post(headers={"x-slo-deadline-ms": "999999"})
        assert here.engine.requests[2].slo is not None
        assert here.engine.requests[2].slo.deadline_ms == 5000
        missing = await here.client.get("/no/such")
        assert missing.headers["x-request-id"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-request-id", "a b"),
        ("x-request-id", "x" * 129),
        ("x-request-id", ""),
        ("x-priority", "urgent"),
        ("x-slo-ttft-ms", "soon"),
        ("x-slo-tpot-ms", "0"),
        ("x-slo-deadline-ms", "-1"),
        ("x-slo-deadline-ms", "nan"),
        ("x-slo-deadline-ms", "inf"),
    ],
)
async def test_a_bad_header_is_named(name: str, value: str) -> None:
    async with site() as here:
        answer = await here.post(headers={name: value})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["param"], f"the header {name} must be" in error["message"]) == (name, True)
        assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    "value",
    [
        f"00-{TRACE}-b7ad6b7169203331",
        f"00-{'0' * 32}-b7ad6b7169203331-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-b7ad6b7169203331-01",
        f"ff-{TRACE}-b7ad6b7169203331-01",
        f"00-{TRACE}-b7ad6b7169203331-01-more",
        "x",
    ],
)
async def test_a_trace_that_cannot_be_read_is_begun_anew(value: str) -> None:
    async with site() as here:
        assert (await here.post(headers={"traceparent": value})).status_code == 200
        assert here.engine.requests[0].trace_id.lower() != TRACE


async def test_a_later_version_of_the_trace_header_is_read() -> None:
    async with site() as here:
        await here.post(headers={"traceparent": f"01-{TRACE}-b7ad6b7169203331-01-more"})
        assert here.engine.requests[0].trace_id == TRACE


async def test_a_request_that_takes_too_long_is_ended() -> None:
    async with site(limits={"request_timeout_s": 0.02}) as here:
        answer = await here.post(text="wait")
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        await until(lambda: not here.engine.running)


async def test_bodies_have_the_configured_limits() -> None:
    async with site(limits={"max_body_bytes": 1024, "max_json_depth": 8}) as here:
        assert (await here.post(text="x" * 500)).status_code == 200
        assert (await here.post(text="x" * 1000)).status_code == 413
        deep: Any = 1
        for _ in range(8):
            deep = [deep]
        answer = await here.post(metadata={"deep": deep})
        assert answer.status_code == 400
        assert "nested deeper than 8" in answer.json()["error"]["message"]


# ---- keys and origins ---------------------------------------------------------------------------------


async def test_a_key_is_needed_and_known_by_its_hash() -> None:
    async with site(auth={"keys": [ADA]}) as here:
        for headers in ({}, {"authorization": "Basic abc"}):
            answer = await here.client.post(CHAT, json=body(), headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["type"] == "authentication_error"
            assert "Authorization: Bearer KEY" in answer.json()["error"]["message"]
        for wrong in (KEY[:-1], KEY + "x", ADA.hash, ADMIN_KEY):
            assert (await here.post(wrong)).status_code == 401
        assert (await here.post(KEY)).status_code == 200
        assert (await here.client.post(CHAT, json=body(), headers={"x-api-key": KEY})).status_code == 200
        assert (await here.client.post(CHAT, json=body(), headers={"authorization": f"bearer  {KEY} "})).is_success
        assert not here.engine.cancelled


async def test_what_is_open_without_a_key() -> None:
    async with site(auth={"keys": [ADA]}) as here:
        for path in ("/", "/health", "/ready", "/version", "/openapi.json", "/docs"):
            assert (await here.client.get(path)).status_code == 200, path
        for path in ("/metrics", "/v1/models", "/admin/stats", "/no/such", "/health/x", "/v1/models/..%2f..%2fhealth"):
            assert (await here.client.get(path)).status_code == 401, path
    async with site(auth={"keys": [ADA], "open_metrics": True}) as here:
        assert (await here.client.get("/metrics")).status_code == 200


async def test_errors_before_a_route_have_the_form_of_its_api() -> None:
    async with site(auth={"keys": [ADA]}) as here:
        anthropic = await here.client.post("/v1/messages", json={})
        assert anthropic.json()["error"]["type"] == "authentication_error"
        assert anthropic.json()["type"] == "error"
        models = await here.client.get("/v1/models", headers={"anthropic-version": "2023-06-01"})
        assert models.json()["error"]["type"] == "authentication_error"
        assert models.json()["type"] == "error"
        assert models.headers["request-id"] == models.headers["x-request-id"]
        assert isinstance((await here.client.post("/api/chat", json={})).json()["error"], str)


async def test_administration_needs_an_admin_key() -> None:
    async with site(auth={"keys": [ADA, ADMIN]}) as here:
        for key, status in ((KEY, 403), (ADMIN_KEY, 200)):
            answer = await here.client.get("/admin/stats", headers={"authorization": f"Bearer {key}"})
            assert answer.status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost:8000"}, 200),
        ({"host": "127.0.0.1:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "[::1]"}, 200),
        ({"host": "192.168.1.9"}, 200),
        ({"host": "llm.home:8000"}, 200),
        ({"host": "evil.example:8000"}, 403),
        ({"host": "a" * 300 + ".localhost"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "localhost:8000", "origin": "http://localhost:8000"}, 200),
        ({"host": "localhost:8000", "origin": "http://localhost:9999"}, 403),
        ({"host": "localhost:8000", "origin": "https://evil.example"}, 403),
        ({"host": "localhost:8000", "origin": "null"}, 403),
        ({"host": "localhost:8000", "origin": "https://good.example"}, 200),
        ({"host": "localhost:8000", "origin": "vscode-file://vscode-app"}, 200),
    ],
)
async def test_without_keys_other_sites_pages_are_kept_out(headers: dict[str, str], status: int) -> None:
    sections = {"server": {"allowed_hosts": ["llm.home"]}, "cors": {"allow_origins": ["https://good.example"]}}
    async with site(**sections) as here:
        assert (await here.post(headers=headers)).status_code == status


async def test_with_keys_the_name_does_not_matter() -> None:
    async with site(auth={"keys": [ADA]}) as here:
        assert (await here.post(KEY, headers={"host": "llm.example"})).status_code == 200


@pytest.mark.parametrize(
    ("sections", "is_refused"),
    [
        ({}, False),
        ({"server": {"host": "::1"}}, False),
        ({"server": {"host": "0.0.0.0"}}, True),
        ({"server": {"host": "my.host"}}, True),
        ({"server": {"host": "0.0.0.0"}, "auth": {"keys": [ADA]}}, False),
        ({"server": {"host": "0.0.0.0"}, "auth": {"allow_no_key": True}}, False),
    ],
)
def test_nobody_listens_beyond_this_machine_without_a_key(sections: dict[str, Any], is_refused: bool) -> None:
    settings = GatewaySettings.model_validate(sections)
    if not is_refused:
        check_exposure(settings)
        return
    with pytest.raises(InvalidArgumentError, match="sage-llm key new NAME"):
        check_exposure(settings)


async def test_cors_is_off_unless_configured() -> None:
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    async with site() as here:
        assert "access-control-allow-origin" not in (await here.client.options(CHAT, headers=preflight)).headers
    async with site(cors={"allow_origins": ["https://a.example"]}, auth={"keys": [ADA]}) as here:
        allowed = await here.client.options(CHAT, headers=preflight)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        refused = await here.post(headers={"origin": "https://a.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://a.example"
        exposed = set(refused.headers["access-control-expose-headers"].split(", "))
        assert {"x-request-id", "request-id", "retry-after", "x-should-retry"} <= exposed
        other = await here.post(KEY, headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


# ---- rates --------------------------------------------------------------------------------------------


async def test_requests_a_minute() -> None:
    async with site(limits={"per_key": {"requests_per_minute": 2}}, auth={"keys": [ADA, ADMIN]}) as here:
        first = await here.post(KEY)
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert first.headers["x-ratelimit-reset-requests"] in ("60s", "61s")
        assert "x-ratelimit-limit-tokens" not in first.headers
        await here.post(KEY)
        refused = await here.post(KEY)
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(refused.headers["retry-after"]) <= 61
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert (await here.post(ADMIN_KEY)).status_code == 200
        models = await here.client.get("/v1/models", headers={"authorization": f"Bearer {KEY}"})
        assert models.status_code == 200


async def test_a_keys_own_limits_come_before_those_of_all() -> None:
    key, kept = new_key("eve")
    own = kept.model_copy(update={"limits": RateLimits(requests_per_minute=1)})
    sections = {"per_key": {"requests_per_minute": 100}, "total": {"requests_per_minute": 3}}
    async with site(limits=sections, auth={"keys": [own, ADA]}) as here:
        statuses = [(await here.post(key)).status_code for _ in range(3)]
        assert statuses == [200, 429, 429]
        assert [(await here.post(KEY)).status_code for _ in range(3)] == [200, 200, 429]


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_are_reserved_by_estimate_and_settled_to_what_was_used(stream: bool) -> None:
    async with site(limits={"per_key": {"tokens_per_minute": 40}}) as here:
        # 1 token of prompt and 30 of answer are reserved; 1 and 30 are used
        answer = await here.post(max_tokens=30, stream=stream)
        assert answer.status_code == 200
        if stream:
            assert answer.headers["x-ratelimit-remaining-tokens"] == "9"
        refused = await here.post(max_tokens=30, stream=stream)
        assert refused.status_code == 429
        assert "40 tokens a minute and has 9 left, this asks for 31" in refused.json()["error"]["message"]
        assert refused.headers["x-ratelimit-remaining-tokens"] == "9"
        # Without max_tokens more is reserved than there is; what fails gives it all back.
        assert (await here.post(max_tokens=8)).headers["x-ratelimit-remaining-tokens"] == "0"


async def test_what_fails_and_what_is_cut_gives_its_tokens_back() -> None:
    async with site(limits={"total": {"tokens_per_minute": 50}}) as here:
        assert (await here.post(text="refuse", max_tokens=40)).status_code == 400
        client = LeavingClient(here.app, CHAT, {"model": "m", **body("wait", max_tokens=40, stream=True)})
        await until(lambda: here.engine.running)
        assert (await here.post(max_tokens=40)).status_code == 429
        client.leave()
        await client.done
        answer = await here.post(max_tokens=40)
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-remaining-tokens"] == "8"  # what left had its prompt's token


async def test_an_answer_is_never_longer_than_the_context() -> None:
    async with site(limits={"total": {"tokens_per_minute": 70}}) as here:
        first = LeavingClient(here.app, CHAT, {"model": "m", **body("wait", max_tokens=1_000_000)})
        await until(lambda: here.engine.running)
        assert (await here.post(max_tokens=2)).status_code == 200
        first.leave()
        await first.done


async def test_requests_in_work_are_bounded() -> None:
    async with site(limits={"per_key": {"max_concurrent": 1}, "total": {"max_concurrent": 2}}) as here:
        wait = {"model": "m", **body("wait")}
        first = LeavingClient(here.app, CHAT, wait)
        await until(lambda: here.engine.running)
        refused = await here.post()
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        first.leave()
        await first.done
        assert (await here.post()).status_code == 200
    async with site(limits={"total": {"max_concurrent": 1}}) as here:
        first = LeavingClient(here.app, CHAT, wait)
        await until(lambda: here.engine.running)
        assert (await here.post()).status_code == 503
        first.leave()
        await first.done


async def test_a_draining_gateway_takes_no_new_work_and_ends_its_old() -> None:
    async with site() as here:
        assert (await here.client.get("/ready")).json() == {"status": "ready"}
        first = LeavingClient(here.app, CHAT, {"model": "m", **body("wait", stream=True)})
        await until(lambda: here.engine.running)
        here.app.drain()
        ready = await here.client.get("/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
        refused = await here.post()
        assert (refused.status_code, refused.headers["connection"]) == (503, "close")
        assert "shutting down" in refused.json()["error"]["message"]
        assert (await here.client.get("/health")).status_code == 200
        here.engine.gate.set()
        await first.done
        assert b"[DONE]" in b"".join(message.get("body", b"") for message in first.sent)


async def test_not_ready_without_an_engine() -> None:
    async with site() as here:
        assert (await here.client.get("/version")).json()["version"]
        await here.engine.stop()
        assert (await here.client.get("/ready")).status_code == 503


# ---- the log ------------------------------------------------------------------------------------------


async def lines_of(**log: Any) -> list[str]:
    written = io.StringIO()
    async with site(log=log, auth={"keys": [ADA]}) as here:
        if here.app.access_log is not None:
            here.app.access_log.stream = written
        await here.post(KEY, text="my secret", headers={"x-request-id": "one"})
        await here.client.get("/v1/models/a%0Ab?token=hidden", headers={"x-request-id": "two"})
    return written.getvalue().splitlines()


async def test_a_json_line_a_request() -> None:
    first, second = map(json.loads, await lines_of(access="json"))
    assert (first["request_id"], first["key"], first["method"], first["path"]) == ("one", "ada", "POST", CHAT)
    assert (first["status"], first["prompt_tokens"], first["output_tokens"]) == (200, 2, 3)
    assert 0 <= first["first_byte_ms"] <= first["duration_ms"]
    assert "prompts" not in first
    assert (second["status"], second["path"], second["key"]) == (401, "/v1/models/a%0Ab", None)


async def test_a_text_line_a_request() -> None:
    lines = await lines_of(access="text")
    assert len(lines) == 2
    assert " POST /v1/chat/completions 200 " in lines[0]
    assert " request_id=one client=127.0.0.1 first_byte_ms=" in lines[0]
    assert lines[0].endswith(" prompt_tokens=2 output_tokens=3 key=ada")
    assert not any("secret" in line or "hidden" in line or "\n" in line for line in lines)


async def test_prompts_only_if_asked_for() -> None:
    lines = await lines_of(access="json", prompts=True)
    assert json.loads(lines[0])["prompts"] == ["user: my secret"]


async def test_no_line_if_switched_off() -> None:
    assert await lines_of(access="off") == []
