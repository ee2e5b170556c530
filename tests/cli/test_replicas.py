"""`sage-llm serve --replicas`: engines as child processes, and what clients notice when one dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cli_process import Cli, ServerProcess, server

pytestmark = pytest.mark.slow

BODY = {"model": "builtin", "prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with server(["serve", "--model", "builtin", "--replicas", "3"], tmp_path_factory.mktemp("home")) as process:
        yield process


def engines_of(process: ServerProcess) -> list[dict[str, Any]]:
    engines: list[dict[str, Any]] = httpx.get(f"{process.url}/admin/engines", timeout=30).json()["engines"]
    return engines


def until(condition: Any, *, timeout_s: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.1)
    return found


def _runs(process: psutil.Process) -> bool:
    """Whether it is more than an entry that nobody has taken note of yet."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_replicas_need_the_control_plane(cli: Cli) -> None:
    outcome = cli("serve", "--engine-only", "--replicas", "2")
    assert outcome.status == 2
    assert "--replicas is for the gateway" in outcome.err


def test_three_engines_have_processes_of_their_own(running: ServerProcess) -> None:
    engines = engines_of(running)
    assert [engine["engine_id"] for engine in engines] == ["engine-0", "engine-1", "engine-2"]
    assert {(engine["state"], engine["model"], engine["load"]) for engine in engines} == {("ready", "builtin", 0)}
    children = {child.pid for child in psutil.Process(running.process.pid).children()}
    assert len({engine["pid"] for engine in engines} & children) == 3
    assert "builtin, 3 engines" in "".join(running.log)


def test_a_stream_survives_the_death_of_its_engine(running: ServerProcess) -> None:
    url = f"{running.url}/v1/completions"
    whole = httpx.post(url, json=BODY, timeout=60).json()["choices"][0]["text"]
    lines: list[str] = []
    call = {"json": {**BODY, "stream": True}, "headers": {"x-request-id": "mine", "x-explain": "1"}, "timeout": 60}
    with httpx.stream("POST", url, **call) as answer:  # type: ignore[arg-type]
        engine_id = answer.headers["x-explain-engine"]
        pid = next(engine["pid"] for engine in engines_of(running) if engine["engine_id"] == engine_id)
        for line in answer.iter_lines():
            if len(lines) == 20:
                os.kill(pid, signal.SIGKILL)
            lines.append(line)
    chunks = [httpx.Response(200, text=line[6:]).json() for line in lines if line.startswith("data: {")]
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == whole
    assert "data: [DONE]" in lines
    (trace,) = httpx.get(f"{running.url}/admin/requests/mine").json()["requests"]
    assert trace["stays"][0]["engine_id"] == engine_id
    assert len(trace["stays"]) == 2
    assert trace["stays"][1]["engine_id"] != engine_id
    kinds = {event["kind"] for event in httpx.get(f"{running.url}/admin/stats").json()["events"]}
    assert {"lost", "moved"} <= kinds

    def is_back() -> bool:
        engine = next(engine for engine in engines_of(running) if engine["engine_id"] == engine_id)
        return engine["state"] == "ready" and engine["pid"] != pid

    assert until(is_back)


def test_nothing_is_left_when_the_server_ends(home: Path) -> None:
    with server(["serve", "--replicas", "2"], home) as process:
        children = psutil.Process(process.process.pid).children(recursive=True)
        assert len(children) >= 2
        assert process.stop(signal.SIGTERM) == 0
        assert "Traceback" not in "".join(process.log)
    assert until(lambda: not any(_runs(child) for child in children))


def test_children_of_a_gateway_that_crashed_are_taken_over(home: Path, tmp_path: Path) -> None:
    call = ["serve", "--placement", "process", "--state", str(tmp_path / "state.db")]
    with server(call, home) as process:
        (before,) = engines_of(process)
        process.process.kill()
        process.process.wait()
    assert psutil.pid_exists(before["pid"])
    with server(call, home) as process:
        (after,) = engines_of(process)
        assert (after["pid"], after["state"]) == (before["pid"], "ready")
        httpx.post(f"{process.url}/v1/completions", json={**BODY, "max_tokens": 3}, timeout=60).raise_for_status()
        assert process.stop(signal.SIGTERM) == 0
    assert until(lambda: not psutil.pid_exists(before["pid"]))
