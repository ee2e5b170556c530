"""Runs an application under uvicorn as a command does it: port first, then the model, then requests until a signal.

Promises: a taken port, a bad certificate or a model that cannot be loaded raises the protocol's error (a server's log
with a traceback is no message to a user); after the first SIGINT or SIGTERM requests in flight may end for `grace_s`,
a second one cuts them off, and either way the function returns normally. A client that sends its headers slowly or
endlessly, or takes nothing of its answer, is let go.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sagellm_protocol import InvalidArgumentError, UnavailableError

_BACKLOG = 2048


@dataclass(frozen=True)
class ServerOptions:
    """How the server treats its clients; times are in seconds."""

    tls_cert: Path | None = None  # a certificate chain in PEM, and its key; without them plain HTTP
    tls_key: Path | None = None
    trusted_proxies: Sequence[str] = ()  # whose X-Forwarded-For and -Proto are believed
    keep_alive_s: float = 75.0  # how long an idle connection stays open
    header_timeout_s: float = 20.0  # from a connection's or request's begin to the end of the headers
    body_timeout_s: float = 30.0  # between two parts of a body
    send_timeout_s: float = 120.0  # how long a client may take nothing of its answer
    max_header_bytes: int = 32_768  # of one request's line and headers
    drain_delay_s: float = 0.0  # how long connections are still taken after a signal
    grace_s: float = 10.0  # what requests in flight get after that


def run_server(
    app: FastAPI,
    host: str,
    port: int,
    *,
    start: Callable[[], Awaitable[None]],
    announce: Callable[[str], None],
    options: ServerOptions | None = None,
    on_drain: Callable[[], None] | None = None,
) -> None:
    """Serve `app` until a signal comes.

    Args:
        app: starts what it serves in its lifespan and stops it at the end.
        host, port: where to listen; port 0 takes a free one.
        start: starts what `app` serves, ahead of it, so that its errors reach the caller as they are.
        announce: called with the URL when requests are taken and a signal ends them in order.
        options: how clients are treated.
        on_drain: called when the signal has come, before anything is closed.
    """
    options = options or ServerOptions()
    listener = _bind(host, port, options)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _run(_serve(app, listener, start, announce, options, on_drain))
    except KeyboardInterrupt:
        pass  # the server has shut down in order and passes the signal on
    finally:
        signal.signal(signal.SIGTERM, previous)
        listener.close()


def _run(serving: Coroutine[Any, Any, None]) -> None:
    """As `asyncio.run`, on uvloop where there is one: it saves a third of what a small request costs."""
    try:
        import uvloop
    except ImportError:  # not made for every platform
        asyncio.run(serving)
    else:
        uvloop.run(serving)


async def _serve(
    app: FastAPI,
    listener: socket.socket,
    start: Callable[[], Awaitable[None]],
    announce: Callable[[str], None],
    options: ServerOptions,
    on_drain: Callable[[], None] | None,
) -> None:
    host, port = listener.getsockname()[:2]
    scheme = "http" if options.tls_cert is None else "https"
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    server = _Server(_config(app, options), options, on_ready=lambda: announce(url), on_drain=on_drain)
    await start()
    _settle_collector()
    listener.listen(_BACKLOG)
    await server.serve(sockets=[listener])
    if not server.started:
        raise UnavailableError("the server could not start; its log says why")


def _settle_collector() -> None:
    """Spare the collector what stays for good (code, models, engines): it would search it again and again.

    How often it looks stays as it is: requests leave no cycles behind, and rarer collections made small requests slower
    (measured with benchmarks/gateway_overhead.py).
    """
    gc.collect()
    gc.freeze()


def _config(app: FastAPI, options: ServerOptions) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        http=partial(_Connection, options),  # type: ignore[arg-type]  # called like the class it makes
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=bool(options.trusted_proxies),
        forwarded_allow_ips=list(options.trusted_proxies),
        timeout_keep_alive=options.keep_alive_s,  # type: ignore[arg-type]  # seconds, whole or not
        timeout_graceful_shutdown=options.grace_s,  # type: ignore[arg-type]
        ssl_certfile=None if options.tls_cert is None else str(options.tls_cert),
        ssl_keyfile=None if options.tls_key is None else str(options.tls_key),
        ssl_keyfile_password="-",  # any: without one an encrypted key would be asked for on the terminal
    )
    try:
        config.load()
        logging.getLogger("uvicorn.error").addFilter(_is_news)
    except (OSError, ssl.SSLError) as error:
        raise InvalidArgumentError(
            f"{options.tls_cert} and {options.tls_key} are no certificate and key in PEM: {error}", field="tls_cert"
        ) from error
    return config


def _bind(host: str, port: int, options: ServerOptions) -> socket.socket:
    """Taken before the model is loaded, so that a taken port is said at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UnavailableError(
            f"{host} is no address of this machine: {error.strerror}; choose another host"
        ) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # Connections inherit it. The kernel counts: neither a dead client nor one that reads nothing holds a place.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(options.send_timeout_s * 1000))
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise UnavailableError(f"cannot listen on {host}:{port}: {error.strerror}; choose another port") from error
    return listener


