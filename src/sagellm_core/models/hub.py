"""Model names -> folders and files on this machine.

A name is `builtin`, a folder, a `.gguf` file, a hub id such as `Qwen/Qwen3-0.6B`, or a file on the hub such as
`Qwen/Qwen3-0.6B-GGUF/Qwen3-0.6B-Q8_0.gguf`. Downloads go to the cache of the library that makes them, which also
honours its settings (`HF_HOME`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_TOKEN`); `modelscope:` before an id, or
`source="modelscope"`, asks ModelScope instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Literal

from sagellm_protocol.errors import (
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
)

__all__ = ["BUILTIN_MODEL", "LocalModel", "Source", "list_local_models", "resolve_config", "resolve_model"]

Source = Literal["auto", "huggingface", "modelscope"]

BUILTIN_MODEL = "builtin"
"""Name of the model that is shipped with the package."""

_BUILTIN_FOLDER = Path(__file__).parent / "builtin"
_MODELSCOPE_PREFIX = "modelscope:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
# Sub-folders and `consolidated*` hold the same weights once more, in other formats; all but `1_Pooling`, which says how
# vectors are made.
_UNWANTED = ["[!0-9]*/*", "consolidated*", "*.onnx.json", "training_args*"]


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model that is on this machine: what to call it, where it lies, its size on disk, where it came from."""

    name: str
    path: Path
    num_bytes: int
    source: Literal["builtin", "huggingface"]


def resolve_model(model: str, *, revision: str | None = None, source: Source = "auto") -> Path:
    """The folder or `.gguf` file of `model`, downloaded first (with a progress bar) if it is a hub id.

    Raises `NotFoundError` for a path or id that does not exist, `PermissionDeniedError` for a gated model,
    `UnavailableError` when the hub cannot be reached and the model is not in the cache.
    """
    if model == BUILTIN_MODEL:
        return _builtin()
    path = Path(model).expanduser()
    if model and path.exists():
        return path
    if model.startswith(_MODELSCOPE_PREFIX):
        model, source = model.removeprefix(_MODELSCOPE_PREFIX), "modelscope"
    repository, file = _split_file(model)
    if not _HUB_ID.fullmatch(repository) or path.is_absolute() or model.startswith((".", "~")):
        raise NotFoundError(
            f"{model or 'empty model name'}: no such folder or file, and not a hub id (owner/name); "
            "check the path, or use 'builtin'",
            field="model",
        )
    if source == "modelscope":
        return _from_modelscope(repository, file, revision)
    return _from_huggingface(repository, file, revision)


def resolve_config(model: str) -> Path:
    """The `config.json` of `model`, a folder, such a file, or a hub id; of the latter nothing else is downloaded.

    Raises as `resolve_model`, and `NotFoundError` for a folder without one.
    """
    path = _builtin() if model == BUILTIN_MODEL else Path(model).expanduser()
    if path.is_dir():
        path /= "config.json"
    if path.is_file() and path.suffix == ".json":
        return path
    if path.exists() or not _HUB_ID.fullmatch(model) or model.startswith("."):
        raise NotFoundError(
            f"{model or 'empty model name'}: no config.json there, and not a hub id (owner/name); check the path",
            field="model",
        )
    return _hub_file(model, "config.json", None)


def list_local_models() -> list[LocalModel]:
    """The built-in model and every model in the Hugging Face cache that has a configuration or a GGUF file."""
    models = []
    if (_BUILTIN_FOLDER / "config.json").is_file():
        models.append(LocalModel(BUILTIN_MODEL, _BUILTIN_FOLDER, _folder_bytes(_BUILTIN_FOLDER), "builtin"))
    return models + sorted(_cached_models(), key=lambda model: model.name.lower())


def _builtin() -> Path:
    if not (_BUILTIN_FOLDER / "config.json").is_file():
        raise NotFoundError(
            "the built-in model is not part of this installation; reinstall isagellm, or name another model",
            field="model",
        )
    return _BUILTIN_FOLDER


def _split_file(model: str) -> tuple[str, str | None]:
    """`owner/name/file.gguf` -> (`owner/name`, `file.gguf`); everything else is a repository."""
    parts = model.split("/", 2)
    if len(parts) == 3 and model.endswith(".gguf"):
        return "/".join(parts[:2]), parts[2]
    return model, None


def _from_huggingface(repository: str, file: str | None, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    if file is not None:
        return _hub_file(repository, file, revision)
    with _hub_errors(repository):
        folder = Path(
            snapshot_download(repository, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
        )
    if not any(folder.glob("*.safetensors")):
        raise InvalidArgumentError(
            f"{repository}: has no safetensors weights; pickles are refused, choose a repository with safetensors, "
            "or name a GGUF file in it (owner/name/file.gguf)",
            field="model",
        )
    return folder


def _hub_file(repository: str, file: str, revision: str | None) -> Path:
    # Not by `hf_hub_download`, which tries a hub that is out of reach for half a minute.
    from huggingface_hub import snapshot_download

    with _hub_errors(repository):
        path = Path(snapshot_download(repository, revision=revision, allow_patterns=[escape(file)])) / file
    if not path.exists():
        raise NotFoundError(f"{repository}: there is no {file}; check its name and the network", field="model")
    return path


def _from_modelscope(repository: str, file: str | None, revision: str | None) -> Path:
    try:
        from modelscope import snapshot_download  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise UnavailableError("ModelScope needs its package; pip install 'isagellm[modelscope]'") from error
    patterns = [file] if file else _WANTED
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the library raises whatever its HTTP client does
        raise UnavailableError(
            f"{repository}: cannot be downloaded from ModelScope ({_first_line(error)}); check the id and the network",
            field="model",
        ) from error
    return folder / file if file else folder


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into this library's errors."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise PermissionDeniedError(
            f"{repository}: access is restricted; accept its terms on the hub and set HF_TOKEN", field="model"
        ) from error
    except errors.HFValidationError as error:
        raise NotFoundError(
            f"{repository}: neither a path nor a valid hub id; check the name", field="model"
        ) from error
    except Exception as error:  # besides its own errors the library raises whatever its HTTP client does
        absent = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError)
        if isinstance(error, absent) and not isinstance(error, errors.LocalEntryNotFoundError):
            raise NotFoundError(
                f"{repository}: not found on the hub; check model id and revision, or log in if it is private",
                field="model",
            ) from error
        raise UnavailableError(
            f"{repository}: not in the cache, and the hub cannot be reached ({_first_line(_cause(error))}); check the "
            "network and HF_ENDPOINT, unset HF_HUB_OFFLINE, or give a local folder; 'builtin' needs no network",
            field="model",
        ) from error


def _cached_models() -> Iterator[LocalModel]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return
    for repository in cache.repos:
        if repository.repo_type != "model" or not repository.revisions:
            continue
        newest = max(repository.revisions, key=lambda revision: revision.last_modified)
        for file in newest.files:
            if file.file_name == "config.json" and file.file_path.parent == newest.snapshot_path:
                yield LocalModel(repository.repo_id, newest.snapshot_path, repository.size_on_disk, "huggingface")
            elif file.file_name.endswith(".gguf"):
                name = f"{repository.repo_id}/{file.file_name}"
                yield LocalModel(name, file.file_path, file.size_on_disk, "huggingface")


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _cause(error: BaseException) -> BaseException:
    """What went wrong first: the library's own sentences wrap it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
