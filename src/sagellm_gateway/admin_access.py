"""Who may administer: holders of an admin key; without any keys, programs on the gateway's own machine.

The second case must not be a hole for web pages that a browser on that machine shows, nor for a proxy in front: what
comes from another site, by a name that is not this machine's, or through a proxy is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import Request as HttpRequest

from sagellm_core.addresses import is_loopback
from sagellm_gateway.context import caller_of, gateway_of
from sagellm_protocol import PermissionDeniedError

_OWN_SITE = (None, "none", "same-origin")
_PROXY_HEADERS = ("forwarded", "x-forwarded-for", "x-real-ip")


def require_admin(http: HttpRequest) -> None:
    """Raise `PermissionDeniedError` for everyone else."""
    if caller_of(http).is_admin:
        return
    settings = gateway_of(http).settings
    if settings.auth.keys:
        raise PermissionDeniedError("/admin needs a key with admin rights; send one as `Authorization: Bearer KEY`")
    if not _is_local(http, settings.server.allowed_hosts):
        raise PermissionDeniedError("without keys /admin answers this machine alone; configure an admin key")


def _is_local(http: HttpRequest, allowed_hosts: Sequence[str]) -> bool:
    if http.client is None or not is_loopback(http.client.host):
        return False
    if any(name in http.headers for name in _PROXY_HEADERS):
        return False
    host = http.url.hostname or ""
    return (is_loopback(host) or host in allowed_hosts) and http.headers.get("sec-fetch-site") in _OWN_SITE
