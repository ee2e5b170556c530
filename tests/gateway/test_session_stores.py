"""Every store of sessions keeps what its interface promises."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis.exceptions

from sagellm_gateway.sessions import Session, SessionHead
from sagellm_gateway.sessions.file_store import FileSessionStore
from sagellm_gateway.sessions.redis_store import RedisSessionStore
from sagellm_gateway.sessions.store import MemorySessionStore, SessionStore
from sagellm_protocol import InvalidArgumentError, NotFoundError, ResourceExhaustedError, UnavailableError

EXPIRE_S = 1000.0


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 5000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", "file", "redis"])
async def store(request: pytest.FixtureRequest, clock: Clock, tmp_path: Path) -> AsyncIterator[SessionStore]:
    made: SessionStore
    if request.param == "memory":
        made = MemorySessionStore(expire_after_s=EXPIRE_S, max_memory_bytes=2**20, clock=clock)
    elif request.param == "file":
        made = FileSessionStore(tmp_path / "deep" / "s.sqlite", expire_after_s=EXPIRE_S, clock=clock)
    else:
        client = fakeredis.FakeAsyncRedis()
        made = RedisSessionStore(client, expire_after_s=EXPIRE_S, clock=clock)
    yield made
    await made.close()


def session(session_id: str, at: float = 5000.0, **fields: Any) -> Session:
    return Session(SessionHead(session_id, f"about {session_id}", None, at, at, **fields))


def saying(*texts: str) -> Callable[[Session], Session]:
    def edit(before: Session) -> Session:
        return before.with_messages([*before.messages, *({"role": "user", "content": text} for text in texts)])

    return edit


async def test_what_is_added_is_there(store: SessionStore) -> None:
    made = session("a").with_messages([{"role": "user", "content": "grüß dich 你好"}])
    await store.add("ada", made, max_sessions=5)
    found = await store.get("ada", "a")
    assert found == made
    assert found.head.num_messages == 1
    assert found.head.num_bytes == len(found.body)
    assert found.messages[0]["content"] == "grüß dich 你好"


async def test_owners_do_not_see_each_other(store: SessionStore) -> None:
    for owner in ("ada", "", "a:d a/{x}"):
        await store.add(owner, session("same").changed(title=owner), max_sessions=1)
    for owner in ("ada", "", "a:d a/{x}"):
        assert (await store.get(owner, "same")).head.title == owner
        assert [head.title for head in await store.heads(owner, limit=9, after=None)] == [owner]
    for attempt in (store.get("eve", "same"), store.delete("eve", "same"), store.change("eve", "same", saying("x"))):
        with pytest.raises(NotFoundError, match="no session 'same'"):
            await attempt
    await store.delete("ada", "same")
    assert (await store.get("", "same")).head.title == ""


async def test_an_id_is_taken_once_and_a_key_has_so_many_sessions(store: SessionStore) -> None:
    await store.add("ada", session("a"), max_sessions=2)
    with pytest.raises(InvalidArgumentError, match="already"):
        await store.add("ada", session("a"), max_sessions=2)
    await store.add("ada", session("b"), max_sessions=2)
    with pytest.raises(ResourceExhaustedError, match="2 sessions already"):
        await store.add("ada", session("c"), max_sessions=2)
    await store.delete("ada", "b")
    await store.add("ada", session("c"), max_sessions=2)


async def test_a_list_is_read_page_by_page(store: SessionStore) -> None:
    for number in range(5):
        await store.add("ada", session(f"s{number}", at=5000.0 + number // 2), max_sessions=9)
    seen: list[str] = []
    after = None
    while True:
        page = await store.heads("ada", limit=2, after=after)
        seen += [head.id for head in page]
        if len(page) < 2:
            break
        after = seen[-1]
    assert seen == ["s4", "s3", "s2", "s1", "s0"]
    with pytest.raises(NotFoundError):
        await store.heads("ada", limit=2, after="nobody")


async def test_a_change_moves_a_session_to_the_front(store: SessionStore) -> None:
    for name in ("a", "b"):
        await store.add("ada", session(name), max_sessions=9)
    changed = await store.change("ada", "a", lambda before: saying("hi")(before).changed(updated_at=5001.0))
    assert changed.head.num_messages == 1
    assert [head.id for head in await store.heads("ada", limit=9, after=None)] == ["a", "b"]


async def test_a_change_that_fails_changes_nothing(store: SessionStore) -> None:
    await store.add("ada", session("a"), max_sessions=9)

    def fail(_: Session) -> Session:
        raise ResourceExhaustedError("no")

    with pytest.raises(ResourceExhaustedError):
        await store.change("ada", "a", fail)
    assert (await store.get("ada", "a")) == session("a")
    assert (await store.change("ada", "a", saying("x"))).head.num_messages == 1


async def test_no_change_is_lost(store: SessionStore) -> None:
    await store.add("ada", session("a"), max_sessions=9)
    await asyncio.gather(*(store.change("ada", "a", saying(str(number))) for number in range(20)))
    texts = {message["content"] for message in (await store.get("ada", "a")).messages}
    assert texts == {str(number) for number in range(20)}


async def test_old_sessions_are_gone(store: SessionStore, clock: Clock) -> None:
    await store.add("ada", session("old", at=5000.0), max_sessions=1)
    clock.now = 5000.0 + EXPIRE_S + 1
    if not isinstance(store, RedisSessionStore):  # there Redis' own clock decides
        with pytest.raises(NotFoundError):
            await store.get("ada", "old")
    assert await store.heads("ada", limit=9, after=None) == []
    await store.purge()
    await store.add("ada", session("new", at=clock.now), max_sessions=1)
    assert [head.id for head in await store.heads("ada", limit=9, after=None)] == ["new"]


# ---- memory -------------------------------------------------------------------------------------------


async def test_memory_is_bounded() -> None:
    store = MemorySessionStore(expire_after_s=EXPIRE_S, max_memory_bytes=4000, clock=lambda: 5000.0)
    await store.add("ada", session("a"), max_sessions=9)
    await store.add("bob", session("b"), max_sessions=9)
    with pytest.raises(ResourceExhaustedError, match="all the memory"):
        await store.change("ada", "a", saying("x" * 3000))
    assert (await store.get("ada", "a")).head.num_messages == 0
    await store.delete("bob", "b")
    await store.change("ada", "a", saying("x" * 3000))


# ---- file ---------------------------------------------------------------------------------------------

WRITER = """
import asyncio, sys
from pathlib import Path
from sagellm_gateway.sessions.file_store import FileSessionStore

