"""Typed reading of a Hugging Face `config.json`.

The configuration is foreign data: every field is checked where it is read, and a wrong one becomes an
`InvalidArgumentError` that names the file, the field and what was expected.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sagellm_protocol.errors import InvalidArgumentError

__all__ = ["HFConfig"]

_REQUIRED: Any = object()


class HFConfig:
    """A configuration dict with the file that it came from.

    The readers take the names under which a field is known (the first present counts) and the default for an absent
    one; without a default the field is required. `null` counts as absent except for the `optional_*` readers, which
    give None for it.
    """

    __slots__ = ("path", "values")

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self.values = values
        self.path = path

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def integer(self, *names: str, default: int = _REQUIRED) -> int:
        """A whole number >= 0."""
        name, value = self._find(names, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(name, f"must be a whole number >= 0, got {value!r}")
        return value

    def size(self, *names: str, default: int = _REQUIRED) -> int:
        """A whole number >= 1."""
        value = self.integer(*names, default=default)
        if value < 1:
            raise self.error(names[0], f"must be >= 1, got {value}")
        return value

    def optional_integer(self, name: str, default: int | None = None) -> int | None:
        """A whole number, or None where the file says null; `default` where it says nothing."""
        if name not in self.values:
            return default
        return None if self.values[name] is None else self.integer(name)

    def number(self, *names: str, default: float = _REQUIRED) -> float:
        """A number."""
        name, value = self._find(names, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(name, f"must be a number, got {value!r}")
        return float(value)

    def optional_number(self, name: str, default: float | None = None) -> float | None:
        """A number, or None where the file says null; `default` where it says nothing."""
        if name not in self.values:
            return default
        return None if self.values[name] is None else self.number(name)

    def flag(self, name: str, default: bool = _REQUIRED) -> bool:
        """True or false."""
        name, value = self._find((name,), default)
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, got {value!r}")
        return value

    def text(self, *names: str, default: str = _REQUIRED) -> str:
        """A string."""
        name, value = self._find(names, default)
        if not isinstance(value, str):
            raise self.error(name, f"must be a string, got {value!r}")
        return value

    def sequence(self, name: str) -> list[Any] | None:
        """A list, or None where there is none."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, list):
            raise self.error(name, f"must be a list, got {value!r}")
        return value

    def section(self, name: str) -> HFConfig | None:
        """A nested object, or None where there is none."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, f"must be an object, got {value!r}")
        return HFConfig(value, self.path)

    def error(self, name: str, problem: str) -> InvalidArgumentError:
        """The error for a field, to be raised by the caller."""
        return InvalidArgumentError(
            f"{self.path}: {name} {problem}; correct the file or download the model again", field=name
        )

    def _find(self, names: tuple[str, ...], default: Any) -> tuple[str, Any]:
        for name in names:
            value = self.values.get(name)
            if value is not None:
                return name, value
        if default is _REQUIRED:
            raise self.error(names[0], "is missing")
        return names[0], default
