"""Runs an application under uvicorn as a command does it: port first, then the model, then requests until a signal.

Promises: a taken port or a model that cannot be loaded raises the protocol's error (a server's log with a traceback is
no message to a user); SIGINT and SIGTERM let requests in flight end and return normally.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import uvicorn
from fastapi import FastAPI

from sagellm_protocol import UnavailableError

# Requests that are still running this long after the signal are cut off.
GRACE_SECONDS = 10
_BACKLOG = 2048


def run_server(
    app: FastAPI,
    host: str,
    port: int,
    *,
    start: Callable[[], Awaitable[None]],
    announce: Callable[[str], None],
) -> None:
    """Serve `app` until a signal comes.

    Args:
        app: starts what it serves in its lifespan and stops it at the end.
        host, port: where to listen; port 0 takes a free one.
        start: starts what `app` serves, ahead of it, so that its errors reach the caller as they are.
        announce: called with the URL when requests are taken.
    """
    listener = _bind(host, port)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _run(_serve(app, listener, start, announce))
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
    app: FastAPI, listener: socket.socket, start: Callable[[], Awaitable[None]], announce: Callable[[str], None]
) -> None:
    await start()
    listener.listen(_BACKLOG)
    host, port = listener.getsockname()[:2]
    announce(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE_SECONDS)
    server = uvicorn.Server(config)
    await server.serve(sockets=[listener])
    if not server.started:
        raise UnavailableError("the server could not start; its log says why")


def _bind(host: str, port: int) -> socket.socket:
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
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise UnavailableError(f"cannot listen on {host}:{port}: {error.strerror}; choose another port") from error
    return listener
