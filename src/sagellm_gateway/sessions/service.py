"""Sessions as callers see them: their own only, within limits, with titles that come by themselves."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from sagellm_gateway.context import Caller
from sagellm_gateway.pieces import Answer
from sagellm_gateway.sessions.file_store import FileSessionStore
from sagellm_gateway.sessions.redis_store import RedisSessionStore
from sagellm_gateway.sessions.session import Session, SessionHead, SessionSettings
from sagellm_gateway.sessions.store import MemorySessionStore, SessionStore
from sagellm_protocol import ChatMessage, InvalidArgumentError, ResourceExhaustedError, UnavailableError, new_session_id

logger = logging.getLogger(__name__)

TITLE_CHARS = 60
_PURGE_EVERY_S = 600.0
_SYSTEM_ROLES = ("system", "developer")


class Sessions:
    """See the module. Without keys all callers are one: they share their sessions.

    Methods that name a session raise `NotFoundError` where the caller has none of that id, and all raise
    `UnavailableError` where the store does not answer.
    """

    def __init__(
        self, settings: SessionSettings, store: SessionStore | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._settings = settings
        self._store = store or make_store(settings)
        self._clock = clock

    async def close(self) -> None:
        """Let go of the store."""
        await self._store.close()

    async def run(self) -> None:
        """Free what expired sessions take, again and again, until cancelled."""
        while True:
            await asyncio.sleep(_PURGE_EVERY_S)
            try:
                await self._store.purge()
            except UnavailableError as error:  # the next call will say so, too
                logger.warning("%s", error)

    # ---- what the API offers --------------------------------------------------------------------------

    async def create(
        self,
        caller: Caller,
        *,
        session_id: str | None = None,
        title: str | None = None,
        model: str | None = None,
        messages: Sequence[ChatMessage] = (),
    ) -> Session:
        """A new session. Raises `InvalidArgumentError` for an id that is taken, `ResourceExhaustedError` for one too
        many or too large.
        """
        now = self._clock()
        head = SessionHead(session_id or new_session_id(), title or "", model, created_at=now, updated_at=now)
        session = self._with_messages(Session(head), [_to_plain(message) for message in messages])
        self._check_size(session, num_more=0)
        await self._store.add(_owner(caller), session, max_sessions=self._settings.max_sessions)
        return session

    async def get(self, session_id: str, caller: Caller) -> Session:
        """A session with its messages."""
        return await self._store.get(_owner(caller), session_id)

    async def heads(self, caller: Caller, *, limit: int, after: str | None = None) -> list[SessionHead]:
        """The caller's sessions, the last changed first; at most `limit`, from the one behind `after` on."""
        return await self._store.heads(_owner(caller), limit=limit, after=after)

    async def change(self, session_id: str, caller: Caller, **fields: Any) -> Session:
        """Give the session another title or model."""
        return await self._store.change(_owner(caller), session_id, lambda session: session.changed(**fields))

    async def clear(self, session_id: str, caller: Caller, *, keep: int = 0) -> Session:
        """Forget the messages behind the first `keep`."""

        def cut(session: Session) -> Session:
            return session.with_messages(session.messages[:keep]).changed(updated_at=self._clock())

        return await self._store.change(_owner(caller), session_id, cut)

    async def delete(self, session_id: str, caller: Caller) -> None:
        """Forget the session."""
        await self._store.delete(_owner(caller), session_id)

    # ---- what a conversation needs --------------------------------------------------------------------

    async def history(self, session_id: str, caller: Caller) -> tuple[list[ChatMessage], float]:
        """The conversation so far, and when it was changed last.

        Raises `ResourceExhaustedError` where no further turn has room.
        """
        session = await self.get(session_id, caller)
        self._check_size(session, num_more=2)
        return [ChatMessage.model_validate(message) for message in session.messages], session.head.updated_at

    async def remember(
        self,
        session_id: str,
        caller: Caller,
        messages: Sequence[ChatMessage],
        answer: Answer,
        *,
        unchanged_since: float | None = None,
    ) -> None:
        """Add a turn: what was new in the request, and the answer's first choice. All of it, or nothing.

        System messages are kept at the head of a session, the last given ones. With `unchanged_since`, nothing is added
        to a session that was changed after that.
        """
        turn = [_to_plain(message) for message in messages]
        turn.append(_answer_message(answer))

        def add(session: Session) -> Session:
            if unchanged_since not in (None, session.head.updated_at):
                return session
            return self._with_messages(session, joined(session.messages, turn)).changed(updated_at=self._clock())

        await self._store.change(_owner(caller), session_id, add)

    # ---- steps of the above ---------------------------------------------------------------------------

    def _with_messages(self, session: Session, messages: list[dict[str, Any]]) -> Session:
        session = session.with_messages(messages)
        return session if session.head.title else session.changed(title=title_of(messages))

    def _check_size(self, session: Session, *, num_more: int) -> None:
        head, limits = session.head, self._settings
        if head.num_messages + num_more > limits.max_messages or head.num_bytes >= limits.max_bytes:
            raise ResourceExhaustedError(
                f"the session holds {head.num_messages} messages of {head.num_bytes} bytes; it may hold "
                f"{limits.max_messages} of {limits.max_bytes}: clear it or begin another",
                retryable=False,
                field="session_id",
            )


def make_store(settings: SessionSettings) -> SessionStore:
    """The store that the settings ask for."""
    if settings.store == "file":
        return FileSessionStore(settings.path, expire_after_s=settings.expire_after_s)
    if settings.url is not None:
        return RedisSessionStore.connect(settings.url, expire_after_s=settings.expire_after_s)
    return MemorySessionStore(expire_after_s=settings.expire_after_s, max_memory_bytes=settings.max_memory_bytes)


def joined(history: Sequence[Any], messages: Sequence[Any]) -> list[Any]:
    """The conversation `history` with `messages` behind it; system messages that lead `messages` replace its own.

    Takes `ChatMessage`s or their plain values.
    """
    num_new = _num_leading_system(messages)
    if num_new == 0:
        return [*history, *messages]
    return [*messages[:num_new], *history[_num_leading_system(history) :], *messages[num_new:]]


def title_of(messages: Sequence[dict[str, Any]]) -> str:
    """The user's first message on one line, shortened at a word; empty where there is none."""
    first = next((message for message in messages if message["role"] == "user"), None)
    if first is None:
        return ""
    words = " ".join(ChatMessage.model_validate(first).text.split())
    if len(words) <= TITLE_CHARS:
        return words
    head = words[: TITLE_CHARS - 1]
    return f"{head.rsplit(' ', 1)[0] if ' ' in head[TITLE_CHARS // 2 :] else head}…"


def _num_leading_system(messages: Sequence[Any]) -> int:
    roles = (message["role"] if isinstance(message, dict) else message.role for message in messages)
    return next((count for count, role in enumerate(roles) if role not in _SYSTEM_ROLES), len(messages))


def _owner(caller: Caller) -> str:
    return caller.key_name or ""


def _to_plain(message: ChatMessage) -> dict[str, Any]:
    return message.model_dump(mode="json", exclude_none=True)


def _answer_message(answer: Answer) -> dict[str, Any]:
    if not answer.choices:
        raise InvalidArgumentError("an answer without a choice cannot be kept")
    choice = answer.choices[0]
    message = ChatMessage(
        role="assistant",
        content=None if choice.tool_calls and not choice.text else choice.text,
        reasoning_content=choice.reasoning or None,
        tool_calls=choice.tool_calls or None,
    )
    return _to_plain(message)
