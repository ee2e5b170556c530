"""What the clients of `soak.py` do: calls of every API that is served, and what the answer to each must be."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from sagellm_benchmark.serve.http import HttpClient

TIMEOUT_S = 120.0
MODEL = "builtin"
TEXT = "the river was quiet and nobody had seen the small boat since morning because it rained on hill and harbour"
WORDS = TEXT.split()
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "look_up", "description": "Looks a name up.", "parameters": SCHEMA},
}


@dataclass(frozen=True, slots=True)
class Call:
    """One call, and what its answer must be."""

    name: str
    path: str
    body: dict[str, Any] | bytes | None = None
    method: str = "POST"
    status: int = 200
    end: bytes = b""  # what a whole answer holds; streams end with it
    streams: bool = False
    text_of: Callable[[bytes], str] | None = None  # of an answer that is always the same

    def encoded(self) -> bytes:
        """The body."""
        if self.body is None:
            return b""
        return self.body if isinstance(self.body, bytes) else msgspec.json.encode(self.body)


@dataclass
class Tally:
    """What all clients saw."""

    answered: Counter[str] = field(default_factory=Counter)  # by the name of the call
    num_left: int = 0  # calls that the client broke off, as it was told to
    failed: Counter[str] = field(default_factory=Counter)  # by the name and the kind of failure
    examples: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)  # of answers that are always the same

    def fail(self, call: Call, kind: str, example: str) -> None:
        """Note a call that was not asked to fail."""
        name = f"{call.name}: {kind}"
        self.failed[name] += 1
        self.examples.setdefault(name, example[:500])


class SoakClient:
    """One client; breaks off `leave_share` of the streams, and half as many of the other calls."""

    def __init__(self, http: HttpClient, tally: Tally, seed: int, leave_share: float) -> None:
        self._http = http
        self._tally = tally
        self._leave_share = leave_share
        self.random = random.Random(seed)

    def prompt(self, num_words: int) -> str:
        """Random words; the first ones are shared by many prompts, as a system message is."""
        shared = " ".join(WORDS * 3) if self.random.random() < 0.5 else ""
        return f"{shared} {' '.join(self.random.choices(WORDS, k=num_words))}".strip()

    async def ask(self, call: Call, *, may_leave: bool = True) -> bytes | None:
        """Make the call and judge its answer; None where it failed or was broken off."""
        share = self._leave_share * (1.0 if call.streams else 0.5)
        leaves = may_leave and call.body is not None and self.random.random() < share
        try:
            if leaves:
                await self._leave(call)
                self._tally.num_left += 1
                return None
            body = await asyncio.wait_for(self._whole(call), TIMEOUT_S)
        except (TimeoutError, asyncio.TimeoutError):
            self._tally.fail(call, "timeout", f"nothing within {TIMEOUT_S:g} s")
        except OSError as error:
            self._tally.fail(call, type(error).__name__, str(error))
        else:
            return body
        return None

    async def _whole(self, call: Call) -> bytes | None:
        async with self._http.call(call.method, call.path, call.encoded()) as answer:
            body = await answer.read()
        if answer.status != call.status:
            self._tally.fail(call, f"status {answer.status}", body.decode(errors="replace"))
        elif call.end not in body[-4096:]:
            self._tally.fail(call, "not whole", body[-500:].decode(errors="replace"))
        elif call.text_of is not None and (text := call.text_of(body)) != self._tally.texts.setdefault(call.name, text):
            self._tally.fail(call, "another text", f"{text!r}, not {self._tally.texts[call.name]!r}")
        else:
            self._tally.answered[call.name] += 1
            return body
        return None

    async def _leave(self, call: Call) -> None:
        """Go away after some pieces of the answer, or before the first."""
        num_pieces = self.random.randrange(4)
        async with self._http.call(call.method, call.path, call.encoded()) if num_pieces else _Nothing() as answer:
            if answer is None:
                calling = asyncio.ensure_future(self._whole_unjudged(call))
                await asyncio.wait({calling}, timeout=self.random.random() * 0.1)
                calling.cancel()
                await asyncio.gather(calling, return_exceptions=True)
                return
            async for _ in answer:
                num_pieces -= 1
                if num_pieces == 0:
                    return

    async def _whole_unjudged(self, call: Call) -> None:
        async with self._http.call(call.method, call.path, call.encoded()) as answer:
            await answer.read()


class _Nothing:
    """In the place of an answer where there is none."""

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(self, *_: object) -> None:
        return None


# ---- texts of answers ---------------------------------------------------------------------------------


def _chat_text(body: bytes) -> str:
    return str(msgspec.json.decode(body)["choices"][0]["message"]["content"])


def _streamed_text(body: bytes) -> str:
    events = [line[6:] for line in body.splitlines() if line.startswith(b"data: {")]
    return "".join(choice["text"] for event in events for choice in msgspec.json.decode(event)["choices"])


def _ollama_text(body: bytes) -> str:
    return str(msgspec.json.decode(body)["response"])


def _numbers(body: bytes) -> str:
    return str(msgspec.json.decode(body)["data"][0]["embedding"])


# ---- calls --------------------------------------------------------------------------------------------

_DONE = b"data: [DONE]\n\n"
_ENDLESS = {"ignore_eos": True}
_FIXED = [{"role": "user", "content": "Tell me of the sea."}]

_PATHS = f"""
/v1/models /v1/models/{MODEL} /health /ready /version /metrics /admin/stats /admin/engines /admin/config /api/tags
/api/ps /api/version /openapi.json /tokenizer_info /sessions /
"""
GETS = tuple(Call(f"GET {path}", path, method="GET") for path in _PATHS.split())

REFUSED = (
    Call("refused: model", "/v1/chat/completions", {"model": "none", "messages": _FIXED}, status=404),
    Call("refused: JSON", "/v1/chat/completions", b'{"model": ', status=400),
    Call("refused: field", "/v1/completions", {"model": MODEL, "prompt": "x", "bogus": 1}, status=400),
    Call("refused: length", "/v1/completions", {"model": MODEL, "prompt": [5] * 5000}, status=400),
    Call("refused: n", "/v1/chat/completions", {"model": MODEL, "messages": _FIXED, "n": 10**9}, status=400),
    Call("refused: path", "/v1/nothing", {}, status=404),
    Call("refused: schema", "/v1/messages", {"model": MODEL, "messages": _FIXED}, status=400),
    Call("refused: ollama", "/api/chat", {"model": "none", "messages": _FIXED}, status=404),
)

FIXED = (
    Call(
        "fixed chat", "/v1/chat/completions",
        {"model": MODEL, "messages": _FIXED, "temperature": 0, "max_tokens": 40, **_ENDLESS}, text_of=_chat_text,
    ),
    Call(
        "fixed chat, seeded", "/v1/chat/completions",
        {"model": MODEL, "messages": _FIXED, "temperature": 1.2, "seed": 7, "max_tokens": 30, **_ENDLESS},
        text_of=_chat_text,
    ),
    Call(
        "fixed completion, streamed", "/v1/completions",
        {"model": MODEL, "prompt": "Once upon a time", "temperature": 0, "max_tokens": 48, "stream": True, **_ENDLESS},
        streams=True, end=_DONE, text_of=_streamed_text,
    ),
    Call(
        "fixed ollama", "/api/generate",
        {"model": MODEL, "prompt": "Hello", "stream": False, "options": {"temperature": 0, "num_predict": 24}},
        text_of=_ollama_text,
    ),
    Call("fixed embedding", "/v1/embeddings", {"model": MODEL, "input": "a quiet river"}, text_of=_numbers),
)  # fmt: skip


def generated(client: SoakClient) -> Call:
    """A call that makes text, of any API, whole or streamed."""
    chance = client.random
    streams = chance.random() < 0.6
    messages = [{"role": "user", "content": client.prompt(chance.randint(1, 60))}]
    limit = chance.randint(1, 64)
    kind = chance.choice(_KINDS)
    call = kind(messages, limit, streams)
    return replace(call, name=f"{call.name}{', streamed' if streams else ''}", streams=streams)


def _chat(messages: list[Any], limit: int, streams: bool, **more: Any) -> Call:
    body = {"model": MODEL, "messages": messages, "max_tokens": limit, "stream": streams, **more}
    return Call("chat", "/v1/chat/completions", body, end=_DONE if streams else b"}")


def _long_chat(messages: list[Any], limit: int, streams: bool) -> Call:
    return replace(_chat(messages, limit * 3, streams, **_ENDLESS), name="chat, long")


def _many_choices(messages: list[Any], limit: int, streams: bool) -> Call:
    more = {"n": 3, "logprobs": True, "top_logprobs": 3, "stop": [" the", "zz"], "presence_penalty": 0.5}
    return replace(_chat(messages, limit, streams, **more), name="chat, n and logprobs")


def _structured(messages: list[Any], limit: int, streams: bool) -> Call:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    return replace(_chat(messages, limit + 40, streams, response_format=form), name="chat, schema")


def _tools(messages: list[Any], limit: int, streams: bool) -> Call:
    return replace(_chat(messages, limit + 60, streams, tools=[TOOL], tool_choice="required"), name="chat, tools")


def _completion(messages: list[Any], limit: int, streams: bool) -> Call:
    text = messages[0]["content"]
    prompt = text if streams else [text, "Once more"] if limit % 2 else [[5, 6, 7], [8, 9]]
    body = {"model": MODEL, "prompt": prompt, "max_tokens": limit, "stream": streams}
    return Call("completion", "/v1/completions", body, end=_DONE if streams else b"}")


def _beam(messages: list[Any], limit: int, _: bool) -> Call:
    body = {
        "model": MODEL,
        "prompt": messages[0]["content"],
        "max_tokens": limit,
        "strategy": "beam_search",
        "num_beams": 3,
    }
    return Call("completion, beams", "/v1/completions", body, end=b"}")


def _response(messages: list[Any], limit: int, streams: bool) -> Call:
    body = {"model": MODEL, "input": messages[0]["content"], "max_output_tokens": max(limit, 16), "stream": streams}
    return Call("response", "/v1/responses", body, end=b'"type":"response.' if streams else b"}")


def _message(messages: list[Any], limit: int, streams: bool) -> Call:
    body = {"model": MODEL, "messages": messages, "max_tokens": limit, "stream": streams}
    return Call("message", "/v1/messages", body, end=b"message_stop" if streams else b"}")


def _ollama_chat(messages: list[Any], limit: int, streams: bool) -> Call:
    body = {"model": MODEL, "messages": messages, "stream": streams, "options": {"num_predict": limit}}
    return Call("ollama chat", "/api/chat", body, end=b'"done":true')


def _ollama_generate(messages: list[Any], limit: int, streams: bool) -> Call:
    body = {"model": MODEL, "prompt": messages[0]["content"], "stream": streams, "options": {"num_predict": limit}}
    return Call("ollama generate", "/api/generate", body, end=b'"done":true')


_KINDS: tuple[Callable[[list[Any], int, bool], Call], ...] = (
    _chat, _chat, _long_chat, _many_choices, _structured, _tools, _completion, _completion, _beam,
    _response, _message, _message, _ollama_chat, _ollama_generate,
)  # fmt: skip


def small(client: SoakClient) -> Call:
    """A call that makes no text."""
    text = client.prompt(20)
    return client.random.choice(
        (
            Call("tokenize", "/tokenize", {"model": MODEL, "prompt": text}),
            Call("detokenize", "/detokenize", {"model": MODEL, "tokens": [5, 6, 7, 8]}),
            Call("embeddings", "/v1/embeddings", {"model": MODEL, "input": [text, text[:20]]}),
            Call("ollama embed", "/api/embed", {"model": MODEL, "input": text}),
            Call("ollama show", "/api/show", {"model": MODEL}),
            Call(
                "count tokens", "/v1/messages/count_tokens",
                {"model": MODEL, "messages": [{"role": "user", "content": text}]},
            ),
            *GETS,
        )
    )  # fmt: skip


# ---- what a client does -------------------------------------------------------------------------------


async def session(client: SoakClient) -> None:
    """A conversation that the gateway keeps: made, used by two APIs, read, exported, deleted."""
    made = await client.ask(Call("session, new", "/sessions", {"title": "soak"}, status=201), may_leave=False)
    if made is None:
        return
    path = f"/sessions/{msgspec.json.decode(made)['id']}"
    say = {"content": client.prompt(5), "max_tokens": 8}
    await client.ask(Call("session, message", f"{path}/messages", say))
    await client.ask(Call("session, stream", f"{path}/messages", {**say, "stream": True}, streams=True, end=_DONE))
    for name, at in (("read", path), ("export", f"{path}/export")):
        await client.ask(Call(f"session, {name}", at, method="GET"))
    await client.ask(Call("session, delete", path, method="DELETE"))


async def continued_response(client: SoakClient) -> None:
    """A stored response, continued and deleted."""
    body = {"model": MODEL, "input": client.prompt(4), "max_output_tokens": 16}
    first = await client.ask(Call("response, first", "/v1/responses", body), may_leave=False)
    if first is None:
        return
    earlier = msgspec.json.decode(first)["id"]
    await client.ask(Call("response, continued", "/v1/responses", {**body, "previous_response_id": earlier}))
    await client.ask(Call("response, delete", f"/v1/responses/{earlier}", method="DELETE"))


async def one_call(client: SoakClient) -> None:
    """Any single call: mostly text, some of it checked for being the same as ever, some that must be refused."""
    number = client.random.random()
    if number < 0.6:
        call = generated(client)
    elif number < 0.75:
        call = client.random.choice(FIXED)
    elif number < 0.92:
        call = small(client)
    else:
        await client.ask(client.random.choice(REFUSED), may_leave=False)
        return
    await client.ask(call)


async def everything(client: SoakClient) -> None:
    """Each kind of call once, so that what is made at the first use is there."""
    for call in (*GETS, *REFUSED, *FIXED):
        await client.ask(call, may_leave=False)
    messages = [{"role": "user", "content": client.prompt(10)}]
    for kind in dict.fromkeys(_KINDS):
        for streams in (False, True):
            await client.ask(replace(kind(messages, 8, streams), streams=streams), may_leave=False)
    await session(client)
    await continued_response(client)


ACTIONS: tuple[tuple[float, Callable[[SoakClient], Awaitable[None]]], ...] = (
    (0.9, one_call),
    (0.06, session),
    (0.04, continued_response),
)
