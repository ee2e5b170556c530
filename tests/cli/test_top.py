"""`sage-llm top`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from cli_process import Cli, ServerProcess, server
from sagellm.cli.top import TopView
from terminal import Terminal


def engine(**fields: Any) -> dict[str, Any]:
    return {
        "engine_id": "engine-0",
        "model": "m",
        "state": "ready",
        "pid": 4711,
        "error": None,
        "load": 0.5,
        "num_running": 3,
        "num_waiting": 1,
        "num_output_tokens": 100,
        "kv_usage": 0.25,
        "prefix_hit_rate": 0.75,
        **fields,
    }


def stats(**fields: Any) -> dict[str, Any]:
    nothing = {"p50": None, "p90": None, "p99": None}
    return {
        "time": 1000.0,
        "uptime_s": 3700.0,
        "models": ["m"],
        "engines": [engine()],
        "queue_depth": 7,
        "totals": {"requests": 12345, "failed": 2, "prompt_tokens": 1, "output_tokens": 1},
        "rates": {"output_tokens_per_s": 42.4, "requests_per_s": 1.5},
        "ttft_ms": {"p50": 10.0, "p90": 20.0, "p99": 30.5},
        "tpot_ms": nothing,
        "policies": {"scheduling": "fair", "routing": "adaptive"},
        "events": [],
        **fields,
    }


def drawn(picture: Any) -> str:
    console = Console(width=140, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    console.print(picture)
    console.file.close()
    return console.export_text()


def test_a_picture_has_it_all() -> None:
    text = drawn(TopView("http://host").picture(stats()))
    for words in ("up 1 h 1 min", "scheduling fair", "7 queue", "3 running", "42 output tokens/s", "12,345 requests"):
        assert words in text
    for words in ("engine-0", "4711", "███░░░ 50%", "25%", "75%", "p50 10.0 · p90 20.0 · p99 30.5"):
        assert words in text
    assert "time per output token" not in text


def test_rates_of_engines_are_counted_between_two_pictures() -> None:
    view = TopView("http://host")
    view.picture(stats())
    later = stats(time=1002.0, engines=[engine(num_output_tokens=300), engine(engine_id="new", num_output_tokens=9)])
    lines = drawn(view.picture(later)).splitlines()
    assert next(line for line in lines if "engine-0" in line).rstrip().endswith("100")
    assert next(line for line in lines if "new" in line).rstrip().endswith("75%")


def test_errors_and_events_are_shown() -> None:
    events = [{"time": 0.0, "message": f"event {number}"} for number in range(12)]
    view = TopView("http://host")
    broken = [engine(state="error", pid=None, error="out of memory")]
    text = drawn(view.picture(stats(engines=broken, events=events)))
    assert "out of memory" in text
    assert text.index("event 11") < text.index("event 4")
    assert "event 3" not in text
    assert "no server answers; trying again" in drawn(view.problem("no server answers"))


def test_no_server(cli: Cli) -> None:
    outcome = cli("top")
    assert outcome.status == 1
    assert "no server of yours runs" in outcome.err
    assert cli("top", "one", "--url", "http://127.0.0.1:9").status == 2
    assert "is it running?" in cli("top", "--url", "http://127.0.0.1:9").err


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, Path]]:
    home = tmp_path_factory.mktemp("home")
    with server(["serve", "--name", "mine"], home) as process:
        yield process, home


def test_one_picture_of_a_server(cli: Cli, running: tuple[ServerProcess, Path]) -> None:
    process, _ = running
    httpx.post(f"{process.url}/v1/completions", json={"prompt": "Hi", "max_tokens": 4}, timeout=60).raise_for_status()
    outcome = cli("top", "--url", process.url)
    assert outcome.status == 0, outcome.err
    for words in ("builtin", "engine-0", "ready", "time to first token", "routing adaptive"):
        assert words in outcome.out


@pytest.mark.slow
def test_a_terminal_is_kept_up_to_date_until_ctrl_c(running: tuple[ServerProcess, Path]) -> None:
    _, home = running
    terminal = Terminal(["top", "mine", "--interval", "0.1"], home, TERM="xterm-256color")
    try:
        for _ in range(3):
            terminal.wait_for("engine-0")
        terminal.send("\x03")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.close()
