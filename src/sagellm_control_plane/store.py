"""What has to survive the manager: its engines, what is wanted of each, and the children that run. In SQLite.

Each change is a transaction in write-ahead mode: a manager that is killed at any moment leaves the last state that was
saved whole. One manager at a time uses a file; the lock goes with its process, however that ends.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec
from filelock import FileLock, Timeout

from sagellm_control_plane.clients.base import Detachable, EngineRecord
from sagellm_control_plane.engines import ManagedEngine, Wanted
from sagellm_control_plane.types import ExecutionInstance
from sagellm_core.config import EngineConfig, LLMEngineConfig
from sagellm_protocol import InvalidArgumentError, UnavailableError, parse

logger = logging.getLogger(__name__)

_VERSION = 2
_TABLES = (
    """
CREATE TABLE IF NOT EXISTS engines (
    engine_id TEXT PRIMARY KEY,
    instance TEXT NOT NULL,  -- ExecutionInstance, as JSON
    config TEXT NOT NULL,    -- LLMEngineConfig, as JSON
    wanted TEXT NOT NULL,    -- Wanted
    is_configured INTEGER NOT NULL,
    child TEXT,              -- the record of the process that runs, as JSON; NULL: none
    stands_for TEXT          -- the engine of the configuration whose place it took; NULL: none
)
""",
    """
