"""Facts about processes, with and without the system's file for a process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest

from sagellm_control_plane.clients import supervision
from sagellm_control_plane.clients.supervision import WatchedProcess, process_started_at
from sagellm_protocol import NotFoundError
from waiting import until


@pytest.fixture(params=["pidfd", "thread"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "thread":
        monkeypatch.setattr(supervision, "HAS_PIDFD", False)
    elif not supervision.HAS_PIDFD:
        pytest.skip("this system has no pidfd")
    return str(request.param)


def spawn(code: str, ends: list[int]) -> WatchedProcess:
    with tempfile.TemporaryFile() as stdin, open(os.devnull, "wb") as log:
        return WatchedProcess.spawn(
            [sys.executable, "-c", code],
            environment=dict(os.environ),
            stdin=stdin,
            log=log,
            on_exit=lambda: ends.append(1),
        )


async def test_how_it_ended(way: str) -> None:
    ends: list[int] = []
    process = spawn("raise SystemExit(3)", ends)
    assert await process.wait(60)
    assert (process.returncode, process.is_alive, ends) == (3, False, [1])
    process.signal(signal.SIGKILL)  # nothing is left to get it


async def test_a_signal(way: str) -> None:
    ends: list[int] = []
    process = spawn("import time; time.sleep(60)", ends)
    assert not await process.wait(0.05)
    assert process_started_at(process.pid) == process.started_at
    process.signal(signal.SIGKILL)
    await process.wait()
    assert (process.returncode, ends) == (-signal.SIGKILL, [1])
    assert process_started_at(process.pid) is None


@pytest.mark.skipif(sys.platform != "linux", reason="who sends signals is told by /proc")
async def test_what_strikes_it_from_outside_is_told_from_what_it_does_itself(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = spawn("import time; time.sleep(60)", [])
    assert not process.is_struck
    process.signal(signal.SIGSTOP)
    await until(lambda: process.is_struck)
    process.signal(signal.SIGCONT)
    await until(lambda: not process.is_struck)
    process.signal(signal.SIGKILL)
    await process.wait()
    assert process.is_struck
    monkeypatch.setattr(supervision, "_num_oom_kills", lambda: -1)
    assert not process.is_struck, "it may have been for want of memory"
    for code in ("raise SystemExit(3)", "import os; os.abort()", "import os; os.kill(os.getpid(), 11)"):
        process = spawn(code, [])
        await process.wait()
        assert not process.is_struck


async def test_one_that_is_let_go_is_not_told_of(way: str) -> None:
    ends: list[int] = []
    process = spawn("import time; time.sleep(60)", ends)
    process.release()
    os.kill(process.pid, signal.SIGKILL)
    if way == "pidfd":
        os.waitpid(process.pid, 0)
    await asyncio.sleep(0.1)
    assert ends == []


async def test_it_inherits_no_open_file(tmp_path: Path) -> None:
    """Such as a lock of its parent, which it would hold for as long as it lives."""
    with (tmp_path / "lock").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        ends: list[int] = []
        process = spawn(f"import os; os.fstat({file.fileno()})", ends)
        await process.wait(60)
    assert process.returncode == 1


async def test_no_such_process() -> None:
    assert process_started_at(2**22 + 1) is None
    with pytest.raises(NotFoundError):
        WatchedProcess(2**22 + 1, on_exit=lambda: None)
