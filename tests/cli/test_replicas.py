"""`sage-llm serve --replicas`: engines as child processes, and what clients notice when one dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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


def _runs(pid: int) -> bool:
    """Whether it is more than an entry that nobody has taken note of yet."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
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
    body = {**BODY, "max_tokens": 900}  # so that it is killed in the midst, however late this process sees the lines
    whole = httpx.post(url, json=body, timeout=60).json()["choices"][0]["text"]
    lines: list[str] = []
    call = {"json": {**body, "stream": True}, "headers": {"x-request-id": "mine", "x-explain": "1"}, "timeout": 60}
    pids = {engine["engine_id"]: engine["pid"] for engine in engines_of(running)}
    with httpx.stream("POST", url, **call) as answer:  # type: ignore[arg-type]
        engine_id = answer.headers["x-explain-engine"]
        pid = pids[engine_id]
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
        children = [child.pid for child in psutil.Process(process.process.pid).children(recursive=True)]
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
    assert _runs(before["pid"])
    with server(call, home) as process:
        (after,) = engines_of(process)
        assert (after["pid"], after["state"]) == (before["pid"], "ready")
        httpx.post(f"{process.url}/v1/completions", json={**BODY, "max_tokens": 3}, timeout=60).raise_for_status()
        assert process.stop(signal.SIGTERM) == 0
    assert until(lambda: not _runs(before["pid"]))


def test_engines_that_are_kept_are_there_for_the_next_server(home: Path, tmp_path: Path) -> None:
    """On SIGTERM what is in flight ends, the children stay, and the next server has them at once: same processes."""
    call = ["serve", "--replicas", "2", "--state", str(tmp_path / "state.db"), "--keep-engines"]
    url = "{}/v1/completions"
    with server(call, home) as process:
        before = engines_of(process)
        lines: list[str] = []
        body = {**BODY, "stream": True}
        with httpx.stream("POST", url.format(process.url), json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                if not lines:
                    process.process.send_signal(signal.SIGTERM)
                lines.append(line)
        assert "data: [DONE]" in lines
        assert sum("data: {" in line for line in lines) >= 400
        assert process.process.wait(30) == 0
    assert all(_runs(engine["pid"]) for engine in before)
    assert "engines stay loaded for 60 s" in "".join(process.log)
    with server(call, home) as process:
        httpx.post(url.format(process.url), json={**BODY, "max_tokens": 3}, timeout=60).raise_for_status()
        after = engines_of(process)
        assert [(engine["engine_id"], engine["pid"], engine["state"]) for engine in after] == [
            (engine["engine_id"], engine["pid"], "ready") for engine in before
        ]
        os.kill(after[0]["pid"], signal.SIGKILL)  # one of another server is watched like one's own
        assert until(lambda: (now := engines_of(process)[0])["state"] == "ready" and now["pid"] != after[0]["pid"])
        kept = engines_of(process)
        assert process.stop(signal.SIGTERM) == 0
    with server(call[:-1], home) as process:  # one that keeps nothing takes them over, and ends them
        assert [engine["pid"] for engine in engines_of(process)] == [engine["pid"] for engine in kept]
        assert process.stop(signal.SIGTERM) == 0
    assert until(lambda: not any(_runs(engine["pid"]) for engine in kept))


def test_a_model_is_replaced_and_the_next_server_goes_on_with_it(home: Path, tmp_path: Path) -> None:
    call = ["serve", "--replicas", "2", "--state", str(tmp_path / "state.db"), "--keep-engines"]

    def batch_sizes(process: ServerProcess) -> dict[str, int]:
        engines = httpx.get(f"{process.url}/admin/config", timeout=30).json()["engines"]
        return {name: engine["max_batch_size"] for name, engine in engines.items()}

    with server(call, home) as process, ThreadPoolExecutor() as pool:
        url = f"{process.url}/v1/completions"
        whole = httpx.post(url, json=BODY, timeout=60).json()["choices"][0]["text"]
        before = {engine["pid"] for engine in engines_of(process)}
        replace = f"{process.url}/admin/models/builtin/replace"
        replacing = pool.submit(httpx.post, replace, json={"options": {"max_batch_size": 5}}, timeout=120)
        texts = []
        while not replacing.done():  # by the model's name, all the time
            with httpx.stream("POST", url, json={**BODY, "stream": True}, timeout=60) as answer:
                assert answer.status_code == 200
                lines = list(answer.iter_lines())
            assert "data: [DONE]" in lines
            chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            texts.append("".join(choice["text"] for chunk in chunks for choice in chunk["choices"]))
        assert replacing.result().json() == {"model": "builtin", "engines": ["engine-0.2", "engine-1.2"]}
        assert set(texts) == {whole}
        assert batch_sizes(process) == {"engine-0.2": 5, "engine-1.2": 5}
        kept = {engine["pid"] for engine in engines_of(process)}
        assert not kept & before
        assert process.stop(signal.SIGTERM) == 0
    assert until(lambda: not any(_runs(pid) for pid in before))
    with server(call, home) as process:
        assert batch_sizes(process) == {"engine-0.2": 5, "engine-1.2": 5}
        assert {engine["pid"] for engine in engines_of(process)} == kept
        httpx.delete(f"{process.url}/admin/engines/engine-1.2").raise_for_status()
        assert until(lambda: len(engines_of(process)) == 1)
        assert process.stop(signal.SIGTERM) == 0
    with server(call, home) as process:  # what was taken away comes back from the configuration, as it was replaced
        assert batch_sizes(process) == {"engine-0.2": 5, "engine-1": 5}
        assert "runs as it was last replaced" in "".join(process.log)
        assert process.stop(signal.SIGTERM) == 0
    with server([*call[:-1], "--max-batch-size", "6"], home) as process:  # configured otherwise
        assert batch_sizes(process) == {"engine-0": 6, "engine-1": 6}
        assert process.stop(signal.SIGTERM) == 0
    assert until(lambda: not any(_runs(pid) for pid in kept))


def test_the_state_may_lie_in_a_folder_with_a_long_name(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    call = ["serve", "--placement", "process", "--state", str(folder / "state.db"), "--keep-engines"]
    with server(call, home) as process:
        (before,) = engines_of(process)
        assert process.stop(signal.SIGTERM) == 0
    with server(call[:-1], home) as process:
        (after,) = engines_of(process)
        assert (after["pid"], after["state"]) == (before["pid"], "ready")
        os.kill(after["pid"], signal.SIGKILL)
        assert until(lambda: (now := engines_of(process)[0])["state"] == "ready" and now["pid"] != after["pid"])
        run_dir = (folder / "state.db.run").resolve()
        assert (run_dir / "engine-0.log").exists()
        assert process.stop(signal.SIGTERM) == 0
    shutil.rmtree(run_dir)


def test_engines_are_kept_by_a_state_only(cli: Cli) -> None:
    outcome = cli("serve", "--keep-engines")
    assert outcome.status == 2
    assert "keep_engines needs a state" in outcome.err
