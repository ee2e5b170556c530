"""Exports that cost nothing until they are used (PEP 562), for the `__init__.py` of packages.

A package writes its exports twice: as imports for type checkers and readers, and by module for the run time::

    if TYPE_CHECKING:
        from sagellm_core.config import BackendConfig, load_config
    else:
        __getattr__, __dir__ = lazy_exports(__name__, {".config": ("BackendConfig", "load_config")})

    __all__ = ["BackendConfig", "load_config"]

The `else` keeps type checkers strict: to them the package has these names and no others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy_exports(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for `package`.

    Args:
        package: the package's `__name__`.
        homes: module -> the names it holds. A module that begins with a dot is one of the package. A name may be
            `"Scheduler as ContinuousBatchingScheduler"`, as in an import.
    """
    exports: dict[str, tuple[str, str]] = {}
    for module, names in homes.items():
        for name in names:
            original, _, alias = name.partition(" as ")
            exports[alias or original] = (module, original)

    def get(name: str) -> Any:
        if name not in exports:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, original = exports[name]
        value = getattr(import_module(module, package), original)
        # Kept, so that the next access costs nothing.
        setattr(sys.modules[package], name, value)
        return value

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *exports})

    return get, list_names
