"""What a store of sessions promises, and the one that keeps them in memory.

Every call names an owner, an API key's name, and sees that owner's sessions only. Changes are atomic: of two at the
same time, from whatever process, one builds on the other's outcome. A session that has expired is not there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from sagellm_gateway.sessions.session import Session, SessionHead
from sagellm_protocol import InvalidArgumentError, NotFoundError, ResourceExhaustedError

Edit = Callable[[Session], Session]


class SessionStore(Protocol):
    """See the module. Failures of the storage itself are `UnavailableError`."""

    async def close(self) -> None:
        """Let go of files and connections."""
        ...

    async def add(self, owner: str, session: Session, *, max_sessions: int) -> None:
        """Keep a new session.

        Raises `InvalidArgumentError` for an id the owner has already, `ResourceExhaustedError` where it has
        `max_sessions`.
        """
        ...

    async def get(self, owner: str, session_id: str) -> Session:
        """A session; `NotFoundError` where the owner has none of this id."""
        ...

    async def heads(self, owner: str, *, limit: int, after: str | None) -> list[SessionHead]:
        """Sessions, the last changed first; at most `limit`, from the one behind `after` on."""
        ...

    async def change(self, owner: str, session_id: str, edit: Edit) -> Session:
        """Replace a session by what `edit` makes of it, and return that. `edit` may be called again."""
        ...

    async def delete(self, owner: str, session_id: str) -> None:
        """Forget a session; `NotFoundError` where there is none."""
        ...

    async def purge(self) -> None:
        """Free what expired sessions take."""
        ...


def not_found(session_id: str) -> NotFoundError:
    """The error for an id that the owner does not have."""
    return NotFoundError(f"no session {session_id!r}; create it with POST /sessions", field="session_id")


def id_taken(session_id: str) -> InvalidArgumentError:
    """The error for an id that the owner has already."""
    return InvalidArgumentError(f"there is a session {session_id!r} already; choose another id", field="id")


def too_many(max_sessions: int) -> ResourceExhaustedError:
    """The error for an owner who has all the sessions it may have."""
    return ResourceExhaustedError(f"there are {max_sessions} sessions already; delete some first", retryable=False)


def newest_first(head: SessionHead) -> tuple[float, str]:
    """The key by which sessions are listed, in reverse."""
    return (head.updated_at, head.id)


class MemorySessionStore:
    """Sessions of this process, gone with it. `clock` is the time of day in seconds."""

    def __init__(self, *, expire_after_s: float, max_memory_bytes: int, clock: Callable[[], float] = time.time) -> None:
        self._expire_after_s = expire_after_s
        self._max_memory_bytes = max_memory_bytes
        self._clock = clock
        self._sessions: dict[str, dict[str, Session]] = {}
        self._num_bytes = 0

    async def close(self) -> None:
        """Nothing to let go of."""

    async def add(self, owner: str, session: Session, *, max_sessions: int) -> None:
        """As the interface says; also raises `ResourceExhaustedError` where all sessions together are too large."""
        self._forget_expired(owner)
        sessions = self._sessions.get(owner, {})
        if session.head.id in sessions:
            raise id_taken(session.head.id)
        if len(sessions) >= max_sessions:
            raise too_many(max_sessions)
        self._put(owner, session, None)

    async def get(self, owner: str, session_id: str) -> Session:
        """As the interface says."""
        session = self._sessions.get(owner, {}).get(session_id)
        if session is None or self._is_expired(session.head):
            raise not_found(session_id)
        return session

    async def heads(self, owner: str, *, limit: int, after: str | None) -> list[SessionHead]:
        """As the interface says."""
        self._forget_expired(owner)
        sessions = self._sessions.get(owner, {})
        heads = sorted((session.head for session in sessions.values()), key=newest_first, reverse=True)
        if after is None:
            return heads[:limit]
        last = (await self.get(owner, after)).head
        return [head for head in heads if newest_first(head) < newest_first(last)][:limit]

    async def change(self, owner: str, session_id: str, edit: Edit) -> Session:
        """As the interface says; no other task runs in between."""
        before = await self.get(owner, session_id)
        after = edit(before)
        self._put(owner, after, before)
        return after

    async def delete(self, owner: str, session_id: str) -> None:
        """As the interface says."""
        await self.get(owner, session_id)
        self._remove(owner, session_id)

    async def purge(self) -> None:
        """As the interface says."""
        for owner in list(self._sessions):
            self._forget_expired(owner)

    # ---- steps of the above ---------------------------------------------------------------------------

    def _is_expired(self, head: SessionHead) -> bool:
        return head.updated_at + self._expire_after_s < self._clock()

    def _forget_expired(self, owner: str) -> None:
        for session in list(self._sessions.get(owner, {}).values()):
            if self._is_expired(session.head):
                self._remove(owner, session.head.id)

    def _put(self, owner: str, session: Session, before: Session | None) -> None:
        growth = _size(session) - (0 if before is None else _size(before))
        if growth > 0 and self._num_bytes + growth > self._max_memory_bytes:
            raise ResourceExhaustedError("the sessions of all callers take all the memory they may; delete some")
        self._num_bytes += growth
        self._sessions.setdefault(owner, {})[session.head.id] = session

    def _remove(self, owner: str, session_id: str) -> None:
        sessions = self._sessions[owner]
        self._num_bytes -= _size(sessions.pop(session_id))
        if not sessions:
            del self._sessions[owner]


def _size(session: Session) -> int:
    """What a session takes, with what the interpreter adds to its fields."""
    return len(session.body) + len(session.head.title) + 512
