"""A manager that is killed and real child engines: they are adopted, the dead and the stopped come back."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sagellm_control_plane.clients.base import EngineClient
from sagellm_control_plane.clients.process import ProcessEngineClient
from sagellm_control_plane.engines import ManagedEngine
from sagellm_control_plane.lifecycle import Supervisor
from sagellm_control_plane.lifecycle_config import LifecycleConfig
from sagellm_control_plane.recovery import adopt_child, restore
from sagellm_control_plane.store import EngineStore, StoredEngine
from sagellm_protocol import Request
from waiting import until

pytestmark = pytest.mark.slow

CONFIG = LifecycleConfig(hang_timeout_s=5, probe_interval_s=0.4, probe_timeout_s=2, restart_backoff_s=0.1)

_MANAGER = textwrap.dedent(
    """
    import asyncio, sys
    from sagellm_control_plane.clients.process import ProcessEngineClient
    from sagellm_control_plane.lifecycle import Supervisor
    from sagellm_control_plane.store import EngineStore
    from sagellm_control_plane.types import ExecutionInstance
    from sagellm_core.config import LLMEngineConfig

    async def main():
        supervisor = Supervisor(store=EngineStore(sys.argv[1]))
        for name in ("a", "b", "c"):
            config = LLMEngineConfig(model_path="builtin", engine_id=name, num_threads=1)
            client = ProcessEngineClient(config, run_dir=sys.argv[2], orphan_timeout_s=60)
            supervisor.add(ExecutionInstance(instance_id=name, model_name="m"), client)
        errors = await supervisor.start_all()
        assert errors == [None] * 3, errors
        print(*(engine.pid for engine in supervisor.engines.values()), flush=True)
        await asyncio.sleep(1000)

    asyncio.run(main())
    """
)


@pytest.fixture
def run_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sage-", dir="/tmp") as folder:  # the paths of sockets must be short
        yield Path(folder)


def _runs(pid: int) -> bool:
    """Whether a process is more than an entry that nobody has taken note of yet."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def answer(engine: ManagedEngine) -> str:
    response = await engine.client.execute(Request(prompt="Hello", max_tokens=8))
    assert response.error is None
    return response.output_text


async def test_a_killed_manager_leaves_engines_that_the_next_one_takes_over(tmp_path: Path, run_dir: Path) -> None:
    path = tmp_path / "state.db"
    with subprocess.Popen(
        [sys.executable, "-c", _MANAGER, str(path), str(run_dir)], stdout=subprocess.PIPE, text=True
    ) as manager:
        assert manager.stdout is not None
        pids = [int(pid) for pid in (await asyncio.to_thread(manager.stdout.readline)).split()]
        assert len(pids) == 3
        manager.send_signal(signal.SIGKILL)
    os.kill(pids[1], signal.SIGKILL)  # dies while nobody looks
    os.kill(pids[2], signal.SIGSTOP)  # hangs while nobody looks

    def make(stored: StoredEngine) -> EngineClient:
        return ProcessEngineClient(stored.config, run_dir=run_dir)

    with EngineStore(path) as store:
        supervisor = Supervisor(CONFIG, store=store)
        await restore(supervisor, store, make, adopt_child)
        adopted, dead, hung = engines = list(supervisor.engines.values())
        try:
            await until(lambda: all(engine.takes_requests for engine in engines))
            assert adopted.pid == pids[0]
            assert len({dead.pid, hung.pid, *pids}) == 5
            # Killed, not left behind; it is its old parent's to reap.
            await until(lambda: not _runs(pids[2]))
            assert len({await answer(engine) for engine in engines}) == 1

            os.kill(pids[0], signal.SIGKILL)
            await until(lambda: not adopted.takes_requests)
            await until(lambda: adopted.takes_requests)
            assert adopted.pid != pids[0]

            stopped = dead.pid
            assert stopped is not None
            os.kill(stopped, signal.SIGSTOP)
            await until(lambda: "hangs" in (dead.error or ""))
            await until(lambda: dead.takes_requests)
            assert dead.pid != stopped
            assert not _runs(stopped)
            assert len({await answer(engine) for engine in engines}) == 1
            assert {stored.child.pid for stored in store.load() if stored.child} == {engine.pid for engine in engines}
        finally:
            await supervisor.stop_all()
        assert not any(_runs(engine.pid or 0) for engine in engines if engine.pid)
        assert all(stored.child is None for stored in store.load())
