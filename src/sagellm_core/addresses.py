"""Who can reach an address that a server listens on."""

from __future__ import annotations

import ipaddress

from sagellm_protocol import InvalidArgumentError


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refuse_exposed(host: str, remedy: str, *, field: str) -> None:
    """Raise `InvalidArgumentError` if other machines could reach a server, which needs no key, on `host`."""
    if not is_loopback(host):
        raise InvalidArgumentError(f"other machines could reach {host}, and no key is needed: {remedy}", field=field)
