"""Sessions in one SQLite database: they outlive the process, and several processes may share the file.

A database, and not a file a session: a change is atomic without a lock of one's own, a page of the list reads one index
instead of every file, and expiry is one statement. It must lie on a disk of this machine; network file systems do not
lock reliably (https://www.sqlite.org/faq.html#q5).
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from sagellm_gateway.sessions.session import Session, SessionHead
from sagellm_gateway.sessions.store import Edit, id_taken, not_found, too_many
from sagellm_protocol import UnavailableError

_T = TypeVar("_T")

_BUSY_TIMEOUT_S = 10.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
    owner TEXT NOT NULL,
    id TEXT NOT NULL,
    title TEXT NOT NULL,
    model TEXT,
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL,
    num_messages INTEGER NOT NULL,
    num_bytes INTEGER NOT NULL,
    body BLOB NOT NULL,
    PRIMARY KEY (owner, id)
);
CREATE INDEX IF NOT EXISTS newest ON sessions (owner, updated_at, id);
CREATE INDEX IF NOT EXISTS oldest ON sessions (updated_at);
"""
_HEAD = "id, title, model, created_at, updated_at, num_messages, num_bytes"


class FileSessionStore:
    """See the module. One thread does all the work, so the event loop never waits for the disk."""

    def __init__(self, path: Path, *, expire_after_s: float, clock: Callable[[], float] = time.time) -> None:
        self._path = path.expanduser()
        self._expire_after_s = expire_after_s
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sessions")
        self._connection: sqlite3.Connection | None = None

    async def close(self) -> None:
        """As the interface says."""

        await asyncio.to_thread(self._thread.shutdown)
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def add(self, owner: str, session: Session, *, max_sessions: int) -> None:
        """As the interface says."""

        def add(connection: sqlite3.Connection) -> None:
            alive = (owner, self._oldest())
            connection.execute("DELETE FROM sessions WHERE owner = ? AND updated_at < ?", alive)
            if (
                connection.execute("SELECT count(*) FROM sessions WHERE owner = ?", (owner,)).fetchone()[0]
                >= max_sessions
            ):
                raise too_many(max_sessions)
            try:
                connection.execute(
                    f"INSERT INTO sessions (owner, {_HEAD}, body) VALUES (?,?,?,?,?,?,?,?,?)", _row(owner, session)
                )
            except sqlite3.IntegrityError:
                raise id_taken(session.head.id) from None

        await self._run(add)

    async def get(self, owner: str, session_id: str) -> Session:
        """As the interface says."""
        return await self._run(lambda connection: self._get(connection, owner, session_id), begin="BEGIN")

    async def heads(self, owner: str, *, limit: int, after: str | None) -> list[SessionHead]:
        """As the interface says."""

        def list_heads(connection: sqlite3.Connection) -> list[SessionHead]:
            where, values = "owner = ? AND updated_at >= ?", [owner, self._oldest()]
            if after is not None:
                last = self._get(connection, owner, after).head
                where, values = where + " AND (updated_at, id) < (?, ?)", [*values, last.updated_at, last.id]
            statement = f"SELECT {_HEAD} FROM sessions WHERE {where} ORDER BY updated_at DESC, id DESC LIMIT ?"
            return [SessionHead(*row) for row in connection.execute(statement, (*values, limit))]

        return await self._run(list_heads, begin="BEGIN")

    async def change(self, owner: str, session_id: str, edit: Edit) -> Session:
        """As the interface says."""

        def change(connection: sqlite3.Connection) -> Session:
            after = edit(self._get(connection, owner, session_id))
            connection.execute(
                f"REPLACE INTO sessions (owner, {_HEAD}, body) VALUES (?,?,?,?,?,?,?,?,?)", _row(owner, after)
            )
            return after

        return await self._run(change)

    async def delete(self, owner: str, session_id: str) -> None:
        """As the interface says."""

        def delete(connection: sqlite3.Connection) -> None:
            self._get(connection, owner, session_id)
            connection.execute("DELETE FROM sessions WHERE owner = ? AND id = ?", (owner, session_id))

        await self._run(delete)

    async def purge(self) -> None:
        """As the interface says."""
        statement = "DELETE FROM sessions WHERE updated_at < ?"
        await self._run(lambda connection: connection.execute(statement, (self._oldest(),)))

    # ---- steps of the above ---------------------------------------------------------------------------

    def _oldest(self) -> float:
        """When the oldest session that is still there was changed."""
        return self._clock() - self._expire_after_s

    def _get(self, connection: sqlite3.Connection, owner: str, session_id: str) -> Session:
        statement = f"SELECT {_HEAD}, body FROM sessions WHERE owner = ? AND id = ? AND updated_at >= ?"
        row = connection.execute(statement, (owner, session_id, self._oldest())).fetchone()
        if row is None:
            raise not_found(session_id)
        return Session(SessionHead(*row[:-1]), row[-1])

    async def _run(self, work: Callable[[sqlite3.Connection], _T], *, begin: str = "BEGIN IMMEDIATE") -> _T:
        """The result of `work`, in one transaction, in the store's thread.

        A transaction that will write takes its lock at once: one that reads first could find it taken in between.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._transact, work, begin)

    def _transact(self, work: Callable[[sqlite3.Connection], _T], begin: str) -> _T:
        try:
            connection = self._connection or self._open()
            connection.execute(begin)
            try:
                result = work(connection)
            except BaseException:
                connection.rollback()
                raise
            connection.commit()
            return result
        except sqlite3.Error as error:
            raise UnavailableError(f"the sessions in {self._path} cannot be reached: {error}") from error

    def _open(self) -> sqlite3.Connection:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch(mode=0o600)
        except OSError as error:
            raise UnavailableError(f"the sessions in {self._path} cannot be reached: {error.strerror}") from error
        connection = sqlite3.connect(self._path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.executescript(_SCHEMA)
        self._connection = connection
        return connection


def _row(owner: str, session: Session) -> tuple[object, ...]:
    head = session.head
    fields = (head.id, head.title, head.model, head.created_at, head.updated_at, head.num_messages, head.num_bytes)
    return (owner, *fields, session.body)
