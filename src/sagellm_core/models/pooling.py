"""How a model's hidden states become one vector of a text.

Embedding checkpoints say it in the files of sentence-transformers: `modules.json` lists what follows the transformer,
`1_Pooling/config.json` how rows become one, `sentence_bert_config.json` the longest text that the model was made for
(https://sbert.net/docs/sentence_transformer/usage/custom_models.html). Without them an encoder takes the mean of its
rows and a decoder its last row, the only one that has seen the whole text; the vector then gets length 1, as OpenAI's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sagellm_protocol.errors import InvalidArgumentError, UnsupportedError

from .checkpoint import read_json, read_json_list
from .hf_config import HFConfig

__all__ = ["Pooling", "PoolingSpec", "read_max_text_tokens", "read_pooling"]

Pooling = Literal["cls", "last", "max", "mean"]
"""The first row, the last, or the largest value or mean of all rows in each dimension."""

_MODES: dict[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
}
_MODE_PREFIX = "pooling_mode_"
_NAMES: dict[str, Pooling] = {"cls": "cls", "lasttoken": "last", "max": "max", "mean": "mean"}
_MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True, slots=True)
class PoolingSpec:
    """How rows become a vector, and whether its length is made 1."""

    pooling: Pooling
    normalize: bool = True


def read_pooling(path: Path, default: Pooling) -> PoolingSpec:
    """What the checkpoint at `path` says, or `default` and normalised.

    Raises `UnsupportedError` for a module or a pooling that is not built, `InvalidArgumentError` for broken files.
    """
    file = path / "modules.json"
    if not file.is_file():
        return PoolingSpec(default)
    modules = [_module(file, entry) for entry in read_json_list(file)]
    unknown = next((kind for kind, _ in modules if kind not in _MODULES), None)
    if unknown is not None:
        raise UnsupportedError(
            f"{file}: the module {unknown} is not supported; supported: {', '.join(_MODULES)}", field="model"
        )
    pooling = next((_pooling(path / folder / "config.json") for kind, folder in modules if kind == "Pooling"), default)
    return PoolingSpec(pooling, normalize=any(kind == "Normalize" for kind, _ in modules))


def read_max_text_tokens(path: Path) -> int | None:
    """The longest text in tokens that the checkpoint says it is made for; None where it doesn't say."""
    file = path / "sentence_bert_config.json"
    if not file.is_file():
        return None
    return HFConfig(read_json(file), file).optional_integer("max_seq_length")


def _module(file: Path, entry: Any) -> tuple[str, str]:
    """(last part of the class name, folder) of an entry."""
    kind, folder = (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (None, None)
    # The folder is foreign: it must not lead out of the checkpoint.
    if not isinstance(kind, str) or not isinstance(folder, str) or folder != Path(folder).name:
        raise InvalidArgumentError(f"{file}: each module needs a type and the name of a folder; download it again")
    return kind.rpartition(".")[2], folder


def _pooling(file: Path) -> Pooling:
    values = read_json(file)
    name = values.get("pooling_mode")
    found = [name] if name is not None else [key for key, value in values.items() if _is_chosen_mode(key, value)]
    known = {**_MODES, **_NAMES}
    if len(found) != 1 or found[0] not in known:
        chosen = ", ".join(str(mode) for mode in found) or "none"
        raise UnsupportedError(
            f"{file}: the pooling {chosen} is not supported; supported is one of {', '.join(_NAMES)}", field="model"
        )
    return known[found[0]]


def _is_chosen_mode(key: str, value: Any) -> bool:
    return key.startswith(_MODE_PREFIX) and value is True
