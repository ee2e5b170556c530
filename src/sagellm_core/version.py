"""The version of the installed distribution, without importing anything heavy."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("isagellm")
except PackageNotFoundError:  # used from a source tree that was never installed
    __version__ = "0.0.0+source"

__all__ = ["__version__"]
