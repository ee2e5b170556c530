"""Classes known by name: the package's own, and those that other distributions add by entry points."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import TypeVar

from sagellm_protocol import InvalidArgumentError, UnavailableError

T = TypeVar("T")


def names(built_in: Mapping[str, str], group: str) -> list[str]:
    """Every name that `load_class` takes, sorted."""
    return sorted({*built_in, *(point.name for point in entry_points(group=group))})


def load_class(name: str, base: type[T], built_in: Mapping[str, str], group: str, *, field: str) -> type[T]:
    """The subclass of `base` that is known as `name`; nothing else is imported.

    `built_in` holds `module:class`; its names can't be taken over by entry points of `group`.

    Raises:
        InvalidArgumentError: no such name (the message lists the known ones), or one that is no subclass of `base`.
        UnavailableError: its package can't be imported; the message says why.
    """
    if name in built_in:
        module, _, attribute = built_in[name].partition(":")
        found: type[T] = getattr(import_module(module), attribute)
        return found
    for point in entry_points(group=group, name=name):
        try:
            loaded = point.load()
        except (ImportError, AttributeError) as error:
            raise UnavailableError(
                f"{field} {name!r} ({point.value}) can't be loaded: {error}; reinstall its package",
                retryable=False,
                field=field,
            ) from error
        if not (isinstance(loaded, type) and issubclass(loaded, base)):
            raise InvalidArgumentError(
                f"{field} {name!r} ({point.value}) is no subclass of {base.__name__}", field=field
            )
        return loaded
    raise InvalidArgumentError(
        f"unknown {field} {name!r}; choose one of {', '.join(names(built_in, group))}", field=field
    )
