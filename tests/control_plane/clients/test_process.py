"""Engines in child processes: real ones around an engine without a model, killed, stopped, left and found again."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec
import psutil
import pytest
import zmq

from child_engines import begin, events_of, make_client, running, silence
from sagellm_control_plane.clients import wire
from sagellm_control_plane.clients.base import EngineLostError, EngineRecord
from sagellm_control_plane.clients.process import ProcessEngineClient, kill_recorded
from sagellm_core.config import LLMEngineConfig
from sagellm_core.engine_core.report import EngineReport
from sagellm_protocol import (
    FinishReason,
    InvalidArgumentError,
    NotFoundError,
    Request,
    StreamEventEnd,
    UnavailableError,
)
from waiting import until


@pytest.fixture
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("r", numbered=True) / "run"  # sockets want short paths


@pytest.fixture
async def client(run_dir: Path) -> AsyncIterator[ProcessEngineClient]:
    async with running(make_client(run_dir)) as client:
        yield client


# ---- life ---------------------------------------------------------------------------------------------


async def test_before_and_after_its_life(run_dir: Path) -> None:
    client = make_client(run_dir)
    await client.stop()
    await client.kill()
    assert not await client.health_check()
    assert client.pid is None
    with pytest.raises(UnavailableError, match=r"call start\(\) first"):
        await events_of(client, prompt="hi")
    await client.start()
    pid = client.pid
    await client.start()
    assert client.pid == pid
    assert run_dir.stat().st_mode & 0o777 == 0o700
    await client.stop()
    assert client.returncode == 0
    assert not list(run_dir.glob("*.sock"))
    with pytest.raises(UnavailableError):
        await client.stats()
    await client.start()
    assert client.pid not in (None, pid)
    await client.kill()
    assert client.returncode == -signal.SIGKILL


async def test_stop_ends_requests_with_abort(client: ProcessEngineClient) -> None:
    task = await begin(client)
    await client.stop()
    end = (await task)[-1]
    assert isinstance(end, StreamEventEnd)
    assert end.finish_reason is FinishReason.ABORT


async def test_sigterm_is_an_end_in_order(client: ProcessEngineClient) -> None:
    task = await begin(client)
    assert client.pid is not None
    os.kill(client.pid, signal.SIGTERM)
    end = (await task)[-1]
    assert isinstance(end, StreamEventEnd)
    assert end.finish_reason is FinishReason.ABORT


async def test_a_cancelled_start_leaves_nothing(run_dir: Path) -> None:
    client = make_client(run_dir)
    starting = asyncio.ensure_future(client.start())
    await until(lambda: client.pid is not None)
    pid = client.pid
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert pid is not None
    assert not psutil.pid_exists(pid)
    await client.start()
    await client.kill()


async def test_what_starting_raised_is_raised_here(run_dir: Path) -> None:
    config = LLMEngineConfig(model_path="no/such/folder", engine_id="e0")
    client = ProcessEngineClient(config, run_dir=run_dir)
    with pytest.raises(NotFoundError, match="no/such/folder"):
        await client.start()
    assert client.pid is None
    assert client.returncode is not None


async def test_a_child_that_dies_at_birth_is_said_with_its_log(run_dir: Path) -> None:
    client = make_client(run_dir, command=("/bin/sh", "-c", "echo out of luck >&2; exit 3"))
    with pytest.raises(UnavailableError, match=r"before it was ready \(status 3\).*out of luck"):
        await client.start()
    client = make_client(run_dir, command=("/no/such/program",))
    with pytest.raises(UnavailableError, match="/no/such/program"):
        await client.start()


async def test_folders_that_others_reach_are_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(InvalidArgumentError, match="chmod 700"):
        await make_client(tmp_path).start()
    with pytest.raises(InvalidArgumentError, match="too long"):
        await make_client(tmp_path / ("x" * 100)).start()


# ---- loss ---------------------------------------------------------------------------------------------


async def test_kill_9_is_told_to_every_request_within_100_ms(client: ProcessEngineClient) -> None:
    """The best of five, for a machine that does something else, too."""
    durations: list[float] = []
    while not durations or (min(durations) >= 0.1 and len(durations) < 5):
        lost: list[EngineLostError] = []
        client.on_lost = lost.append
        tasks = [await begin(client, prompt="slow", max_tokens=10_000) for _ in range(40)]
        tasks.append(asyncio.ensure_future(client.execute(Request(prompt="wait"))))  # type: ignore[arg-type]
        tasks.append(asyncio.ensure_future(client.drain()))  # type: ignore[arg-type]
        await asyncio.sleep(0.1)
        assert client.pid is not None
        killed_at = time.monotonic()
        os.kill(client.pid, signal.SIGKILL)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        durations.append(time.monotonic() - killed_at)
        assert all(isinstance(answer, EngineLostError) and answer.retryable for answer in answers)
        assert [error.context["returncode"] for error in lost] == [-signal.SIGKILL]
        assert client.is_struck == (sys.platform == "linux")
        assert client.pid is None
        assert not await client.health_check()
        await client.start()
        assert len(await events_of(client, prompt="hi")) == 5
    assert min(durations) < 0.1, durations


async def test_a_stopped_process_is_silent_and_can_be_killed(client: ProcessEngineClient) -> None:
    reports: list[EngineReport] = []
    client.watch(reports.append, interval_s=0.02)
    task = await begin(client, prompt="slow", max_tokens=10_000)
    await until(lambda: len(reports) > 2)
    assert client.pid is not None
    os.kill(client.pid, signal.SIGSTOP)
    await silence(reports)
    assert not task.done()
    assert client.is_struck == (sys.platform == "linux")
    await client.kill()
    with pytest.raises(EngineLostError):
        await task


async def test_a_loss_of_our_own_making_is_not_told(client: ProcessEngineClient) -> None:
    lost: list[EngineLostError] = []
    client.on_lost = lost.append
    await client.kill()
    await client.start()
    await client.stop()
    assert lost == []


async def test_an_answer_that_nobody_understands_is_a_loss(run_dir: Path) -> None:
    """An engine that says nonsense after its greeting."""
    run_dir.mkdir(mode=0o700)
    client = make_client(run_dir, command=("/bin/sh", "-c", "exec sleep 60"))
    starting = asyncio.ensure_future(client.start())
    await until(lambda: client.pid is not None)
    peer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    try:
        peer.bind(client._endpoint)
        await until(lambda: bool(peer.poll(0)))
        manager, hello = peer.recv_multipart()
        assert isinstance(wire.decode_to_engine(hello)[0], wire.Hello)
        peer.send_multipart([manager, b"\xff\x00 nonsense"])
        with pytest.raises(EngineLostError, match="no message of ours"):
            await starting
        assert client.pid is None
    finally:
        peer.close(0)


async def test_garbage_on_the_socket_disturbs_nobody(client: ProcessEngineClient) -> None:
    path = client._endpoint.removeprefix("ipc://")
    task = await begin(client, prompt="slow", max_tokens=20)
    raw = socket.socket(socket.AF_UNIX)
    raw.connect(path)
    raw.sendall(os.urandom(4096))
    stranger: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    try:
        stranger.connect(client._endpoint)
        for content in (b"", b"\x93\x01", os.urandom(1000), wire.encode([wire.Stop()]), wire.encode([[99, 1]])):
            stranger.send(content)
        stranger.send(wire.encode([wire.Hello(wire.VERSION + 1, "")]))
        assert await asyncio.to_thread(stranger.poll, 5000)
        answer = wire.decode_from_engine(stranger.recv())[0]
        assert isinstance(answer, wire.Refused)
        events = await task
        assert len(events) == 22
        assert await client.health_check()
    finally:
        raw.close()
        stranger.close(0)


# ---- managers that come and go ------------------------------------------------------------------------


async def test_a_manager_that_restarts_finds_its_engine(run_dir: Path) -> None:
    first = make_client(run_dir)
    await first.start()
    record = msgspec.convert(msgspec.to_builtins(first.record()), EngineRecord)
    left = await begin(first)
    await first.detach()
    with pytest.raises(EngineLostError):
        await left
    assert first.pid is None
    second = await ProcessEngineClient.adopt(record)
    async with running(second):
        assert second.pid == record.pid
        assert second.config.model_path == "builtin"
        assert (await second.stats()).num_running == 0
        assert len(await events_of(second, prompt="hi")) == 5
        await second.start()
        assert second.pid == record.pid
    with pytest.raises(NotFoundError):
        await ProcessEngineClient.adopt(record)


async def test_a_new_manager_takes_the_engine_from_the_old(client: ProcessEngineClient) -> None:
    left = await begin(client)
    second = await ProcessEngineClient.adopt(client.record())
    try:
        assert (await second.stats()).num_running == 0
        assert len(await events_of(second, prompt="hi")) == 5
        assert not left.done()  # the old one is not heard any more, and will be told by the end of the process
    finally:
        await second.stop()
    with pytest.raises(EngineLostError):
        await left


async def test_another_process_is_not_adopted(client: ProcessEngineClient) -> None:
    record = client.record()
    later = replace(record, started_at=record.started_at + 1)
    with pytest.raises(NotFoundError):
        await ProcessEngineClient.adopt(later)
    assert not kill_recorded(later)
    with pytest.raises(UnavailableError, match="another engine"):
        await ProcessEngineClient.adopt(replace(record, epoch="other"))
    await client.detach()
    assert kill_recorded(record)
    await until(lambda: not _lives(record.pid))


async def test_an_orphan_ends_by_itself(run_dir: Path) -> None:
    client = make_client(run_dir, orphan_timeout_s=0.3)
    await client.start()
    pid = client.pid
    await asyncio.sleep(0.5)
    assert client.pid == pid  # it has a manager
    await client.detach()
    assert pid is not None
    await until(lambda: not _lives(pid))


def _lives(pid: int) -> bool:
    """Reaps it, too: it is this process's child."""
    with suppress(ChildProcessError):
        return os.waitpid(pid, os.WNOHANG)[0] == 0
    return psutil.pid_exists(pid)


# ---- nothing is left behind ---------------------------------------------------------------------------


async def test_a_thousand_requests_leave_nothing_open(client: ProcessEngineClient) -> None:
    process = psutil.Process()
    await asyncio.gather(*(events_of(client, prompt="hi") for _ in range(50)))
    num_fds, child_fds = process.num_fds(), psutil.Process(client.pid).num_fds()
    for _ in range(20):
        await asyncio.gather(*(events_of(client, prompt="hi") for _ in range(50)))
    assert process.num_fds() == num_fds
    assert psutil.Process(client.pid).num_fds() == child_fds
    assert client._line is not None
    assert not client._line._calls
    assert not client._line._by_request


async def test_lives_leave_nothing_open(run_dir: Path) -> None:
    client = make_client(run_dir)
    process = psutil.Process()
    async with running(client):
        pass
    num_fds = process.num_fds()
    for _ in range(3):
        async with running(client):
            await events_of(client, prompt="hi")
    await until(lambda: process.num_fds() <= num_fds)
