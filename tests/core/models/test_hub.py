"""Names become paths; what the hub's library raises becomes one clear line. No test touches the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from sagellm_core.models import hub, list_local_models, resolve_model
from sagellm_protocol.errors import (
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    SageLLMError,
    UnavailableError,
)


def http_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "server said no\nand more")
    return error


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def raising(error: Exception) -> Any:
    def download(*args: Any, **options: Any) -> str:
        raise error

    return download


def test_local_paths(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "a.gguf").write_bytes(b"")
    assert resolve_model(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "~/nothing", "a/b/c", "what is this", ""])
def test_names_that_are_neither_paths_nor_ids(name: str) -> None:
    with pytest.raises(NotFoundError, match="no such folder or file"):
        resolve_model(name)


def test_builtin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_BUILTIN_FOLDER", tmp_path)
    with pytest.raises(NotFoundError, match="built-in model"):
        resolve_model("builtin")
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model("builtin") == tmp_path


def test_download_takes_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(repository: str, **options: Any) -> str:
        calls.append((repository, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InvalidArgumentError, match="no safetensors weights"):
        resolve_model("owner/name")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve_model("owner/name", revision="v2") == tmp_path
    repository, options = calls[1]
    assert (repository, options["revision"]) == ("owner/name", "v2")
    wanted = set(
        huggingface_hub.utils.filter_repo_objects(
            [
                "config.json",
                "model-00001-of-00002.safetensors",
                "model.safetensors.index.json",
                "tokenizer.json",
                "tokenizer.model",
                "merges.txt",
                "chat_template.jinja",
                "pytorch_model.bin",
                "original/consolidated.00.pth",
                "original/params.json",
                "consolidated.safetensors",
                "onnx/model.onnx",
                "modules.json",
                "1_Pooling/config.json",
                "README.md",
            ],
            allow_patterns=options["allow_patterns"],
            ignore_patterns=options["ignore_patterns"],
        )
    )
    assert wanted == {
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "modules.json",
        "1_Pooling/config.json",
    }


def fake_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that `owner/name` is downloaded to: a repository of two files, of which those wanted come."""
    folder = tmp_path / "cache"

    def download(repository: str, *, allow_patterns: list[str], **options: Any) -> str:
        assert repository == "owner/name"
        kept = ["config.json", "sub/a-Q8_0.gguf"]
        for file in huggingface_hub.utils.filter_repo_objects(kept, allow_patterns=allow_patterns):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).touch()
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return folder


def test_of_a_hub_id_the_configuration_alone_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = fake_cache(tmp_path, monkeypatch)
    assert hub.resolve_config("owner/name") == cache / "config.json"
    (tmp_path / "config.json").write_text("{}")
    assert hub.resolve_config(str(tmp_path)) == hub.resolve_config(str(tmp_path / "config.json"))
    assert hub.resolve_config("builtin").is_file()
    for wrong in ("", "./absent", str(tmp_path / "absent"), str(tmp_path.parent)):
        with pytest.raises(NotFoundError, match=r"no config\.json there"):
            hub.resolve_config(wrong)


def test_single_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = fake_cache(tmp_path, monkeypatch)
    assert resolve_model("owner/name/sub/a-Q8_0.gguf") == cache / "sub" / "a-Q8_0.gguf"
    with pytest.raises(NotFoundError, match=r"owner/name: there is no b\.gguf; check its name"):
        resolve_model("owner/name/b.gguf")


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (http_error(errors.GatedRepoError), PermissionDeniedError, "HF_TOKEN"),
        (http_error(errors.RepositoryNotFoundError), NotFoundError, "not found on the hub"),
        (http_error(errors.RevisionNotFoundError), NotFoundError, "not found on the hub"),
        (errors.LocalEntryNotFoundError("offline"), UnavailableError, "HF_HUB_OFFLINE"),
        (errors.OfflineModeIsEnabled("offline"), UnavailableError, "builtin"),
        (errors.HFValidationError("bad"), NotFoundError, "valid hub id"),
        (ConnectionError("refused"), UnavailableError, "refused"),
        (
            caused(errors.LocalEntryNotFoundError("Got: a wrapper"), OSError("no route")),
            UnavailableError,
            r"\(no route\)",
        ),
        (RuntimeError("whatever\nsecond line"), UnavailableError, "whatever"),
    ],
)
def test_errors_of_the_hub(
    error: Exception, expected: type[SageLLMError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
    with pytest.raises(expected, match=message) as caught:
        resolve_model("owner/name")
    assert "\n" not in str(caught.value)
    assert "owner/name" in str(caught.value)


def test_modelscope_without_its_package() -> None:
    with pytest.raises(UnavailableError, match=r"isagellm\[modelscope\]"):
        resolve_model("modelscope:owner/name")


def test_list_local_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    folder = cache / "models--Owner--name" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    builtin = tmp_path / "builtin"
    builtin.mkdir()
    monkeypatch.setattr(hub, "_BUILTIN_FOLDER", builtin)
    real_scan = huggingface_hub.scan_cache_dir
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: real_scan(tmp_path / "absent"))
    assert list_local_models() == []
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: real_scan(cache))
    for target, names in ((builtin, ["config.json"]), (folder, ["config.json", "x-Q8_0.gguf"])):
        for name in names:
            (target / name).write_text("{}")
    models = list_local_models()
    assert [model.name for model in models] == ["builtin", "Owner/name", "Owner/name/x-Q8_0.gguf"]
    assert [model.source for model in models] == ["builtin", "huggingface", "huggingface"]
    assert models[0].num_bytes == 2