CREATE TABLE IF NOT EXISTS replaced (
    configured TEXT PRIMARY KEY,  -- an EngineConfig of the configuration, as JSON
    config TEXT NOT NULL          -- the EngineConfig that an operator put in its place, as JSON
)
""",
)
_FROM_VERSION_1 = "ALTER TABLE engines ADD COLUMN stands_for TEXT"


@dataclass(frozen=True, slots=True)
class StoredEngine:
    """An engine as the last manager left it.

    `is_configured` says that it stood in the configuration, which the next manager reads anew; the others were added
    while it ran. `child` is the process that ran it, if any, and `stands_for` the configured engine that it replaced.
    """

    instance: ExecutionInstance
    config: LLMEngineConfig
    wanted: Wanted
    is_configured: bool = False
    child: EngineRecord | None = None
    stands_for: str | None = None

    @property
    def engine_id(self) -> str:
        return self.instance.instance_id

    @classmethod
    def of(cls, engine: ManagedEngine) -> StoredEngine:
        """The engine as it is now."""
        client = engine.client
        is_child = engine.is_loaded and isinstance(client, Detachable)
        return cls(
            instance=engine.instance,
            config=engine.given,
            wanted=engine.kept,
            is_configured=engine.is_configured,
            child=cast(Detachable, client).record() if is_child else None,
            stands_for=engine.stands_for,
        )


class EngineStore:
    """The engines of one control plane, in one file.

    Raises `UnavailableError` where another manager uses the file or it cannot be written, `InvalidArgumentError` for
    one of a newer version. A file that is no database is put aside, with its name in the log, and a new one begun: the
    children it knew end by themselves.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = FileLock(f"{self.path}.lock", mode=0o600)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UnavailableError(
                f"another control plane uses {self.path}; stop it or name another state file", path=str(self.path)
            ) from None
        except OSError as error:
            raise UnavailableError(
                f"the state file {self.path} cannot be written ({error.strerror}); name another one",
                path=str(self.path),
            ) from error
        try:
            self._database = self._open()
        except BaseException:
            self._lock.release()
            raise

    def load(self) -> list[StoredEngine]:
        """All engines, in the order in which they were first saved. One that can't be read is logged and left out."""
        found = []
        columns = "engine_id, instance, config, wanted, is_configured, child, stands_for"
        rows = self._database.execute(f"SELECT {columns} FROM engines ORDER BY rowid").fetchall()
        for engine_id, instance, config, wanted, is_configured, child, stands_for in rows:
            try:
                found.append(
                    StoredEngine(
                        instance=parse(ExecutionInstance, instance, what="stored instance"),
                        config=parse(LLMEngineConfig, config, what="stored engine configuration"),
                        wanted=Wanted(wanted),
                        is_configured=bool(is_configured),
                        child=None if child is None else msgspec.json.decode(child, type=EngineRecord),
                        stands_for=stands_for,
                    )
                )
            except (ValueError, msgspec.MsgspecError) as error:  # options that this version has no more
                logger.error("%s: the engine %s is left out: %s", self.path, engine_id, error)
        return found

    def save(self, engine: StoredEngine) -> None:
        """Keep an engine as it is now. Raises `UnavailableError` where that fails (a full disk)."""
        row = (
            engine.engine_id,
            engine.instance.model_dump_json(),
            engine.config.model_dump_json(exclude_unset=True),
            engine.wanted.value,
            engine.is_configured,
            None if engine.child is None else msgspec.json.encode(engine.child).decode(),
            engine.stands_for,
        )
        self._write(
            "INSERT INTO engines VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (engine_id) DO UPDATE SET "
            "instance = excluded.instance, config = excluded.config, wanted = excluded.wanted, "
            "is_configured = excluded.is_configured, child = excluded.child, stands_for = excluded.stands_for",
            row,
        )

    def delete(self, engine_id: str) -> None:
        """Forget an engine; one that is not there is no error. Raises as `save` does."""
        self._write("DELETE FROM engines WHERE engine_id = ?", (engine_id,))

    def load_replaced(self) -> dict[str, EngineConfig]:
        """What took the place of a configuration, by that one as JSON. What can't be read is logged and left out."""
        found = {}
        for configured, config in self._database.execute("SELECT configured, config FROM replaced").fetchall():
            try:
                found[configured] = parse(EngineConfig, config, what="stored replacement")
            except ValueError as error:
                logger.error("%s: a replacement is left out: %s", self.path, error)
        return found

    def save_replaced(self, replaced: Mapping[str, EngineConfig]) -> None:
        """Keep these, and no others. Raises as `save` does."""
        rows = [(configured, config.model_dump_json(exclude_unset=True)) for configured, config in replaced.items()]
        try:
            with self._database:
                self._database.execute("DELETE FROM replaced")
                self._database.executemany("INSERT INTO replaced VALUES (?, ?)", rows)
        except sqlite3.Error as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Let another manager use the file; a second call changes nothing."""
        self._database.close()
        self._lock.release()

    def __enter__(self) -> EngineStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- steps of the above ---------------------------------------------------------------------------

    def _write(self, statement: str, values: tuple[object, ...]) -> None:
        try:
            with self._database:
                self._database.execute(statement, values)
        except sqlite3.Error as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: sqlite3.Error) -> UnavailableError:
        return UnavailableError(f"the state file {self.path} cannot be written: {error}", path=str(self.path))

    def _open(self) -> sqlite3.Connection:
        try:
            return self._connect()
        except sqlite3.OperationalError as error:  # the disk or its rights, not what the file holds
            raise UnavailableError(
                f"the state file {self.path} cannot be opened ({error}); name another one", path=str(self.path)
            ) from error
        except sqlite3.DatabaseError as error:
            aside = self.path.with_name(f"{self.path.name}.damaged-{os.getpid()}")
            logger.error("%s is no database (%s); it is now %s, and a new one begins", self.path, error, aside.name)
            for suffix in ("-wal", "-shm"):  # they belong to the damaged file
                Path(f"{self.path}{suffix}").unlink(missing_ok=True)
            self.path.replace(aside)
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        database = sqlite3.connect(self.path)
        try:
            # Killed managers lose nothing in this mode; only a machine without power may lose the last changes.
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            with closing(database.execute("PRAGMA user_version")) as cursor:
                version = int(cursor.fetchone()[0])
            if version > _VERSION:
                raise InvalidArgumentError(
                    f"{self.path} was written by a newer sageLLM; name another state file", path=str(self.path)
                )
            with database:
                if version == 1:
                    database.execute(_FROM_VERSION_1)
                for table in _TABLES:
                    database.execute(table)
                database.execute(f"PRAGMA user_version = {_VERSION}")
        except BaseException:
            database.close()
            raise
        return database
