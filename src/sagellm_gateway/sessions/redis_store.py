"""Sessions in Redis, for several gateways that serve the same callers. Redis itself forgets them when they expire.

Keys, with the owner in braces, so that a cluster keeps all of an owner in one slot:
`sagellm:{key=OWNER}:session:ID`, a hash of head and body, and `sagellm:{key=OWNER}:sessions`, ids by their last change.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec

from sagellm_gateway.sessions.session import Session, SessionHead
from sagellm_gateway.sessions.store import Edit, id_taken, not_found, too_many
from sagellm_protocol import UnavailableError, UnsupportedError

if TYPE_CHECKING:
    from redis.asyncio import Redis

_MAX_TRIES = 64
_encode = msgspec.json.Encoder().encode
_decode_head = msgspec.json.Decoder(SessionHead).decode


class RedisSessionStore:
    """See the module. `client` is a `redis.asyncio.Redis` that answers bytes."""

    def __init__(self, client: Redis, *, expire_after_s: float, clock: Callable[[], float] = time.time) -> None:
        self._client: Any = client  # its types allow for answers that only other settings give
        self._expire_after_s = expire_after_s
        self._clock = clock

    @classmethod
    def connect(cls, url: str, *, expire_after_s: float) -> RedisSessionStore:
        """A store at `url`; the connection is made with the first call."""
        try:
            from redis.asyncio import Redis
        except ImportError as error:
            raise UnsupportedError(
                "sessions in redis need its client; install it: pip install 'isagellm[redis]'"
            ) from error
        return cls(Redis.from_url(url, socket_timeout=10, socket_connect_timeout=5), expire_after_s=expire_after_s)

    async def close(self) -> None:
        """As the interface says."""
        await self._client.aclose()

    async def add(self, owner: str, session: Session, *, max_sessions: int) -> None:
        """As the interface says."""
        key, index = _key(owner, session.head.id), _index(owner)

        async def add(pipe: Any) -> None:
            if await pipe.exists(key):
                raise id_taken(session.head.id)
            await pipe.zremrangebyscore(index, "-inf", self._clock() - self._expire_after_s)
            if await pipe.zcard(index) >= max_sessions:
                raise too_many(max_sessions)
            pipe.multi()
            self._put(pipe, owner, session)

        await self._transact(add, key, index)

    async def get(self, owner: str, session_id: str) -> Session:
        """As the interface says."""
        async with _reached():
            return _session(session_id, await self._client.hmget(_key(owner, session_id), "head", "body"))

    async def heads(self, owner: str, *, limit: int, after: str | None) -> list[SessionHead]:
        """As the interface says."""
        index, start = _index(owner), 0
        async with _reached():
            await self._client.zremrangebyscore(index, "-inf", self._clock() - self._expire_after_s)
            if after is not None:
                rank = await self._client.zrevrank(index, after)
                if rank is None:
                    raise not_found(after)
                start = rank + 1
            ids = await self._client.zrevrange(index, start, start + limit - 1)
            pipe = self._client.pipeline(transaction=False)
            for session_id in ids:
                pipe.hget(_key(owner, session_id.decode()), "head")
            return [_decode_head(head) for head in await pipe.execute() if head is not None]

    async def change(self, owner: str, session_id: str, edit: Edit) -> Session:
        """As the interface says."""
        key = _key(owner, session_id)

        async def change(pipe: Any) -> Session:
            after = edit(_session(session_id, await pipe.hmget(key, "head", "body")))
            pipe.multi()
            self._put(pipe, owner, after)
            return after

        result = await self._transact(change, key)
        assert result is not None
        return result

    async def delete(self, owner: str, session_id: str) -> None:
        """As the interface says."""
        async with _reached():
            pipe = self._client.pipeline()
            pipe.delete(_key(owner, session_id))
            pipe.zrem(_index(owner), session_id)
            if not (await pipe.execute())[0]:
                raise not_found(session_id)

    async def purge(self) -> None:
        """Nothing to do: Redis forgets by itself."""

    # ---- steps of the above ---------------------------------------------------------------------------

    def _put(self, pipe: Any, owner: str, session: Session) -> None:
        head, key, index = session.head, _key(owner, session.head.id), _index(owner)
        expires_ms = int(self._expire_after_s * 1e3)
        pipe.hset(key, mapping={"head": _encode(head), "body": session.body})
        pipe.pexpire(key, expires_ms)
        pipe.zadd(index, {head.id: head.updated_at})
        pipe.pexpire(index, expires_ms)

    async def _transact(self, work: Any, *keys: str) -> Session | None:
        """Run `work`, which reads and then queues its writes, until nobody wrote to `keys` in between."""
        from redis.exceptions import WatchError

        async with _reached(), self._client.pipeline() as pipe:
            for _ in range(_MAX_TRIES):
                try:
                    await pipe.watch(*keys)
                    result: Session | None = await work(pipe)
                    await pipe.execute()
                except WatchError:
                    continue
                return result
        raise UnavailableError("the session is changed by many at the same time; try again")


@asynccontextmanager
async def _reached() -> AsyncIterator[None]:
    """Errors of the connection become ours."""
    from redis.exceptions import RedisError

    try:
        yield
    except RedisError as error:
        raise UnavailableError(f"the session store does not answer: {error}") from error


def _key(owner: str, session_id: str) -> str:
    return f"{_tag(owner)}:session:{session_id}"


def _index(owner: str) -> str:
    return f"{_tag(owner)}:sessions"


def _tag(owner: str) -> str:
    # Never empty: empty braces would not keep keys together.
    return f"sagellm:{{key={quote(owner, safe='')}}}"


def _session(session_id: str, found: list[bytes | None]) -> Session:
    head, body = found
    if head is None or body is None:
        raise not_found(session_id)
    return Session(_decode_head(head), body)
