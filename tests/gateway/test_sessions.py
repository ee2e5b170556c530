"""`/sessions`, and chat requests that name one."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from asgi_client import LeavingClient, client_of, events_in
from fake_engine import FakeEngine
from sagellm_control_plane import ControlPlaneManager
from sagellm_gateway import create_app
from sagellm_gateway.app import Gateway
from sagellm_gateway.keys import key_of
from sagellm_gateway.sessions import SessionSettings
from sagellm_gateway.settings import AuthSettings, GatewaySettings
from waiting import until

CHAT = "/v1/chat/completions"
ADA, BOB = "sk-sage-adaadaadaadaadaada", "sk-sage-bobbobbobbobbobbob"


def make_app(engine: FakeEngine, *, keys: bool = False, **limits: Any) -> Gateway:
    manager = ControlPlaneManager()
    manager.register_engine(engine, engine_id="fake", model="m")
    known = [key_of(ADA, name="ada"), key_of(BOB, name="bob")] if keys else []
    settings = GatewaySettings(auth=AuthSettings(keys=known), sessions=SessionSettings(**limits))
    return create_app(manager, default_model="m", settings=settings)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def app(engine: FakeEngine) -> Gateway:
    return make_app(engine)


async def begin(client: httpx.AsyncClient, **fields: Any) -> str:
    answer = await client.post("/sessions", json=fields)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def asked(app: Gateway, session_id: str) -> LeavingClient:
    """Somebody who asks something in a session, and has the first words of a long answer."""
    body = {"messages": [{"role": "user", "content": "hi"}], "session_id": session_id, "stream": True}
    caller = LeavingClient(app, CHAT, {**body, "max_tokens": 4000})
    await until(lambda: sum(b"w1 " in message.get("body", b"") for message in caller.sent))
    return caller


def roles(engine: FakeEngine) -> list[tuple[str, str]]:
    """What the engine was asked last."""
    return [(message.role, message.text) for message in engine.requests[-1].messages or ()]


# ---- the life of a session ----------------------------------------------------------------------------


async def test_create_get_rename_and_delete(client: httpx.AsyncClient) -> None:
    answer = await client.post("/sessions")
    assert answer.status_code == 201
    made = answer.json()
    assert made["object"] == "session"
    assert (made["title"], made["model"], made["messages"], made["num_messages"]) == ("", None, [], 0)
    path = f"/sessions/{made['id']}"
    assert (await client.get(path)).json() == made
    assert (await client.patch(path, json={"title": "Tea", "model": "m"})).json()["title"] == "Tea"
    assert (await client.get(path)).json()["model"] == "m"
    assert (await client.delete(path)).json() == {"id": made["id"], "object": "session.deleted", "deleted": True}
    answer = await client.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == "session_id"


async def test_an_id_may_be_chosen_once(client: httpx.AsyncClient) -> None:
    assert await begin(client, id="my-chat.1") == "my-chat.1"
    answer = await client.post("/sessions", json={"id": "my-chat.1"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "id")


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("POST", "/sessions", {"id": "../x"}, "id"),
        ("POST", "/sessions", {"title": "x" * 201}, "title"),
        ("POST", "/sessions", {"name": "x"}, "name"),
        ("POST", "/sessions", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("GET", "/sessions?limit=0", None, "limit"),
        ("GET", "/sessions?limit=101", None, "limit"),
        ("GET", "/sessions?limit=x", None, "limit"),
        ("PATCH", "/sessions/s", {"title": None}, "title"),
        ("PATCH", "/sessions/s", {"messages": []}, "messages"),
        ("POST", "/sessions/s/clear", {"keep": -1}, "keep"),
        ("POST", "/sessions/s/messages", {}, "content"),
        ("POST", "/sessions/s/messages", {"content": "x", "messages": []}, "content"),
        ("POST", "/sessions/s/messages", {"content": "x", "max_token": 1}, "max_token"),
        ("POST", "/sessions/import", {"version": 2, "messages": []}, "version"),
        ("POST", "/sessions/import", {}, "messages"),
    ],
)
async def test_what_is_wrong_is_named(
    client: httpx.AsyncClient, method: str, path: str, body: dict[str, Any] | None, param: str
) -> None:
    await begin(client, id="s")
    answer = await client.request(method, path, json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


async def test_lists_come_in_pages(client: httpx.AsyncClient) -> None:
    assert (await client.get("/sessions")).json() == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }
    made = {await begin(client, title=str(number)) for number in range(5)}
    first = (await client.get("/sessions?limit=3")).json()
    assert first["has_more"] is True
    assert first["last_id"] == first["data"][-1]["id"]
    assert "messages" not in first["data"][0]
    second = (await client.get("/sessions", params={"limit": 3, "after": first["last_id"]})).json()
    assert second["has_more"] is False
    assert {entry["id"] for entry in first["data"] + second["data"]} == made
    assert (await client.get("/sessions?after=nobody")).status_code == 404


async def test_what_is_exported_can_be_imported(client: httpx.AsyncClient) -> None:
    session_id = await begin(client, title="Tea", messages=[{"role": "user", "content": "tea?"}])
    answer = await client.get(f"/sessions/{session_id}/export")
    assert answer.headers["content-disposition"] == f'attachment; filename="{session_id}.json"'
    answer = await client.post("/sessions/import", json=answer.json())
    assert answer.status_code == 201
    copy = answer.json()
    assert copy["id"] != session_id
    assert (copy["title"], copy["messages"]) == ("Tea", [{"role": "user", "content": "tea?"}])


# ---- turns --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_request_continues_its_session(
    client: httpx.AsyncClient, engine: FakeEngine, stream: bool
) -> None:
    session_id = await begin(client)
    for number, text in enumerate(("first   question\nof mine", "second")):
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 2, "session_id": session_id}
        answer = await client.post(CHAT, json={**body, "stream": stream})
        assert answer.status_code == 200, answer.text
        assert len(roles(engine)) == 2 * number + 1
    assert roles(engine) == [("user", "first   question\nof mine"), ("assistant", "w0 w1 "), ("user", "second")]
    session = (await client.get(f"/sessions/{session_id}")).json()
    assert [message["role"] for message in session["messages"]] == ["user", "assistant"] * 2
    assert session["messages"][-1] == {"role": "assistant", "content": "w0 w1 "}
    assert session["title"] == "first question of mine"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_message_is_answered_and_kept(client: httpx.AsyncClient, engine: FakeEngine, stream: bool) -> None:
    session_id = await begin(client, model="m", messages=[{"role": "system", "content": "Be brief."}])
    path = f"/sessions/{session_id}/messages"
    answer = await client.post(path, json={"content": "hi", "max_tokens": 2, "stream": stream})
    assert answer.status_code == 200, answer.text
    if stream:
        events = events_in(answer.text)
        assert events[-1] == "[DONE]"
        assert events[0]["object"] == "chat.completion.chunk"
    else:
        assert answer.json()["choices"][0]["message"]["content"] == "w0 w1 "
    assert roles(engine) == [("system", "Be brief."), ("user", "hi")]
    session = (await client.get(f"/sessions/{session_id}")).json()
    assert [message["role"] for message in session["messages"]] == ["system", "user", "assistant"]
    assert session["title"] == "hi"


async def test_a_new_system_message_replaces_the_old_one(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    session_id = await begin(client, messages=[{"role": "system", "content": "old"}, {"role": "user", "content": "a"}])
    messages = [{"role": "system", "content": "new"}, {"role": "user", "content": "b"}]
    await client.post(CHAT, json={"messages": messages, "session_id": session_id, "max_tokens": 1})
    assert roles(engine) == [("system", "new"), ("user", "a"), ("user", "b")]
    session = (await client.get(f"/sessions/{session_id}")).json()
    assert [message["content"] for message in session["messages"]] == ["new", "a", "b", "w0 "]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_failed_is_not_kept(client: httpx.AsyncClient, stream: bool) -> None:
    session_id = await begin(client)
    body = {"messages": [{"role": "user", "content": "fail"}], "session_id": session_id, "stream": stream}
    await client.post(CHAT, json=body)
    assert (await client.get(f"/sessions/{session_id}")).json()["num_messages"] == 0


async def test_an_answer_that_was_cut_short_is_kept_as_far_as_it_came(
    client: httpx.AsyncClient, app: Gateway, engine: FakeEngine
) -> None:
    session_id = await begin(client)
    caller = await asked(app, session_id)
    caller.leave()
    await caller.done
    await until(lambda: not any("remember" in repr(task) for task in app.tasks))
    session = (await client.get(f"/sessions/{session_id}")).json()
    assert session["messages"][0]["content"] == "hi"
    assert session["messages"][1]["content"].startswith("w0 w1 ")
    assert engine.cancelled


@pytest.mark.parametrize("step", ["clear", "messages"])
async def test_an_answer_that_was_cut_short_is_not_added_to_what_came_after(
    client: httpx.AsyncClient, app: Gateway, step: str
) -> None:
    """As where a page stops an answer, takes it back and goes on before the server has noticed that it left."""
    session_id = await begin(client)
    caller = await asked(app, session_id)
    after = {"clear": {"keep": 0}, "messages": {"content": "again", "max_tokens": 1}}[step]
    assert (await client.post(f"/sessions/{session_id}/{step}", json=after)).status_code == 200
    held = (await client.get(f"/sessions/{session_id}")).json()
    caller.leave()
    await caller.done
    await until(lambda: not any("remember" in repr(task) for task in app.tasks))
    assert (await client.get(f"/sessions/{session_id}")).json() == held


async def test_who_leaves_in_the_midst_may_have_deleted_the_session(
    client: httpx.AsyncClient, app: Gateway, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    session_id = await begin(client)
    body = {"model": "m", "session_id": session_id, "messages": [{"role": "user", "content": "hi"}], "stream": True}
    caller = LeavingClient(app, CHAT, {**body, "max_tokens": 4000})
    await until(lambda: len(caller.sent) > 3)
    assert (await client.delete(f"/sessions/{session_id}")).status_code == 200
    caller.leave()
    await caller.done
    await until(lambda: not any("remember" in str(task.get_coro()) for task in app.tasks))
    assert not [record for record in caplog.records if record.name.startswith("sagellm")]


async def test_clearing_keeps_the_session_and_what_was_asked_to_stay(client: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": text} for text in "abc"]
    session_id = await begin(client, messages=messages)
    cut = (await client.post(f"/sessions/{session_id}/clear", json={"keep": 2})).json()
    assert [message["content"] for message in cut["messages"]] == ["a", "b"]
    cleared = (await client.post(f"/sessions/{session_id}/clear")).json()
    assert (cleared["messages"], cleared["title"]) == ([], "a")


async def test_titles_are_short_and_end_at_a_word(client: httpx.AsyncClient) -> None:
    for text, title in (
        ("word " * 30, "word word word word word word word word word word word…"),
        ("x" * 100, "x" * 59 + "…"),
        ("在" * 100, "在" * 59 + "…"),
        ("exactly this", "exactly this"),
    ):
        session_id = await begin(client, messages=[{"role": "user", "content": text}])
        assert (await client.get(f"/sessions/{session_id}")).json()["title"] == title


# ---- limits and isolation -----------------------------------------------------------------------------


async def test_a_full_session_takes_no_further_turn(engine: FakeEngine) -> None:
    async with client_of(make_app(engine, max_messages=2)) as client:
        client.base_url = httpx.URL("http://localhost")
        session_id = await begin(client)
        path = f"/sessions/{session_id}/messages"
        assert (await client.post(path, json={"content": "hi", "max_tokens": 1})).status_code == 200
        answer = await client.post(path, json={"content": "hi", "max_tokens": 1})
        assert answer.status_code == 429
        assert answer.headers["x-should-retry"] == "false"
        assert "clear it or begin another" in answer.json()["error"]["message"]
        await client.post(f"/sessions/{session_id}/clear")
        assert (await client.post(path, json={"content": "hi", "max_tokens": 1})).status_code == 200


async def test_sessions_are_bounded_in_number_and_size(engine: FakeEngine) -> None:
    async with client_of(make_app(engine, max_sessions=1, max_bytes=1024)) as client:
        client.base_url = httpx.URL("http://localhost")
        large = [{"role": "user", "content": "x" * 2000}]
        assert (await client.post("/sessions", json={"messages": large})).status_code == 429
        await begin(client)
        assert (await client.post("/sessions")).status_code == 429


async def test_keys_do_not_see_each_others_sessions(engine: FakeEngine) -> None:
    async with client_of(make_app(engine, keys=True)) as client:
        ada, bob = ({"Authorization": f"Bearer {key}"} for key in (ADA, BOB))
        made = await client.post("/sessions", json={"id": "s", "title": "private"}, headers=ada)
        assert made.status_code == 201, made.text
        assert (await client.get("/sessions", headers=bob)).json()["data"] == []
        body = {"messages": [{"role": "user", "content": "hi"}], "session_id": "s"}
        for method, path, content in (
            ("GET", "/sessions/s", None),
            ("GET", "/sessions/s/export", None),
            ("PATCH", "/sessions/s", {"title": "mine"}),
            ("DELETE", "/sessions/s", None),
            ("POST", "/sessions/s/clear", None),
            ("POST", "/sessions/s/messages", {"content": "hi"}),
            ("POST", CHAT, body),
            ("POST", CHAT, {**body, "stream": True}),
        ):
            assert (await client.request(method, path, json=content, headers=bob)).status_code == 404, path
        assert (await client.get("/sessions/s", headers=ada)).json()["title"] == "private"
        assert (await client.get("/sessions/s")).status_code == 401


async def test_sessions_in_a_file_are_there_after_a_restart(engine: FakeEngine, tmp_path: Any) -> None:
    for attempt in range(2):
        async with client_of(make_app(FakeEngine(), store="file", path=tmp_path / "s.sqlite")) as client:
            client.base_url = httpx.URL("http://localhost")
            if attempt == 0:
                await begin(client, id="s", title="kept")
            assert (await client.get("/sessions/s")).json()["title"] == "kept"
