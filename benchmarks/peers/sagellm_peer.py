"""This engine, through its public `LLMEngine`."""

from __future__ import annotations

import asyncio
from typing import Any

from sagellm_benchmark.requests import stream_batch
from sagellm_core import LLMEngine, LLMEngineConfig
from sagellm_core.version import __version__

_BLOCK_SIZE = 16


def prepare(model: str, weights: str, folder: str) -> str:
    """The checkpoint as it is: it is quantized at load."""
    del weights, folder
    return model


class Peer:
    """A started engine and the event loop it answers on."""

    def __init__(self, checkpoint: str, weights: str, threads: int, max_requests: int, max_len: int) -> None:
        config: dict[str, Any] = {
            "model_path": checkpoint,
            "backend_type": "cpu",
            "num_threads": threads,
            "max_batch_size": max_requests,
            "max_model_len": max_len,
            "num_kv_blocks": max_requests * (max_len // _BLOCK_SIZE + 1),
            "enable_prefix_caching": False,
        }
        if weights != "16-bit":
            config["quantization"] = weights
        self.loop = asyncio.new_event_loop()
        self.engine = LLMEngine(LLMEngineConfig(**config))
        self.loop.run_until_complete(self.engine.start())

    def describe(self) -> dict[str, Any]:
        """Version, dtype and kernels."""
        return {"package": f"sagellm {__version__}", **self.engine.get_info()}

    def generate(self, prompts: list[list[int]], output_len: int) -> list[list[float]]:
        """See worker.py."""
        return self.loop.run_until_complete(stream_batch(self.engine, prompts, output_len))
