"""Who may call: holders of a key. Without any keys, everybody who can reach the gateway, but no other site's web page.

A key comes as `Authorization: Bearer KEY` or `x-api-key: KEY` and is compared by its hash, in constant time. Open
without one are health, readiness, version, the page's own files and the API's documents; `/metrics` where configured.

A gateway without keys would do what any web page in a browser on the same machine tells it (cross-site requests, DNS
rebinding). So it refuses requests that a page of another origin sent, and, on loopback, those by a name not its own.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from sagellm_core.addresses import is_loopback, refuse_exposed
from sagellm_gateway.context import Caller
from sagellm_gateway.settings import AuthSettings, GatewaySettings
from sagellm_protocol import PermissionDeniedError, UnauthenticatedError

if TYPE_CHECKING:
    from sagellm_gateway.keys import ApiKey

_OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version", "/docs", "/openapi.json", "/favicon.ico"})
_OPEN_PREFIXES = ("/page/", "/docs/")
_BEARER = b"bearer "
_MAX_HOST_CHARS = 255


class KeyCheck:
    """Lets holders of a key through; see the module."""

    def __init__(self, settings: AuthSettings) -> None:
        digests = [bytes.fromhex(key.hash.removeprefix("sha256:")) for key in settings.keys]
        self._keys = {digest: (digest, key) for digest, key in zip(digests, settings.keys, strict=True)}
        self._open_paths = _OPEN_PATHS | ({"/metrics"} if settings.open_metrics else set())

    def __call__(self, path: str, caller: Caller) -> None:
        """Fill in whose key `caller` has; raises `UnauthenticatedError`."""
        sent = _sent_key(caller.headers)
        # A key that is sent counts on open paths, too; a wrong one is never ignored elsewhere.
        if sent is not None or not self._is_open(path):
            key = self._find(sent)
            caller.key_name, caller.is_admin, caller.limits = key.name, key.admin, key.limits

    def _is_open(self, path: str) -> bool:
        return path in self._open_paths or path.startswith(_OPEN_PREFIXES)

    def _find(self, sent: bytes | None) -> ApiKey:
        if sent is None:
            raise UnauthenticatedError("an API key is required; send it as `Authorization: Bearer KEY`")
        digest = hashlib.sha256(sent).digest()
        known = self._keys.get(digest)
        # The table is found by a hash that nobody can steer; what decides takes the same time for every key.
        if known is None or not hmac.compare_digest(digest, known[0]):
            raise UnauthenticatedError("the API key is not known; check it, or ask the operator for a new one")
        return known[1]


def _sent_key(headers: Mapping[bytes, bytes]) -> bytes | None:
    authorization = headers.get(b"authorization", b"")
    if authorization[: len(_BEARER)].lower() == _BEARER:
        return authorization[len(_BEARER) :].strip()
    key = headers.get(b"x-api-key")
    return None if key is None else key.strip()


class OriginCheck:
    """Keeps other sites' pages out of a gateway without keys; see the module."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._origins = frozenset(origin.encode().lower() for origin in settings.cors.allow_origins)
        self._hosts: frozenset[str] | None = None
        if is_loopback(settings.server.host):
            self._hosts = frozenset(name.lower() for name in ("localhost", *settings.server.allowed_hosts))

    def __call__(self, path: str, caller: Caller) -> None:
        """Raise `PermissionDeniedError` for what another site's page has sent, whatever it asks for."""
        host, origin = caller.headers.get(b"host", b""), caller.headers.get(b"origin")
        # Nothing long is remembered: the names come from outside.
        if self._hosts is not None and (len(host) > _MAX_HOST_CHARS or not _is_own_host(host, self._hosts)):
            raise PermissionDeniedError(
                "this gateway has no keys and answers its own machine alone: call it by localhost or its address, "
                "or add the name to server.allowed_hosts",
                field="host",
            )
        if origin and not self._may_call(origin.lower(), host.lower()):
            raise PermissionDeniedError(
                "web pages of other origins may not call this gateway; add the origin to cors.allow_origins",
                field="origin",
            )

    def _may_call(self, origin: bytes, host: bytes) -> bool:
        scheme, _, name = origin.partition(b"://")
        # Applications such as editors have schemes of their own, which no web page can take.
        is_page = scheme in (b"http", b"https", b"null")
        return not is_page or name == host or origin in self._origins or b"*" in self._origins


@lru_cache(maxsize=1024)
def _is_own_host(host: bytes, names: frozenset[str]) -> bool:
    """Whether a Host header cannot be a stranger's name: an address, or a name without dots, which is no domain's."""
    text = host.decode("latin-1").lower()
    name = text.rpartition(":")[0] if ":" in text and not text.endswith("]") else text
    if "." not in name or name in names or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def check_exposure(settings: GatewaySettings) -> None:
    """Raise `InvalidArgumentError` where a gateway that needs no key would listen beyond this machine."""
    if not settings.auth.keys and not settings.auth.allow_no_key:
        refuse_exposed(
            settings.server.host,
            "make one with `sage-llm key new NAME` (or set SAGELLM_API_KEY), listen on 127.0.0.1, or allow it with "
            "--allow-no-key (auth.allow_no_key)",
            field="auth.keys",
        )