class _Server(uvicorn.Server):
    """uvicorn's server, which tells when it is ready and of the first signal, and heeds every second one."""

    def __init__(
        self,
        config: uvicorn.Config,
        options: ServerOptions,
        *,
        on_ready: Callable[[], None],
        on_drain: Callable[[], None] | None,
    ) -> None:
        super().__init__(config)
        self._drain_delay_s = options.drain_delay_s
        self._on_ready = on_ready
        self._on_drain = on_drain

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so: signals are this server's from here on."""
        await super().startup(sockets)
        try:
            if not self.should_exit:
                self._on_ready()
        except BaseException:
            await super().shutdown(sockets)  # the application has started
            raise

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first begins the end, any other cuts it short."""
        self._captured_signals.append(sig)
        self.force_exit = self.should_exit
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """What uvicorn does every tick; and slow clients are let go."""
        self._let_go_of_slow()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Say that the end has begun, keep taking connections for the delay, then close and wait."""
        if self._on_drain is not None:
            self._on_drain()
        until = asyncio.get_running_loop().time() + self._drain_delay_s
        while not self.force_exit and asyncio.get_running_loop().time() < until:
            self._let_go_of_slow()
            await asyncio.sleep(0.05)
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn would leave answers in their midst and the application running
            for task in self.server_state.tasks:
                task.cancel()
            await self.lifespan.shutdown()

    def _let_go_of_slow(self) -> None:
        # Timers of the connections would cost every request; so a timeout ends up to a tick later than it says.
        now = asyncio.get_running_loop().time()
        for connection in list(self.server_state.connections):
            if isinstance(connection, _Connection):
                connection.let_go_if_slow(now)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a log record says more than that an answer was cut off, which is what was asked for."""
    return record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError)


class _Cork(asyncio.Transport):
    """A transport that sends once a turn of the event loop what was written in it.

    A send is a system call that wakes the client: head and body of an answer shall be one, and what many connections
    have to say goes out together.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] = []
        # The rest goes to the transport itself.
        self.pause_reading = transport.pause_reading  # type: ignore[method-assign]
        self.resume_reading = transport.resume_reading  # type: ignore[method-assign]
        self.is_closing = transport.is_closing  # type: ignore[method-assign]
        self.get_extra_info = transport.get_extra_info  # type: ignore[method-assign]

    def write(self, data: bytes) -> None:  # type: ignore[override]
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts:
            self._transport.write(parts[0] if len(parts) == 1 else b"".join(parts))


class _Connection(HttpToolsProtocol):
    """uvicorn's connection, with bounds on the size of a request's headers and on how long its parts take."""

    def __init__(self, options: ServerOptions, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._options = options
        self._is_in_headers = True  # of the first request, or waiting for it
        self._began_at = self._heard_at = self.loop.time()  # this request; anything at all
        self._is_refused = False
        self._num_header_bytes = 0  # of parts that arrived before this one
        self._num_new_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_Cork(transport, self.loop))

    def data_received(self, data: bytes) -> None:
        self._num_new_bytes = len(data)
        self._heard_at = self.loop.time()
        super().data_received(data)
        if self._is_in_headers:
            self._num_header_bytes += len(data)
            if self._num_header_bytes > self._options.max_header_bytes:
                self._refuse_headers()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_headers = True
        self._began_at = self._heard_at
        self._num_header_bytes = 0

    def on_headers_complete(self) -> None:
        self._is_in_headers = False
        # The exact size matters only where the bytes that came so far could exceed it.
        if self._num_header_bytes + self._num_new_bytes > self._options.max_header_bytes:
            size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            if size > self._options.max_header_bytes:
                self._refuse_headers()
                raise ValueError("headers too large")  # ends the parser; nobody sees it
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        if not self._is_refused:
            super().send_400_response(msg)

    def let_go_if_slow(self, now: float) -> None:
        """Close the connection of a client that takes too long to send its request."""
        if self._is_in_headers:
            if now - self._began_at <= self._options.header_timeout_s:
                return
            if self._num_new_bytes:
                self._close_with(408, f"The request's headers took longer than {self._options.header_timeout_s:g} s.")
            else:
                self.transport.close()  # it never said anything
        elif now - self._heard_at > self._options.body_timeout_s and self._waits_for_body():
            self._close_with(408, f"The request's body did not come: nothing for {self._options.body_timeout_s:g} s.")

    def _waits_for_body(self) -> bool:
        cycle = self.cycle
        # Who is not read from cannot be slow.
        return cycle.more_body and not cycle.response_started and not self.flow.read_paused

    def _refuse_headers(self) -> None:
        self._is_refused = True
        self._close_with(431, f"The request's headers are larger than {self._options.max_header_bytes} bytes.")

    def _close_with(self, status: int, message: str) -> None:
        if not self.transport.is_closing():
            phrase = {408: "Request Timeout", 431: "Request Header Fields Too Large"}[status]
            head = f"HTTP/1.1 {status} {phrase}\r\ncontent-type: text/plain\r\nconnection: close\r\n"
            self.transport.write(f"{head}content-length: {len(message)}\r\n\r\n{message}".encode())
            self.transport.close()
