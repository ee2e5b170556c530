"""The seam between the step loop and whatever computes a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from sagellm_core.engine_core.output import ModelRunnerOutput, SchedulerOutput


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

    @abstractmethod
    def shutdown(self) -> None:
        """Free weights and caches; the executor is not used again."""
