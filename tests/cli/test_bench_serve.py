"""`sage-llm bench serve` against a server process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli_process import Cli, ServerProcess, server

LOAD = ("--num-prompts", "6", "--input-len", "24", "--output-len", "8")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with server(["serve", "--model", "builtin"], tmp_path_factory.mktemp("home")) as process:
        yield process


def test_random_tokens_have_exactly_the_length(cli: Cli, running: ServerProcess, tmp_path: Path) -> None:
    file = tmp_path / "serve.json"
    call = ("bench", "serve", "--base-url", running.url, "--endpoint", "completions", *LOAD)
    outcome = cli(*call, "--slo-ttft", "60000", "--slo-tpot", "60000", "--json", str(file))
    assert outcome.status == 0, outcome.err
    for words in ("6 requests to builtin", "in time (first token ≤ 60000 ms", "100.0%", "time per output token"):
        assert words in outcome.out
    data = json.loads(file.read_text(encoding="utf-8"))
    assert data["num_prompt_tokens"] == 6 * 24
    assert data["num_output_tokens"] == 6 * 8
    assert data["goodput"]["requests_per_second"] == pytest.approx(data["requests_per_second"])
    assert 0 < data["ttft_ms"]["p50"] <= data["latency_ms"]["p50"]
    assert data["itl_ms"]["mean"] > 0


def test_chat_at_a_rate(cli: Cli, running: ServerProcess, tmp_path: Path) -> None:
    file = tmp_path / "serve.json"
    call = ("bench", "serve", "--url", f"{running.url}/v1", "--request-rate", "40", "--burstiness", "0.5", *LOAD)
    outcome = cli(*call, "--max-concurrency", "2", "--detailed", "--json", str(file))
    assert outcome.status == 0, outcome.err
    data = json.loads(file.read_text(encoding="utf-8"))
    assert data["num_failed"] == 0
    assert data["peak_concurrency"] <= 2
    assert len(data["requests"]) == 6
    assert data["num_output_tokens"] == 6 * 8


def test_a_trace(cli: Cli, running: ServerProcess, shared: Path) -> None:
    trace = str(shared / "traces" / "conversation_trace.jsonl")
    call = ("bench", "serve", "--url", running.url, "--dataset", "trace", "--dataset-path", trace)
    outcome = cli(*call, "--num-prompts", "5", "--length-scale", "0.01", "--speed", "100", "--endpoint", "completions")
    assert outcome.status == 0, outcome.err
    assert "requests failed" in outcome.out
    assert "in the server's words" not in outcome.out


def test_what_the_server_refuses_is_said_in_its_words(cli: Cli, running: ServerProcess) -> None:
    call = ("bench", "serve", "--url", running.url, "--model", "nothing", *LOAD)
    outcome = cli(*call)
    assert outcome.status == 1
    assert "error [not_found]" in outcome.err
    assert "nothing was measured" in outcome.err
    outcome = cli(*call[:4], "--extra-body", '{"top_p": 9}', *LOAD)
    assert outcome.status == 2
    assert "top_p" in outcome.err


def test_wrong_arguments(cli: Cli) -> None:
    outcome = cli("bench", "serve", "--url", "http://127.0.0.1:9")
    assert outcome.status == 1
    assert "is it running?" in outcome.err
    assert "choose random or trace or file" in cli("bench", "serve", "--dataset", "sonnet").err
    assert "no JSON" in cli("bench", "serve", "--extra-body", "{").err
