"""An HTTP/1.1 client for load: a moment with every piece of an answer, and little work for the processor.

The parser is httptools', the one behind uvicorn. A call costs a tenth of what httpx takes, which matters where load and
server share a machine. Moments are `time.perf_counter()` as the bytes come in, before anything is parsed.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import cast
from urllib.parse import urlsplit

import httptools

from sagellm_protocol import InvalidArgumentError

# An idle connection older than this is not used again: its server may be closing it at this moment.
_REUSE_WITHIN_S = 2.0
# A reader that is behind by so much lets the server wait.
_MAX_UNREAD_BYTES = 2**20


class BrokenAnswerError(OSError):
    """The connection ended, or said something else than HTTP, in the middle of an answer."""


class HttpClient:
    """Calls one server over as many connections as there are calls at a time; idle ones are used again.

    Args:
        url: `http://` or `https://`, host and port; a path is put in front of every call's.
        headers: sent with every call.
        verify: whether a certificate must be valid for the host.

    Raises:
        InvalidArgumentError: `url` is no address.
    """

    def __init__(self, url: str, *, headers: Mapping[str, str] | None = None, verify: bool = True) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise InvalidArgumentError(f"{url!r} is no address; give one such as http://127.0.0.1:8000", field="url")
        self._host = parts.hostname
        self._port = port or (443 if parts.scheme == "https" else 80)
        self._path = parts.path.rstrip("/")
        self._ssl = _tls(verify) if parts.scheme == "https" else None
        fields = {"Host": parts.netloc.rpartition("@")[2], "Content-Type": "application/json", **(headers or {})}
        if any("\r" in text or "\n" in text for text in (*fields, *fields.values())):
            raise InvalidArgumentError("a header holds a line break; take it out", field="headers")
        self._head = "".join(f"{name}: {value}\r\n" for name, value in fields.items()).encode("latin-1")
        self._idle: list[_Connection] = []

    @asynccontextmanager
    async def call(self, method: str, path: str, body: bytes = b"") -> AsyncGenerator[Answer, None]:
        """One call, from its sending to the end of the body; leaving before the answer's end closes the connection.

        Raises `OSError` where there is no connection, `BrokenAnswerError` where it breaks.
        """
        connection = await self._connection()
        try:
            yield await connection.send(
                b"%b %b HTTP/1.1\r\n%bContent-Length: %d\r\n\r\n%b"
                % (method.encode(), (self._path + path).encode(), self._head, len(body), body)
            )
        finally:
            if connection.is_reusable:
                self._idle.append(connection)
            else:
                connection.close()

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().close()

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_reusable and time.perf_counter() - connection.last_used < _REUSE_WITHIN_S:
                return connection
            connection.close()
        loop = asyncio.get_running_loop()
        _, opened = await loop.create_connection(_Connection, self._host, self._port, ssl=self._ssl)
        return opened


def _tls(verify: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class Answer:
    """An answer whose headers are there; iterate once over its pieces, each with the moment it came."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self.status = connection.status
        self.headers = connection.headers  # names in lower case

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([piece async for _, piece in self])

    async def __aiter__(self) -> AsyncIterator[tuple[float, bytes]]:
        while (piece := await self._connection.next_piece()) is not None:
            yield piece


class _Connection(asyncio.Protocol):
    """One connection; carries one call at a time."""

    def __init__(self) -> None:
        self.last_used = time.perf_counter()
        self._is_whole = True  # nothing of an answer is missing
        self._keeps_alive = True
        self._has_more = False  # than was asked for
        self._is_lost = False
        self._is_paused = False
        self._error: OSError | None = None
        self._wakeup: asyncio.Future[None] | None = None

    # ---- for the client -------------------------------------------------------------------------------

    @property
    def is_reusable(self) -> bool:
        """Whether another call may follow."""
        return self._is_whole and self._keeps_alive and not self._is_lost and not self._has_more

    async def send(self, message: bytes) -> Answer:
        """Send a call and wait for the answer's headers."""
        self.status = 0
        self.headers: dict[str, str] = {}
        self._pieces: deque[tuple[float, bytes]] = deque()
        self._num_unread = 0
        self._is_whole = False
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(message)
        while not self.status:
            await self._news()
        return Answer(self)

    async def next_piece(self) -> tuple[float, bytes] | None:
        """The next part of the body; None at its end."""
        while not self._pieces:
            if self._is_whole:
                return None
            await self._news()
        moment, piece = self._pieces.popleft()
        self._num_unread -= len(piece)
        if self._is_paused and self._num_unread < _MAX_UNREAD_BYTES // 2:
            self._is_paused = False
            self._transport.resume_reading()
        return moment, piece

    def close(self) -> None:
        """Close at once: what is not whole is cut off."""
        if not self._is_lost:
            self._transport.abort()

    async def _news(self) -> None:
        if self._error is not None:
            raise self._error
        self._wakeup = asyncio.get_running_loop().create_future()
        await self._wakeup

    # ---- for the event loop ---------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.last_used = time.perf_counter()
        if self._is_whole:
            self._has_more = True
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(BrokenAnswerError(f"the server does not speak HTTP/1.1: {error}"))
            self._transport.abort()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self._is_lost = True
        if not self._is_whole:
            # Without a length a body ends with its connection (RFC 9112, 6.3), else it was cut off.
            is_end = error is None and self.status != 0 and not self._has_length
            if is_end:
                self._is_whole = True
            else:
                self._fail(BrokenAnswerError(str(error or "the server closed the connection before its answer's end")))
        self._wake()

    def _fail(self, error: OSError) -> None:
        if self._error is None:
            self._error = error

    def _wake(self) -> None:
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)

    # ---- for the parser -------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_whole:
            self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if self._is_whole:
            self._has_more = True
        elif self._parser.get_status_code() >= 200:  # what is below announces another answer
            self.status = self._parser.get_status_code()
            self._has_length = not {"content-length", "transfer-encoding"}.isdisjoint(self.headers)

    def on_body(self, body: bytes) -> None:
        if self._is_whole:
            return
        self._pieces.append((self.last_used, body))
        self._num_unread += len(body)
        if self._num_unread > _MAX_UNREAD_BYTES and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        if self.status and not self._is_whole:
            self._is_whole = True
            self._keeps_alive = self._parser.should_keep_alive()
