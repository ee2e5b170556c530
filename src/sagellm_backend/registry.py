"""Which backends there are, and which one to use: `get_provider`.

Built-in kinds are known by name; other distributions add theirs through the entry-point group
`sagellm.backends`, whose values are factories `create(**options) -> BackendProvider`. A built-in name can't be
taken over. Nothing is imported before it is asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from sagellm_backend.provider import BackendProvider, parse_device
from sagellm_protocol import InternalError, InvalidArgumentError, UnavailableError

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "sagellm.backends"

_BUILT_IN = {
    "ascend": "sagellm_backend.providers.ascend",
    "cpu": "sagellm_backend.providers.cpu",
    "cuda": "sagellm_backend.providers.cuda",
    "haiguang": "sagellm_backend.providers.haiguang",
    "kunlun": "sagellm_backend.providers.kunlun",
    "mock": "sagellm_backend.providers.mock",
}
# What `auto` tries, in this order, with torch's name for the device.
_AUTO = {"cuda": "cuda", "ascend": "npu", "kunlun": "cuda", "haiguang": "cuda", "cpu": "cpu"}


def list_kinds() -> list[str]:
    """Every kind that `get_provider` accepts beside "auto": the built-in ones and those of entry points, sorted."""
    return sorted({*_BUILT_IN, *_foreign_entry_points()})


def get_provider(kind: str = "auto", **options: Any) -> BackendProvider:
    """The backend `kind` on this machine.

    "auto" takes the first that is really usable of cuda, ascend, kunlun, haiguang, cpu; where the option
    `device` is given, among those that have such a device. `options` go to the provider: `device` is common to all.

    Raises:
        InvalidArgumentError: no such kind (the message lists the kinds), or an option it doesn't take.
        UnavailableError: the hardware or its software is missing; the message says what to install.
    """
    if kind == "auto":
        return _first_usable(options)
    factory = _factory(kind)
    try:
        provider = factory(**options)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise InvalidArgumentError(f"backend {kind!r} can't be made with these options: {error}") from error
    if not isinstance(provider, BackendProvider):
        raise InternalError(f"the factory of backend {kind!r} returned {type(provider).__name__}, no BackendProvider")
    return provider


def _first_usable(options: dict[str, Any]) -> BackendProvider:
    device = options.get("device")
    wanted = None if device is None else parse_device(device).type
    reasons = []
    for kind, device_type in _AUTO.items():
        if wanted not in (None, device_type):
            continue
        try:
            return get_provider(kind, **options)
        except UnavailableError as error:
            logger.debug("backend %s is not usable: %s", kind, error)
            reasons.append(f"{kind}: {error.message}")
    raise UnavailableError(
        f"no usable backend has a device {device!r} ({'; '.join(reasons) or 'known devices: cpu, cuda, npu'})",
        field="device",
    )


def _factory(kind: str) -> Callable[..., Any]:
    factory: Callable[..., Any]
    if kind in _BUILT_IN:
        factory = import_module(_BUILT_IN[kind]).create
        return factory
    entry_point = _foreign_entry_points().get(kind)
    if entry_point is None:
        raise InvalidArgumentError(
            f"unknown backend {kind!r}: use auto or one of {', '.join(list_kinds())}", field="kind"
        )
    try:
        factory = entry_point.load()
    except (ImportError, AttributeError) as error:
        raise UnavailableError(
            f"backend {kind!r} ({entry_point.value}) can't be loaded: {error}; reinstall the package that offers it"
        ) from error
    return factory


def _foreign_entry_points() -> dict[str, EntryPoint]:
    """Entry points under names that are not ours, by kind."""
    found = {}
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        ours = _BUILT_IN.get(entry_point.name)
        if ours is None:
            found[entry_point.name] = entry_point
        elif entry_point.module != ours:
            logger.warning("backend %r of %s is ignored: the name is built in", entry_point.name, entry_point.value)
    return found
