from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from sagellm_benchmark.serve.http import BrokenAnswerError, HttpClient
from sagellm_protocol import InvalidArgumentError

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Kind: whole\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class Server:
    """Answers each call with `script`, in turn; notes connections and what was asked."""

    def __init__(self, *script: bytes | Serve) -> None:
        self.script = list(script)
        self.calls: list[bytes] = []
        self.num_connections = 0
        self.closed = asyncio.Event()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while self.script:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                self.calls.append(head + await reader.readexactly(length))
                step = self.script.pop(0)
                if isinstance(step, bytes):
                    writer.write(step)
                    await writer.drain()
                else:
                    await step(reader, writer)
            await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.closed.set()
            writer.close()


@asynccontextmanager
async def calling(*script: bytes | Serve) -> AsyncIterator[tuple[HttpClient, Server]]:
    behaviour = Server(*script)
    server = await asyncio.start_server(behaviour.handle, "127.0.0.1", 0)
    client = HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/base", headers={"X-Ours": "1"})
    try:
        yield client, behaviour
    finally:
        client.close()
        server.close()


async def read(client: HttpClient, body: bytes = b"") -> bytes:
    async with client.call("POST", "/path", body) as answer:
        return await answer.read()


async def test_a_call_says_what_it_should_and_its_connection_is_used_again() -> None:
    async with calling(WHOLE, WHOLE) as (client, server):
        async with client.call("POST", "/path", b"body") as answer:
            assert (answer.status, answer.headers["x-kind"]) == (200, "whole")
            assert await answer.read() == b"hello"
        assert await read(client) == b"hello"
        assert server.num_connections == 1
        assert server.calls[0].startswith(b"POST /base/path HTTP/1.1\r\n")
        assert server.calls[0].endswith(b"X-Ours: 1\r\nContent-Length: 4\r\n\r\nbody")


async def test_calls_at_the_same_time_have_connections_of_their_own() -> None:
    async with calling(WHOLE, WHOLE, WHOLE) as (client, server):
        assert await asyncio.gather(*(read(client) for _ in range(3))) == [b"hello"] * 3
        assert server.num_connections == 3


async def test_pieces_come_with_the_moments_at_which_they_came() -> None:
    has_come = asyncio.Event()

    async def slowly(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + b"3\r\nabc\r\n")
        await has_come.wait()
        await asyncio.sleep(0.03)
        writer.write(b"2\r\nde\r\n0\r\n\r\n")

    pieces = []
    async with calling(slowly) as (client, _), client.call("GET", "/") as answer:
        async for piece in answer:
            pieces.append(piece)
            has_come.set()
    assert b"".join(piece for _, piece in pieces) == b"abcde"
    assert pieces[-1][0] - pieces[0][0] > 0.02


async def test_a_body_without_a_length_ends_with_its_connection() -> None:
    async def close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nall of it")
        writer.close()

    async with calling(close, WHOLE) as (client, server):
        assert await read(client) == b"all of it"
        assert await read(client) == b"hello"
        assert server.num_connections == 2


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\n", CHUNKED + b"5\r\nhel", WHOLE[:-1]])
async def test_an_answer_that_is_cut_off_is_an_error(begun: bytes) -> None:
    async def cut(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(begun)
        writer.close()

    async with calling(cut) as (client, _):
        with pytest.raises(BrokenAnswerError, match="closed the connection"):
            await read(client)


async def test_what_is_no_http_is_an_error() -> None:
    async with calling(b"220 mail.example.com ESMTP\r\n") as (client, _):
        with pytest.raises(BrokenAnswerError, match=r"does not speak HTTP/1\.1"):
            await read(client)


async def test_an_answer_that_only_announces_another_is_passed_over() -> None:
    async with calling(b"HTTP/1.1 100 Continue\r\n\r\n" + WHOLE) as (client, _):
        assert await read(client) == b"hello"


async def test_leaving_an_answer_closes_its_connection() -> None:
    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + b"1\r\na\r\n")
        await reader.read()

    async with calling(endless) as (client, server):
        async with client.call("POST", "/") as answer:
            async for _, piece in answer:
                assert piece == b"a"
                break
        await asyncio.wait_for(server.closed.wait(), 60)


async def test_a_server_waits_for_a_reader_that_is_behind() -> None:
    size, sent = 32 * 2**20, 0

    async def much(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size // 2**20):
            writer.write(bytes(2**20))
            sent += 2**20
            await writer.drain()

    async with calling(much) as (client, _), client.call("POST", "/") as answer:
        await asyncio.sleep(0.3)
        assert sent < size
        assert len(await answer.read()) == size


async def test_an_answer_that_nobody_asked_for_ends_the_connection() -> None:
    async with calling(WHOLE + WHOLE, WHOLE) as (client, server):
        assert await read(client) == b"hello"
        assert await read(client) == b"hello"
        assert server.num_connections == 2


async def test_no_server_is_an_error_of_the_system() -> None:
    with pytest.raises(OSError, match="Connect"):
        await read(HttpClient("http://127.0.0.1:9"))


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://host:99999", "http://host:0"])
def test_addresses_that_are_none_are_refused(url: str) -> None:
    with pytest.raises(InvalidArgumentError, match="no address"):
        HttpClient(url)


def test_a_header_cannot_bring_another() -> None:
    with pytest.raises(InvalidArgumentError, match="line break"):
        HttpClient("http://host", headers={"Authorization": "Bearer a\r\nX: y"})
