"""The checkpoint that most tests of the whole engine share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tiny_engine import build_checkpoint


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a small random Llama, and the `transformers` model that was saved there. Not to be changed."""
    folder = tmp_path_factory.mktemp("llama")
    return folder, build_checkpoint(folder)


@pytest.fixture
def folder(llama: tuple[Path, Any]) -> Path:
    return llama[0]