async def main():
    store = FileSessionStore(Path(sys.argv[1]), expire_after_s=1e9, clock=lambda: 5000.0)
    for number in range(int(sys.argv[3])):
        text = f"{sys.argv[2]}-{number}"
        await store.change("ada", "a", lambda s: s.with_messages([*s.messages, {"role": "user", "content": text}]))
    await store.close()

asyncio.run(main())
"""


async def test_processes_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    store = FileSessionStore(path, expire_after_s=1e9, clock=lambda: 5000.0)
    await store.add("ada", session("a"), max_sessions=9)
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), name, "25"], stderr=subprocess.PIPE, text=True)
        for name in ("x", "y")
    ]
    for number in range(25):
        await store.change("ada", "a", saying(f"z-{number}"))
    for writer in writers:
        _, errors = await asyncio.to_thread(writer.communicate)
        assert writer.returncode == 0, errors
    texts = [message["content"] for message in (await store.get("ada", "a")).messages]
    assert sorted(texts) == sorted(f"{name}-{number}" for name in "xyz" for number in range(25))
    for name in "xyz":  # each in its own order
        assert [text for text in texts if text[0] == name] == [f"{name}-{number}" for number in range(25)]
    await store.close()


async def test_a_file_outlives_its_store_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    for attempt in range(2):
        store = FileSessionStore(path, expire_after_s=1e9)
        if attempt == 0:
            await store.add("ada", session("a", at=5e9), max_sessions=9)
        assert (await store.get("ada", "a")).head.title == "about a"
        await store.close()
    assert path.stat().st_mode & 0o077 == 0


async def test_a_file_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no database, but long enough to look like one" * 50)
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        store = FileSessionStore(path, expire_after_s=1e9)
        with pytest.raises(UnavailableError, match="cannot be reached"):
            await store.get("ada", "a")
        await store.close()


async def test_a_locked_file_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    store = FileSessionStore(path, expire_after_s=1e9)
    await store.add("ada", session("a", at=5e9), max_sessions=9)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    changing = asyncio.ensure_future(store.change("ada", "a", saying("x")))
    await asyncio.sleep(0.1)
    assert not changing.done()
    other.execute("ROLLBACK")
    other.close()
    assert (await changing).head.num_messages == 1
    await store.close()


# ---- redis --------------------------------------------------------------------------------------------


async def test_redis_forgets_by_itself() -> None:
    client = fakeredis.FakeAsyncRedis()
    store = RedisSessionStore(client, expire_after_s=EXPIRE_S)
    await store.add("ada", session("a"), max_sessions=9)
    for key in await client.keys():
        assert 0 < await client.pttl(key) <= EXPIRE_S * 1e3
    await client.delete("sagellm:{key=ada}:session:a")  # as after its time
    with pytest.raises(NotFoundError):
        await store.get("ada", "a")
    assert await store.heads("ada", limit=9, after=None) == []
    await store.close()


async def test_redis_that_does_not_answer_is_said() -> None:
    store = RedisSessionStore.connect("redis://127.0.0.1:1/0", expire_after_s=EXPIRE_S)
    with pytest.raises(UnavailableError, match="does not answer"):
        await store.get("ada", "a")
    await store.close()
    assert issubclass(redis.exceptions.ConnectionError, redis.exceptions.RedisError)
