"""The checkpoint that most tests of the whole engine share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sagellm_core.models.decoder import CausalLM
from tiny_engine import Brake, build_checkpoint


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a small random Llama, and the `transformers` model that was saved there. Not to be changed."""
    folder = tmp_path_factory.mktemp("llama")
    return folder, build_checkpoint(folder)


@pytest.fixture
def folder(llama: tuple[Path, Any]) -> Path:
    return llama[0]


@pytest.fixture
def brake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Brake]:
    """For the decoders of all engines of this process; not set yet."""
    brake = Brake(CausalLM.forward)
    monkeypatch.setattr(CausalLM, "forward", lambda *arguments: brake.forward(*arguments))
    yield brake
    brake.release()
