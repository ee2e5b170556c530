"""The next manager finds what the last one left."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import virtual_loop
from fake_child import FakeChild, FakeThread
from sagellm_control_plane.clients.base import EngineRecord
from sagellm_control_plane.engines import ManagedEngine, Wanted
from sagellm_control_plane.lifecycle import Supervisor
from sagellm_control_plane.recovery import restore
from sagellm_control_plane.replacement import replace_model
from sagellm_control_plane.store import EngineStore
from sagellm_control_plane.types import EngineState, ExecutionInstance
from sagellm_protocol import UnavailableError

S = EngineState


class Machine:
    """The children outlive managers; each `manager` is killed by being forgotten."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.children: dict[str, FakeChild] = {}
        self.num_made = 0

    def boot(self, configured: tuple[str, ...] = ()) -> Supervisor:
        self.store = EngineStore(self.path)
        self.supervisor = Supervisor(store=self.store)
        for name in configured:
            self.add(name, is_configured=True)
        return self.supervisor

    def add(self, name: str, *, is_configured: bool = False) -> ManagedEngine:
        instance = ExecutionInstance(instance_id=name, model_name="m")
        return self.supervisor.add(instance, self.make(name), is_configured=is_configured)

    def make(self, name: str) -> FakeChild:
        self.num_made += 1
        return FakeChild(name)

    def crash(self) -> None:
        """kill -9 of the manager: nothing is said, nothing is saved; the children run on."""
        for engine in self.supervisor.engines.values():
            if isinstance(engine.client, FakeChild) and engine.client.is_running:
                self.children[engine.engine_id] = engine.client
            engine.client.on_lost = None  # type: ignore[attr-defined]
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        self.store.close()  # the system lets go of the lock

    async def adopt(self, record: EngineRecord) -> FakeChild:
        child = self.children.pop(record.engine_id, None)
        if child is None or not child.is_running:
            raise UnavailableError(f"process {record.pid} is gone")
        assert record.epoch == f"epoch-{child.num_starts}"
        return child

    async def restore(self) -> None:
        await restore(self.supervisor, self.store, lambda stored: self.make(stored.engine_id), self.adopt)


def test_children_are_adopted_and_the_dead_restarted(tmp_path: Path) -> None:
    async def main() -> None:
        machine = Machine(tmp_path / "state.db")
        supervisor = machine.boot(("a", "b"))
        machine.add("hot")
        await supervisor.start_all()
        machine.add("asleep")
        machine.crash()
        machine.children["b"].die()
        num_made = machine.num_made

        supervisor = machine.boot(("a", "b"))
        await machine.restore()
        await asyncio.sleep(10)
        assert list(supervisor.engines) == ["a", "b", "hot", "asleep"]
        clients = {name: engine.client for name, engine in supervisor.engines.items()}
        starts = {name: client.num_starts for name, client in clients.items()}  # type: ignore[attr-defined]
        assert starts == {"a": 1, "b": 1, "hot": 1, "asleep": 0}
        assert machine.num_made == num_made + 2 + 1, "two configured, one asleep; hot was adopted"
        states = [engine.state for engine in supervisor.engines.values()]
        assert states == [S.READY, S.READY, S.READY, S.STOPPED]
        assert not supervisor.engines["hot"].is_configured
        clients["hot"].die()  # type: ignore[attr-defined]
        await asyncio.sleep(5)
        assert supervisor.engines["hot"].takes_requests, "it is watched and restarted as any other"
        machine.crash()

    virtual_loop.run(main)


@pytest.mark.parametrize("wish", ["hold", "stop"])
def test_what_an_operator_wanted_stays(tmp_path: Path, wish: str) -> None:
    async def main() -> None:
        machine = Machine(tmp_path / "state.db")
        supervisor = machine.boot(("a",))
        await supervisor.start_all()
        await getattr(supervisor, wish)("a")
        machine.crash()
        supervisor = machine.boot(("a",))
        await machine.restore()
        await asyncio.sleep(5)
        engine = supervisor.engines["a"]
        assert engine.wanted is (Wanted.HELD if wish == "hold" else Wanted.STOPPED)
        assert not engine.takes_requests
        machine.crash()

    virtual_loop.run(main)


