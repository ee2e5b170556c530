"""A name for a model's weights that is the same on every machine: holds `model_fingerprint`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from sagellm_core.version import __version__

from .checkpoint import safetensors_files

_PIECE_BYTES = 16384
_NUM_PIECES = 64


def model_fingerprint(path: Path, how: Iterable[str]) -> str:
    """40 hex digits of the model at `path` (a folder or a `.gguf` file) and of `how` it is loaded.

    Of each file the name, the size and a megabyte in pieces from end to end: a checkpoint that was trained further
    differs everywhere, and to read gigabytes would take longer than what the fingerprint is for.
    """
    files = [path] if path.is_file() else [path / "config.json", *safetensors_files(path)]
    digest = hashlib.sha256(json.dumps([__version__, *how]).encode())
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(json.dumps([file.name if path.is_dir() else "", size]).encode())
        with file.open("rb") as stream:
            for piece in range(_NUM_PIECES):
                stream.seek(max(0, size - _PIECE_BYTES) * piece // (_NUM_PIECES - 1))
                digest.update(stream.read(_PIECE_BYTES))
    return digest.hexdigest()[:40]
