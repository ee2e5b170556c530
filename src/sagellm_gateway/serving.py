"""Runs a gateway as its settings say: where it listens, by which keys, with which log, and how it ends."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable

from sagellm_core.serving import ServerOptions, run_server
from sagellm_gateway.app import Gateway
from sagellm_gateway.middleware.auth import check_exposure
from sagellm_gateway.settings import ServerSettings


def run_gateway(
    gateway: Gateway, *, announce: Callable[[str], None], start: Callable[[], Awaitable[None]] | None = None
) -> None:
    """Serve until a signal comes; then `/ready` says no, no new work is taken, and answers end within the grace period.

    Args:
        gateway: with the settings to follow.
        announce: called with the URL when requests are taken.
        start: starts the engines, ahead of the server, so that their errors reach the caller; the manager's by default.

    Raises:
        InvalidArgumentError: it would listen beyond this machine without a key, or the certificate is wrong.
        UnavailableError: the port is taken, or nothing could start.
    """
    server = gateway.settings.server
    check_exposure(gateway.settings)
    if gateway.access_log is not None:
        gateway.access_log.stream = sys.stderr
    run_server(
        gateway,
        server.host,
        server.port,
        start=start or gateway.manager.start,
        announce=announce,
        options=_options(server),
        on_drain=lambda: gateway.drain(server.drain_delay_s),
    )


def _options(server: ServerSettings) -> ServerOptions:
    return ServerOptions(
        tls_cert=server.tls_cert,
        tls_key=server.tls_key,
        trusted_proxies=server.trusted_proxies,
        keep_alive_s=server.keep_alive_s,
        header_timeout_s=server.header_timeout_s,
        body_timeout_s=server.body_timeout_s,
        send_timeout_s=server.send_timeout_s,
        max_header_bytes=server.max_header_bytes,
        drain_delay_s=server.drain_delay_s,
        grace_s=server.grace_s,
    )
