"""Engines over small random checkpoints: what the tests of the whole engine start from."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model_zoo import build
from sagellm_core import LLMEngine, LLMEngineConfig
from small_tokenizers import byte_level_backend
from waiting import PATIENCE_S

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


class Brake:
    """Holds engines in the midst of requests, which else may have ended before a test has come to its point.

    `forward` is that of the models. While a step is held its engine answers nothing that is asked of its step loop.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward
        self._num_left = 0
        self._is_held = threading.Event()
        self._goes_on = threading.Event()
        self._goes_on.set()

    def set(self, num_steps: int) -> None:
        """Hold the step after the next `num_steps`."""
        self._num_left = num_steps
        self._is_held.clear()
        self._goes_on.clear()

    async def held(self) -> None:
        """Wait until a step is held."""
        assert await asyncio.to_thread(self._is_held.wait, PATIENCE_S)

    def release(self) -> None:
        self._goes_on.set()

    def forward(self, *arguments: Any) -> Any:
        if not self._goes_on.is_set():
            if self._num_left == 0:
                self._is_held.set()
                assert self._goes_on.wait(PATIENCE_S)
            self._num_left -= 1
        return self._forward(*arguments)


def loop_threads() -> list[str]:
    """The names of the step loops' threads that are alive."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("engine-core")]
