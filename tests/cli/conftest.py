"""What the tests of the command line share."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from cli_process import Cli
from sagellm_core.models import resolve_model


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty home folder and no settings in the environment."""
    for name in [name for name in os.environ if name.startswith(("SAGELLM_", "XDG_"))]:
        monkeypatch.delenv(name)
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("COLUMNS", "200")
    return folder


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(monkeypatch, capsys)


@pytest.fixture
def endless_model(tmp_path: Path) -> Path:
    """The built-in model without an end token and with a long context: it talks for minutes."""
    folder = tmp_path / "endless"
    shutil.copytree(resolve_model("builtin"), folder)
    for name, changes in (
        ("config.json", {"eos_token_id": None, "max_position_embeddings": 65536}),
        ("generation_config.json", {"eos_token_id": None}),
        ("tokenizer_config.json", {"eos_token": None}),
    ):
        data = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps({**data, **changes}), encoding="utf-8")
    return folder
