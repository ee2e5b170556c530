"""`/metrics`: what is promised in docs/metrics.md is there, and nothing else; calls are counted by route."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from asgi_client import LeavingClient
from fake_engine import FakeEngine
from sagellm_gateway.app import Gateway
from waiting import until

CHAT = "/v1/chat/completions"
HELLO = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
WAIT = {"model": "m", "messages": [{"role": "user", "content": "wait"}]}
DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(max_batch_size=1)


async def scrape(client: httpx.AsyncClient) -> dict[str, float]:
    """The samples of a page by name and labels."""
    text = (await client.get("/metrics")).text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


async def test_the_page_and_its_document_agree(client: httpx.AsyncClient) -> None:
    await client.post(CHAT, json=HELLO)
    text = (await client.get("/metrics")).text
    shown = {
        (f"{family.name}_total" if family.type == "counter" else family.name, family.type)
        for family in text_string_to_metric_families(text)
    }
    rows = re.findall(r"^\| `([a-z0-9_:]+)` \| (\w+) \| .+ \|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert shown == set(rows)
    assert len(rows) == len(set(rows))


async def test_a_streamed_and_a_whole_answer_are_counted_alike(client: httpx.AsyncClient) -> None:
    for stream in (False, True):
        await client.post(CHAT, json={**HELLO, "stream": stream})
    page = await scrape(client)
    labels = 'engine="fake",model_name="m"'
    assert page['vllm:request_success_total{engine="fake",finished_reason="length",model_name="m"}'] == 2
    assert page[f"vllm:generation_tokens_total{{{labels}}}"] == 6
    assert page[f"vllm:request_generation_tokens_sum{{{labels}}}"] == 6
    assert page[f"vllm:time_to_first_token_seconds_count{{{labels}}}"] == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_caller_who_leaves_counts_as_an_abort(
    client: httpx.AsyncClient, app: Gateway, engine: FakeEngine, stream: bool
) -> None:
    caller = LeavingClient(app, CHAT, {**WAIT, "stream": stream})
    await until(lambda: engine.running)
    caller.leave()
    await caller.done
    page = await scrape(client)
    aborts = [value for name, value in page.items() if 'finished_reason="abort"' in name]
    assert aborts == [1.0]


async def test_requests_in_the_gateways_queue_are_waiting(
    client: httpx.AsyncClient, app: Gateway, engine: FakeEngine
) -> None:
    callers = [LeavingClient(app, CHAT, WAIT) for _ in range(3)]
    await until(lambda: app.manager.num_waiting == 2)
    page = await scrape(client)
    labels = 'engine="fake",model_name="m"'
    assert page[f"vllm:num_requests_running{{{labels}}}"] == 1
    assert page[f"vllm:num_requests_waiting{{{labels}}}"] == 2
    assert page[f'vllm:engine_sleep_state{{{labels},sleep_state="awake"}}'] == 1
    assert page[f'vllm:engine_sleep_state{{{labels},sleep_state="weights_offloaded"}}'] == 0
    assert page["http_requests_inprogress"] == 4  # with this one
    engine.gate.set()
    for caller in callers:
        await caller.done
    page = await scrape(client)
    assert page[f"vllm:num_requests_waiting{{{labels}}}"] == 0
    assert page["http_requests_inprogress"] == 1


async def test_calls_are_counted_by_route_and_status(client: httpx.AsyncClient) -> None:
    await client.post(CHAT, json=HELLO)
    await client.post(CHAT, json={"messages": []})
    await client.get("/v1/models/m")
    await client.get("/v1/models/nobody")
    for path in ("/no/such", "/no/other"):
        await client.get(path)
    await client.request("BREW", "/coffee")
    page = await scrape(client)
    ended = {name: value for name, value in page.items() if name.startswith("http_requests_total")}
    assert ended == {
        f'http_requests_total{{code="200",handler="{CHAT}",method="POST",status="2xx"}}': 1,
        f'http_requests_total{{code="400",handler="{CHAT}",method="POST",status="4xx"}}': 1,
        'http_requests_total{code="200",handler="/v1/models/{model:path}",method="GET",status="2xx"}': 1,
        'http_requests_total{code="404",handler="/v1/models/{model:path}",method="GET",status="4xx"}': 1,
        'http_requests_total{code="404",handler="other",method="GET",status="4xx"}': 2,
        'http_requests_total{code="404",handler="other",method="OTHER",status="4xx"}': 1,
    }
    assert page[f'http_request_duration_seconds_count{{handler="{CHAT}",method="POST"}}'] == 2
