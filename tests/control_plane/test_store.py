"""What survives the manager: the file itself, and the next manager's way back from it."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import closing
from pathlib import Path

import pytest

from sagellm_control_plane.clients.base import EngineRecord
from sagellm_control_plane.engines import Wanted
from sagellm_control_plane.store import EngineStore, StoredEngine
from sagellm_control_plane.types import ExecutionInstance, ExecutionInstanceType
from sagellm_core.config import EngineConfig, LLMEngineConfig
from sagellm_protocol import InvalidArgumentError, SamplingParams, UnavailableError

RECORD = EngineRecord("a", 4711, 1234.5, "/run/a.sock", "abc", {"model_path": "builtin"})


def stored(name: str = "a", **options: object) -> StoredEngine:
    fields: dict[str, object] = {
        "instance": ExecutionInstance(instance_id=name, model_name="m", instance_type=ExecutionInstanceType.DECODING),
        "config": LLMEngineConfig(model_path="builtin", engine_id=name, sampling_defaults=SamplingParams(top_k=3)),
        "wanted": Wanted.READY,
    }
    return StoredEngine(**{**fields, **options})  # type: ignore[arg-type]


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state.db"
    engines = [stored("b", child=RECORD), stored("a", wanted=Wanted.HELD, is_configured=True)]
    with EngineStore(path) as store:
        assert store.load() == []
        for engine in engines:
            store.save(engine)
    with EngineStore(path) as store:
        loaded = store.load()
        assert loaded == engines, "in the order in which they came"
        assert loaded[0].config.model_fields_set == engines[0].config.model_fields_set
        store.save(stored("b", wanted=Wanted.STOPPED))
        store.delete("a")
        store.delete("never there")
    with EngineStore(path) as store:
        assert store.load() == [stored("b", wanted=Wanted.STOPPED)]
    assert oct(path.stat().st_mode & 0o777) == "0o600"


def test_a_file_of_the_version_before(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    engine = stored("a", child=RECORD)
    with EngineStore(path) as store:
        store.save(engine)
    with closing(sqlite3.connect(path)) as database:
        database.executescript(
            """
            ALTER TABLE engines RENAME TO newer;
            CREATE TABLE engines (
                engine_id TEXT PRIMARY KEY, instance TEXT NOT NULL, config TEXT NOT NULL, wanted TEXT NOT NULL,
                is_configured INTEGER NOT NULL, child TEXT
            );
            INSERT INTO engines SELECT engine_id, instance, config, wanted, is_configured, child FROM newer;
            DROP TABLE newer;
            DROP TABLE replaced;
            PRAGMA user_version = 1;
            """
        )
    configured = EngineConfig(model="m", options={"max_batch_size": 3})
    with EngineStore(path) as store:
        assert store.load() == [engine]
        assert store.load_replaced() == {}
        store.save(stored("a.2", stands_for="a"))
        store.save_replaced({"first": EngineConfig(model="m")})
        store.save_replaced({"second": configured})
    with EngineStore(path) as store:
        assert [engine.stands_for for engine in store.load()] == [None, "a"]
        assert store.load_replaced() == {"second": configured}


def test_one_manager_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with EngineStore(path), pytest.raises(UnavailableError, match="another control plane uses"):
        EngineStore(path)
    EngineStore(path).close()


def test_a_damaged_file_is_put_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(b"this is no database at all, but long enough to be taken for one" * 20)
    with caplog.at_level("WARNING", logger="sagellm_control_plane.store"), EngineStore(path) as store:
        store.save(stored())
        assert store.load() == [stored()]
    assert "is no database" in caplog.text
    aside = next(tmp_path.glob("state.db.damaged-*"))
    assert aside.read_bytes().startswith(b"this is no database")


def test_a_file_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(InvalidArgumentError, match="written by a newer sageLLM; name another state file"):
        EngineStore(path)
    with pytest.raises(InvalidArgumentError):  # the lock was let go
        EngineStore(path)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match="cannot be written"):
        EngineStore(tmp_path / "file" / "state.db")


def test_an_engine_that_cannot_be_read_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "state.db"
    with EngineStore(path) as store:
        store.save(stored("a"))
        store.save(stored("b"))
    with sqlite3.connect(path) as database:
        database.execute("UPDATE engines SET config = '{\"of_another_time\": 1}' WHERE engine_id = 'a'")
    database.close()
    with caplog.at_level("WARNING", logger="sagellm_control_plane.store"), EngineStore(path) as store:
        assert [engine.engine_id for engine in store.load()] == ["b"]
    assert "the engine a is left out" in caplog.text


_WRITER = textwrap.dedent(
    """
    import sys
    from sagellm_control_plane.engines import Wanted
    from sagellm_control_plane.store import EngineStore, StoredEngine
    from sagellm_control_plane.types import ExecutionInstance
    from sagellm_core.config import LLMEngineConfig

    store = EngineStore(sys.argv[1])
    number = max((int(engine.instance.model_name) for engine in store.load()), default=0)
    while True:
        number += 1
        for name in "abc":
            store.save(
                StoredEngine(
                    ExecutionInstance(instance_id=name, model_name=str(number)),
                    LLMEngineConfig(model_path="x" * 3000, engine_id=name, revision=str(number)),
                    Wanted.READY,
                )
            )
        print(number, flush=True)
    """
)


def test_a_writer_that_is_killed_loses_nothing_that_was_saved(tmp_path: Path) -> None:
    path, last = tmp_path / "state.db", 0
    for lines in (1, 2, 60):
        with subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
        ) as writer:
            assert writer.stdout is not None
            told = 0
            for _ in range(lines):
                told = int(writer.stdout.readline())
            with pytest.raises(UnavailableError, match="another control plane"):
                EngineStore(path)
            writer.send_signal(signal.SIGKILL)
            told = max([told, *map(int, writer.stdout.read().split())])
        assert told > last
        with EngineStore(path) as store:
            engines = store.load()
        assert [engine.engine_id for engine in engines] == ["a", "b", "c"]
        for engine in engines:
            number = int(engine.instance.model_name)
            assert number in (told, told + 1), "it was saved before it was said"
            assert engine.config.revision == str(number), "whole or not at all"
        last = told
