"""Where sockets of children lie: beside the state, or in a short folder that a link beside it shows."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

from sagellm_control_plane.clients.process import ProcessEngineClient
from sagellm_control_plane.run_folder import LONGEST_FOLDER, run_folder, short_folder
from sagellm_core.config import LLMEngineConfig
from sagellm_protocol import InvalidArgumentError


@pytest.fixture
def long_state(tmp_path: Path) -> Path:
    return tmp_path / ("x" * LONGEST_FOLDER) / "state.db"


def test_a_short_path_is_taken_as_it_is() -> None:
    assert run_folder(Path("/srv/state.db")) == Path("/srv/state.db.run")
    assert not Path("/srv/state.db.run").exists()


def test_a_long_path_becomes_a_link_that_lasts(long_state: Path) -> None:
    folder = run_folder(long_state)
    try:
        assert len(os.fsencode(folder)) <= LONGEST_FOLDER
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert long_state.with_name("state.db.run").resolve() == folder.resolve()
        assert run_folder(long_state) == folder
    finally:
        shutil.rmtree(folder)
    other = run_folder(long_state)  # the machine has started anew, and the folder for temporary files is empty
    try:
        assert other.is_dir()
        assert other != folder
        other.chmod(0o755)  # whoever reaches the sockets is obeyed
        third = run_folder(long_state)
        assert third != other
        shutil.rmtree(third)
    finally:
        shutil.rmtree(other)


def test_what_is_in_the_way_of_the_link_is_said(long_state: Path) -> None:
    folder = long_state.with_name("state.db.run")
    folder.mkdir(parents=True)
    shutil.rmtree(run_folder(long_state))  # an empty folder is none
    folder.unlink()
    folder.mkdir()
    (folder / "engine.log").touch()
    with pytest.raises(InvalidArgumentError, match="in the way"):
        run_folder(long_state)


def test_the_longest_folder_has_room_for_every_engine() -> None:
    client = ProcessEngineClient(
        LLMEngineConfig(model_path="builtin", engine_id="e" * 64), run_dir="/" + "x" * (LONGEST_FOLDER - 1)
    )
    client._epoch = "0" * 16
    assert client._socket_path()


def test_a_long_folder_for_temporary_files_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("y" * LONGEST_FOLDER)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    folder = short_folder()
    assert folder.parent == Path("/tmp")
    assert not any(deep.iterdir())
    folder.rmdir()
