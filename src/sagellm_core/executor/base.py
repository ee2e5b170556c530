"""The seam between the step loop and whatever computes a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from sagellm_core.engine_core.output import ModelRunnerOutput, SchedulerOutput
from sagellm_core.kv_format import KVFormat
from sagellm_protocol import UnsupportedError


@dataclass(frozen=True, slots=True)
class KVCacheCapacity:
    """What the workers can hold: blocks of `block_size` tokens, and the bytes that one token takes over all layers."""

    num_blocks: int
    block_size: int
    bytes_per_token: int


class Executor(ABC):
    """Runs steps on one or several workers. Called from the step loop's thread only."""

    @abstractmethod
    def start(self) -> KVCacheCapacity:
        """Load the model and allocate the KV cache; raises the protocol's errors."""

    @abstractmethod
    def execute_model(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Compute one step."""

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """Device, dtypes, chosen kernels and memory, for `info` and `/info`."""

    def kv_format(self) -> KVFormat:
        """What the bytes of a KV block mean; raises `UnsupportedError` where blocks cannot leave the workers."""
        raise UnsupportedError("this engine's KV cache cannot be read or written from outside; let it compute prompts")

    def read_blocks(self, block_ids: Sequence[int]) -> bytes:
        """The content of these blocks, one after the other."""
        raise UnsupportedError("this engine's KV cache cannot be read from outside")

    def write_blocks(self, block_ids: Sequence[int], data: memoryview) -> None:
        """Fill these blocks with what `read_blocks` of an executor of the same format returned."""
        raise UnsupportedError("this engine's KV cache cannot be written from outside")

    @abstractmethod
    def shutdown(self) -> None:
        """Free weights and caches; the executor is not used again."""