def test_what_is_configured_no_more_or_otherwise_ends(tmp_path: Path) -> None:
    async def main() -> None:
        machine = Machine(tmp_path / "state.db")
        supervisor = machine.boot(("a", "b"))
        await supervisor.start_all()
        first, second = (engine.client for engine in supervisor.engines.values())
        assert isinstance(first, FakeChild)
        assert isinstance(second, FakeChild)
        machine.crash()

        machine.boot(())
        instance = ExecutionInstance(instance_id="b", model_name="m")
        changed = FakeChild("b")
        changed.config = changed.config.model_copy(update={"max_batch_size": 3})
        machine.supervisor.add(instance, changed, is_configured=True)
        await machine.restore()
        assert not first.is_running
        assert not second.is_running
        assert list(machine.supervisor.engines) == ["b"]
        assert [stored.engine_id for stored in machine.store.load()] == ["b"]
        assert machine.supervisor.engines["b"].client is changed
        machine.crash()

    virtual_loop.run(main)


@pytest.mark.parametrize("ends", ["before", "while the old one drains", "after"])
def test_a_replacement_survives_a_crash(tmp_path: Path, ends: str) -> None:
    """Whatever the moment, the next manager has one engine, and adopts its process."""

    async def main() -> None:
        machine = Machine(tmp_path / "state.db")
        supervisor = machine.boot(("a",))
        await supervisor.start_all()
        old = supervisor.engines["a"]
        old.enter()
        started = asyncio.Event()
        replacing = asyncio.ensure_future(
            replace_model(supervisor, "m", lambda _, engine_id: machine.make(engine_id), on_first=started.set)
        )
        if ends != "before":
            await started.wait()
            await asyncio.sleep(0)
            assert old.wanted is Wanted.REMOVED
        if ends == "after":
            old.leave(True)
            await replacing
        else:
            await asyncio.sleep(0.01)
        machine.crash()

        for _ in range(2):
            supervisor = machine.boot(("a",))
            await machine.restore()
            await asyncio.sleep(10)
            (engine,) = supervisor.engines.values()
            assert engine.engine_id == ("a" if ends == "before" else "a.2")
            assert engine.takes_requests
            assert engine.is_configured
            assert engine.client.num_starts == 1  # type: ignore[attr-defined]
            assert [stored.engine_id for stored in machine.store.load()] == [engine.engine_id]
            machine.crash()

        supervisor = machine.boot(("b",))  # what is not configured any more has no place to take
        await machine.restore()
        assert list(supervisor.engines) == ["b"]
        machine.crash()

    virtual_loop.run(main)


def test_a_planned_end_leaves_children_and_stops_threads(tmp_path: Path) -> None:
    async def main() -> None:
        machine = Machine(tmp_path / "state.db")
        supervisor = machine.boot(("a",))
        thread = FakeThread("thread")
        supervisor.add(ExecutionInstance(instance_id="thread", model_name="m"), thread)
        loading = machine.add("loading")
        await supervisor.start_all()
        await supervisor.stop("loading")
        supervisor.start("loading")
        await asyncio.sleep(0.1)
        child = supervisor.engines["a"].client
        assert isinstance(child, FakeChild)
        await supervisor.leave_running()
        assert child.is_detached
        assert child.is_running
        assert not thread.is_running
        assert not loading.client.is_running  # type: ignore[attr-defined]
        engines = list(supervisor.engines.values())
        for engine in engines:
            supervisor.wake(engine)  # by a request that comes too late
        await asyncio.sleep(10)
        assert not any(engine.serves("default") or engine.state is not EngineState.STOPPED for engine in engines)
        assert child.log == ["start"], "it is the next manager's now"
        machine.children["a"] = child
        machine.store.close()
        supervisor = machine.boot(("a",))
        await machine.restore()
        await asyncio.sleep(5)
        assert supervisor.engines["a"].client is child
        assert supervisor.engines["a"].takes_requests
        machine.crash()

    virtual_loop.run(main)


def test_a_full_disk_does_not_end_the_service(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        machine = Machine(tmp_path / "state.db")
        supervisor = machine.boot(("a",))
        machine.store._database.execute("PRAGMA query_only = ON")
        await supervisor.start("a")
        assert supervisor.engines["a"].takes_requests
        machine.crash()

    with caplog.at_level("WARNING", logger="sagellm_control_plane"):
        virtual_loop.run(main)
    assert "cannot be written" in caplog.text
