"""An executor without a model: KV is a dict keyed by physical slot, the next token a hash of the whole context.

The context is read back through `block_tables`, so a wrong slot, table, length or a block written by two
requests changes the tokens and fails the comparison with `expected_tokens`.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from sagellm_core.engine_core.output import ModelRunnerOutput, SchedulerOutput
from sagellm_core.executor.base import Executor, KVCacheCapacity

VOCAB_SIZE = 97


def next_token(context: Sequence[int], seed: int = 0) -> int:
    """What the fake model says after `context`."""
    return zlib.crc32(np.asarray([seed, *context], dtype=np.int64).tobytes()) % VOCAB_SIZE


def expected_tokens(prompt: Sequence[int], count: int, seed: int = 0) -> list[int]:
    """The answer of `count` tokens that a request must get in any company."""
    context = list(prompt)
    for _ in range(count):
        context.append(next_token(context, seed))
    return context[len(prompt) :]


class FakeExecutor(Executor):
    """Checks every step it is given. `fail_on` names step ids whose execution raises."""

    def __init__(self, num_blocks: int, block_size: int, fail_on: frozenset[int] = frozenset()) -> None:
        self.capacity = KVCacheCapacity(num_blocks, block_size, bytes_per_token=8)
        self.kv: dict[int, tuple[int, int]] = {}
        self.fail_on = fail_on
        self.steps: list[SchedulerOutput] = []

    def start(self) -> KVCacheCapacity:
        return self.capacity

    def execute_model(self, output: SchedulerOutput) -> ModelRunnerOutput:
        self.steps.append(output)
        if output.step_id in self.fail_on:
            raise RuntimeError("the fake device broke")
        assert len(set(output.slot_mapping.tolist())) == len(output.slot_mapping), "a slot is written twice"
        written = zip(output.slot_mapping.tolist(), output.positions.tolist(), output.input_ids.tolist(), strict=True)
        for slot, position, token_id in written:
            self.kv[slot] = (position, token_id)
        token_ids = [
            next_token(self._context(output, row), request.sampling_row.seed)
            for row, request in enumerate(output.scheduled)
            if request.sampling_row is not None
        ]
        return ModelRunnerOutput(output.step_id, token_ids, [None] * len(token_ids))

    def describe(self) -> dict[str, object]:
        return {"device": "fake"}

    def shutdown(self) -> None:
        self.kv.clear()

    def _context(self, output: SchedulerOutput, row: int) -> list[int]:
        size = self.capacity.block_size
        context = []
        for position in range(int(output.context_lens[row])):
            block_id = int(output.block_tables[row, position // size])
            stored_position, token_id = self.kv[block_id * size + position % size]
            assert stored_position == position, "a block holds another place of the text"
            context.append(token_id)
        return context
