"""The user's configuration: file, environment, flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sagellm.config import UserConfig, config_path, load_user_config
from sagellm_protocol import InvalidArgumentError

FILE = """
backend: {kind: cuda, device: "cuda:1"}
engine: {kind: cuda, model: my/model, model_path: /models/mine, options: {max_batch_size: 4, dtype: fp16}}
control_plane: {endpoint: "http://127.0.0.1:9"}
"""


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "config.yaml").write_text(FILE, encoding="utf-8")
    return {"SAGELLM_CONFIG": str(tmp_path / "config.yaml")}


def test_without_a_file_everything_has_a_default() -> None:
    config = load_user_config({})
    assert config == UserConfig()
    engine = config.engine_config()
    assert (engine.model_path, engine.backend_type, engine.device) == ("builtin", "auto", None)
    assert config_path({}) == Path("~/.sage-llm/config.yaml").expanduser()


def test_the_file_says_what_runs(environ: dict[str, str]) -> None:
    config = load_user_config(environ)
    assert config.control_plane.endpoint == "http://127.0.0.1:9"
    engine = config.engine_config()
    assert (engine.model_path, engine.backend_type, engine.device) == ("/models/mine", "cuda", "cuda:1")
    assert (engine.max_batch_size, engine.dtype) == (4, "fp16")


def test_the_environment_wins_over_the_file(environ: dict[str, str]) -> None:
    environ |= {"SAGELLM_BACKEND": "cpu", "SAGELLM_MODEL": "other", "SAGELLM_ENDPOINT": "http://x"}
    config = load_user_config(environ)
    engine = config.engine_config()
    assert (engine.model_path, engine.backend_type) == ("other", "cpu")
    assert engine.device is None, "a CUDA device means nothing to another backend"
    assert config.control_plane.endpoint == "http://x"
    assert load_user_config({**environ, "SAGELLM_DEVICE": "cpu"}).engine_config().device == "cpu"


def test_flags_win_over_both(environ: dict[str, str]) -> None:
    environ["SAGELLM_MODEL"] = "other"
    engine = load_user_config(environ).engine_config(model="third", backend="cpu", max_batch_size=9, max_model_len=None)
    assert (engine.model_path, engine.backend_type, engine.device) == ("third", "cpu", None)
    assert (engine.max_batch_size, engine.dtype) == (9, "fp16")


def test_the_backends_kind_holds_where_the_engines_is_auto() -> None:
    config = UserConfig.model_validate({"backend": {"kind": "cpu", "device": "cpu"}})
    engine = config.engine_config()
    assert (engine.backend_type, engine.device) == ("cpu", "cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("backend: {kind: [1]}", "backend.kind must be a string"),
        ("backends: {}", "'backends' is not a field here; did you mean 'backend'?"),
        ("engine: {modle: x}", "did you mean 'model'?"),
        ("engine: builtin", "must hold mappings"),
        ("- a", "must hold mappings"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidArgumentError) as caught:
        load_user_config({"SAGELLM_CONFIG": str(file), "SAGELLM_MODEL": "m"})
    assert str(file) in caught.value.message
    assert message in caught.value.message


def test_bad_options_of_the_engine_are_named() -> None:
    config = UserConfig.model_validate({"engine": {"options": {"max_batch_siz": 4}}})
    with pytest.raises(InvalidArgumentError, match="did you mean 'max_batch_size'"):
        config.engine_config()


def test_empty_files_and_sections_are_fine(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for text in ("", "backend:\nengine:\n"):
        file.write_text(text, encoding="utf-8")
        assert load_user_config({"SAGELLM_CONFIG": str(file)}) == UserConfig()


def test_a_file_that_is_named_must_exist(tmp_path: Path) -> None:
    environ: dict[str, Any] = {"SAGELLM_CONFIG": str(tmp_path / "none.yaml")}
    with pytest.raises(InvalidArgumentError, match="which is no file"):
        load_user_config(environ)
