"""Classes known by name: the package's own, and those that other distributions add by entry points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from sagellm_protocol import InvalidArgumentError, UnavailableError

T = TypeVar("T")


@dataclass(frozen=True)
class Registry(Generic[T]):
    """Subclasses of one base; nothing is imported before it is asked for.

    `base` and the values of `built_in` are `module:class` below `package`, those of the entry-point group `group` are
    anybody's. A built-in name can't be taken over. `field` is what errors name.
    """

    package: str
    base: str
    built_in: Mapping[str, str]
    group: str
    field: str

    def names(self) -> list[str]:
        """Every name that `get` takes, sorted."""
        return sorted({*self.built_in, *(point.name for point in entry_points(group=self.group))})

    def get(self, name: str) -> type[T]:
        """The class `name`.

        Raises:
            InvalidArgumentError: no such name (the message lists the known ones), or one that is no subclass of `base`.
            UnavailableError: its package can't be imported; the message says why.
        """
        if name in self.built_in:
            found: type[T] = self._load(self.built_in[name])
            return found
        for point in entry_points(group=self.group, name=name):
            return self._checked(f"{self.field} {name!r} ({point.value})", point)
        raise InvalidArgumentError(
            f"unknown {self.field} {name!r}; choose one of {', '.join(self.names())}", field=self.field
        )

    def _load(self, path: str) -> Any:
        module, _, attribute = path.partition(":")
        return getattr(import_module(f"{self.package}.{module}"), attribute)

    def _checked(self, label: str, point: EntryPoint) -> type[T]:
        try:
            loaded = point.load()
        except (ImportError, AttributeError) as error:
            raise UnavailableError(
                f"{label} can't be loaded: {error}; reinstall its package", retryable=False, field=self.field
            ) from error
        base: type[T] = self._load(self.base)
        if not (isinstance(loaded, type) and issubclass(loaded, base)):
            raise InvalidArgumentError(f"{label} is no subclass of {base.__name__}", field=self.field)
        return loaded
