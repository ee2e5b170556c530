"""One worker in this process: the executor of a single device."""

from __future__ import annotations

from collections.abc import Sequence

from sagellm_core.engine_core.output import ModelRunnerOutput, SchedulerOutput
from sagellm_core.executor.base import Executor, KVCacheCapacity
from sagellm_core.kv_format import KVFormat
from sagellm_core.worker.worker import Worker


class UniprocExecutor(Executor):
    """Passes the same `SchedulerOutput` object on; nothing is copied."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def start(self) -> KVCacheCapacity:
        self._worker.load_model()
        return self._worker.allocate_kv_cache()

    def execute_model(self, output: SchedulerOutput) -> ModelRunnerOutput:
        return self._worker.execute_model(output)

    def describe(self) -> dict[str, object]:
        return self._worker.describe()

    def kv_format(self) -> KVFormat:
        return self._worker.kv_format()

    def read_blocks(self, block_ids: Sequence[int]) -> bytes:
        return self._worker.read_blocks(block_ids)

    def write_blocks(self, block_ids: Sequence[int], data: memoryview) -> None:
        self._worker.write_blocks(block_ids, data)

    def shutdown(self) -> None:
        self._worker.shutdown()
