"""Hostile bodies against a real server: always a 4xx that helps, never a freeze, and memory stays where it was."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from cli_process import ServerProcess, server

pytestmark = pytest.mark.slow

MAX_BODY_BYTES = 8 * 2**20
# What the slowest hostile body may cost the server's processor; the event loop stands still meanwhile.
PATIENCE_S = 2.0

MALFORMED = (
    b"",
    b" ",
    b"{",
    b"}",
    b"null",
    b"1",
    b'"text"',
    b"[]",
    b"[{}]",
    b"{]",
    b'{"a"}',
    b'{"a":}',
    b'{"a":1,}',
    b"{'a':1}",
    b'{"a":1}{"b":2}',
    b'{"a":NaN}',
    b'{"a":Infinity}',
    b'{"a":0x10}',
    b'{"a":01}',
    b'{"a":1e400}',
    b'{"a":-1e400}',
    b'{"a":%s}' % (b"9" * 5000),
    b'{"a":"\xff\xfe"}',
    b'{"a":"\\ud800"}',
    b'{"a":"\\ud800 and more"}',
    b'{"a":"\\udc00\\ud800"}',
    b'{"a":"\\x41"}',
    b'{"a":"\\u12"}',
    b'{"a":"\x00"}',
    b'{"a":"unfinished',
    b"\xef\xbb\xbf{}",
    b"\x1f\x8b\x08\x00 not JSON but gzip",
    b"<xml/>",
    b"a=1&b=2",
    b"[" * 5_000,
    b'{"a":' * 500 + b"1" + b"}" * 500,
    b'{"a":' * 100 + b"1" + b"}" * 100,
)

VALUES: tuple[Any, ...] = (
    True,
    -1,
    0,
    2**31,
    2**63,
    2**64,
    10**30,
    1.5,
    -1e308,
    1e-308,
    "",
    "x",
    "\x00\x1f",
    "../../etc/passwd",
    "${jndi:ldap://x}{{7*7}}<script>",
    "\u202e\ufffe\U0010ffff",
    "x" * 100_000,
    [],
    [None],
    [[]],
    [1, "a", None, {}],
    [{}] * 100,
    ["x"] * 5_000,
    {},
    {"": ""},
    {"type": "text"},
    {str(number): number for number in range(2_000)},
    {"a": {"a": {"a": {"a": {"a": {"a": {}}}}}}},
)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with server(['{"log": {"access": "off"}}'], tmp_path_factory.mktemp("home"), module="fake_gateway") as process:
        yield process
        assert not [line for line in process.log if "Traceback" in line], "".join(process.log)


def cpu_s(process: ServerProcess) -> float:
    times = psutil.Process(process.process.pid).cpu_times()
    return float(times.user + times.system)


@pytest.fixture(scope="module")
def client(process: ServerProcess) -> Iterator[httpx.Client]:
    """Its answers have the extension `cpu_s`: what they cost the server, whatever else the machine does."""

    def begin(request: httpx.Request) -> None:
        request.extensions["cpu_s"] = cpu_s(process)

    def end(answer: httpx.Response) -> None:
        answer.extensions["cpu_s"] = cpu_s(process) - answer.request.extensions["cpu_s"]

    hooks = {"request": [begin], "response": [end]}
    with httpx.Client(base_url=process.url, timeout=60, event_hooks=hooks) as client:
        yield client


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> dict[str, Any]:
    whole: dict[str, Any] = client.get("/openapi.json").json()
    return whole


def paths_with_bodies(document: dict[str, Any]) -> list[str]:
    found = [path for path, operations in document["paths"].items() if "requestBody" in operations.get("post", {})]
    return [path.replace("{session_id}", "none") for path in found if not path.startswith("/admin")]


def message_of(answer: httpx.Response) -> str:
    error = answer.json()["error"]
    return error if isinstance(error, str) else error["message"]


def check_refused(answer: httpx.Response, what: object) -> None:
    assert 400 <= answer.status_code < 500, f"{answer.status_code} for {what!r:.200}: {answer.text[:500]}"
    message = message_of(answer)
    assert 15 <= len(message) <= 2_000, message
    assert answer.extensions["cpu_s"] < PATIENCE_S, f"{answer.extensions['cpu_s']} s for {what!r:.200}"


def test_malformed_json(client: httpx.Client, document: dict[str, Any]) -> None:
    for path in paths_with_bodies(document):
        for content in MALFORMED:
            takes_nothing = path in ("/sessions", "/sessions/none/clear") and not content
            if not takes_nothing:
                check_refused(client.post(path, content=content), (path, content))


def valid_bodies(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    hello = [{"role": "user", "content": "hi"}]
    known = {
        "/v1/chat/completions": {"messages": hello, "max_tokens": 1},
        "/v1/completions": {"prompt": "hi", "max_tokens": 1},
        "/v1/responses": {"input": "hi", "max_output_tokens": 1},
        "/v1/messages": {"messages": hello, "max_tokens": 1},
        "/api/chat": {"messages": hello, "options": {"num_predict": 1}},
        "/api/generate": {"prompt": "hi", "options": {"num_predict": 1}},
        "/v1/embeddings": {"input": "hi"},
        "/tokenize": {"prompt": "hi"},
        "/detokenize": {"tokens": [1]},
    }
    return {path: {"model": "m", **known.get(path, {})} for path in paths_with_bodies(document)}


def fields_of(document: dict[str, Any], path: str) -> list[str]:
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[-1]]
    return list(schema["properties"])


def test_wrong_values_in_every_field(client: httpx.Client, document: dict[str, Any]) -> None:
    for path, body in valid_bodies(document).items():
        if path.endswith(("/none/clear", "/none/messages")):
            continue
        for field in fields_of(document, path):
            for value in VALUES:
                answer = client.post(path, content=json.dumps({**body, field: value}))
                assert answer.status_code < 500, f"{path} {field}={value!r:.100}: {answer.text[:300]}"
                if answer.status_code >= 400:
                    check_refused(answer, (path, field, value))


def repeated(head: bytes, item: bytes, tail: bytes, *, size: int = MAX_BODY_BYTES - 1000) -> bytes:
    return head + b",".join([item] * ((size - len(head) - len(tail)) // (len(item) + 1))) + tail


CHAT = b'{"model":"m","messages":[{"role":"user","content":"hi"}],"max_tokens":1,'
HEAVY = {
    "parts of a message": repeated(b'{"model":"m","messages":[{"role":"user","content":[', b'{"text":""}', b"]}]}"),
    "messages": repeated(b'{"model":"m","messages":[', b'{"role":"user","content":"a"}', b"]}"),
    "token ids": repeated(b'{"model":"m","prompt":[', b"7", b'],"messages":[]}'),
    "prompts": repeated(b'{"model":"m","prompt":[', b'""', b'],"messages":[]}'),
    "lists": repeated(b'{"a":[', b"[]", b"]}"),
    "a tool's schema": repeated(CHAT + b'"tools":[{"function":{"name":"a","parameters":{"a":[', b"{}", b"]}}}]}"),
    "metadata": repeated(CHAT + b'"metadata":{"a":[', b"{}", b"]}}"),
    "annotations": repeated(b'{"model":"m","messages":[{"role":"user","content":"a","annotations":[', b"{}", b"]}]}"),
    "stop": repeated(CHAT + b'"stop":[', b'"a"', b"]}"),
    "numbers": repeated(CHAT + b'"stop":[', b"1e3", b"]}"),
    "unknown fields": CHAT + b",".join(b'"%d":0' % number for number in range(600_000)) + b"}",
    "logit_bias": CHAT + b'"logit_bias":{' + b",".join(b'"%d":0' % number for number in range(600_000)) + b"}}",
    "variables": CHAT + b'"chat_template_kwargs":{' + b",".join(b'"%d":{}' % n for n in range(500_000)) + b"}}",
    "a field's name": CHAT + b'"' + b"x" * (MAX_BODY_BYTES - 1000) + b'":1}',
    "a model's name": b'{"messages":[{"role":"user","content":"hi"}],"model":"'
    + b"x" * (MAX_BODY_BYTES - 1000)
    + b'"}',
    "a role": b'{"model":"m","messages":[{"content":"hi","role":"' + b"x" * (MAX_BODY_BYTES - 1000) + b'"}]}',
    "10 MB of prompt": b'{"model":"m","messages":[{"role":"user","content":"' + b"word " * 2_000_000 + b'"}]}',
}


@pytest.mark.parametrize("name", HEAVY)
def test_large_bodies_are_refused_at_once(client: httpx.Client, name: str) -> None:
    for path in ("/v1/chat/completions", "/v1/messages", "/api/chat", "/v1/responses"):
        check_refused(client.post(path, content=HEAVY[name]), (path, name))


def test_mutations_of_valid_bodies(client: httpx.Client, document: dict[str, Any]) -> None:
    dice = random.Random(4)
    for path, body in valid_bodies(document).items():
        text = json.dumps(body).encode()
        for _ in range(100):
            mutant = bytearray(text)
            for _ in range(dice.randint(1, 4)):
                place = dice.randrange(len(mutant))
                change = dice.randrange(3)
                if change == 0:
                    mutant[place] = dice.randrange(256)
                elif change == 1:
                    del mutant[place : place + dice.randint(1, 8)]
                else:
                    mutant[place:place] = dice.choice((b'"', b"{", b"]", b"\\", b"\\ud800", b"1e999", b"\xf0", b"null"))
                mutant = mutant or bytearray(b"x")
            answer = client.post(path, content=bytes(mutant))
            assert answer.status_code < 500, f"{path} {bytes(mutant)!r}: {answer.text[:300]}"
            if answer.status_code >= 400:
                check_refused(answer, (path, bytes(mutant)))


def test_memory_stays_where_it_was(process: ServerProcess, client: httpx.Client, document: dict[str, Any]) -> None:
    memory = psutil.Process(process.process.pid)

    def attack() -> None:
        for content in HEAVY.values():
            client.post("/v1/chat/completions", content=content)
        for content in MALFORMED * 5:
            client.post("/v1/completions", content=content)

    attack()
    before = memory.memory_info().rss
    cpu_before_s = cpu_s(process)
    for _ in range(3):
        attack()
    assert memory.memory_info().rss - before < 32 * 2**20
    assert client.get("/health").status_code == 200
    assert cpu_s(process) - cpu_before_s < 60
