"""Engines over small random checkpoints: what the tests of the whole engine start from."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from model_zoo import build
from sagellm_core import LLMEngine, LLMEngineConfig
from small_tokenizers import byte_level_backend

BLOCK_SIZE = 8


def build_checkpoint(folder: Path, family: str = "llama", *, seed: int = 0) -> Any:
    """Write a checkpoint with a tokenizer to `folder`; returns the `transformers` model."""
    model = build(family, folder, seed=seed)
    byte_level_backend(vocab_size=300).save(str(folder / "tokenizer.json"))
    return model


def make_engine(folder: Path, **fields: Any) -> LLMEngine:
    """An engine with room for a few short requests, not started; `fields` are those of its configuration."""
    small = {"max_model_len": 128, "num_kv_blocks": 128, "block_size": BLOCK_SIZE, "max_batch_size": 16}
    return LLMEngine(
        LLMEngineConfig.model_validate({"model_path": str(folder), "backend_type": "cpu"} | small | fields)
    )


def loop_threads() -> list[str]:
    """The names of the step loops' threads that are alive."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("engine-core")]
