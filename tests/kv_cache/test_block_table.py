from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_kv_cache import Block, BlockTables
from sagellm_protocol import InternalError, ResourceExhaustedError


@st.composite
def steps(draw: st.DrawFn) -> tuple[int, list[list[int]], list[tuple[int, int, int]]]:
    """(block size, block ids of each row, scheduled (row, start, count))."""
    block_size = draw(st.sampled_from([1, 2, 3, 8, 16]))
    tables = draw(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=6), min_size=1, max_size=5))
    scheduled = []
    for row in draw(st.permutations(range(len(tables)))):
        start = draw(st.integers(0, len(tables[row]) * block_size))
        scheduled.append((row, start, draw(st.integers(0, len(tables[row]) * block_size - start))))
    return block_size, tables, scheduled


@given(steps())
def test_slots_and_rows_equal_a_loop_over_tokens(step: tuple[int, list[list[int]], list[tuple[int, int, int]]]) -> None:
    block_size, ids, scheduled = step
    tables = BlockTables(len(ids), 6, block_size)
    for expected_row, blocks in enumerate(ids):
        assert tables.add_row() == expected_row
        tables.append(expected_row, blocks)
    rows, starts, counts = (np.array(column) for column in zip(*scheduled, strict=True))
    expected = [
        ids[row][position // block_size] * block_size + position % block_size
        for row, start, count in scheduled
        for position in range(start, start + count)
    ]
    slots = tables.slots_batch(rows, starts.astype(np.int32), counts.astype(np.int32))
    assert slots.dtype == np.int64
    assert slots.tolist() == expected
    for row, start, count in scheduled:
        assert tables.slots(row, start, start + count).tolist() == tables.slots_batch([row], [start], [count]).tolist()
    width = max(len(ids[row]) for row in rows)
    block_tables = tables.rows(rows)
    assert block_tables.dtype == np.int32
    assert block_tables.tolist() == [(ids[row] + [0] * width)[:width] for row in rows]
    assert tables.rows(rows, 2).shape == (len(rows), 2)


def test_a_step_of_decodes_takes_no_repeat() -> None:
    tables = BlockTables(2, 4, 4)
    for blocks in ([7, 5], [2]):
        tables.append(tables.add_row(), blocks)
    assert tables.slots_batch([1, 0], [3, 6], [1, 1]).tolist() == [11, 22]
    assert tables.slots_batch([], [], []).tolist() == []
    assert tables.rows([]).shape == (0, 0)


def test_counts_that_average_one_are_not_mistaken_for_decodes() -> None:
    tables = BlockTables(2, 4, 4)
    for blocks in ([7], [2]):
        tables.append(tables.add_row(), blocks)
    assert tables.slots_batch([0, 1], [0, 0], [2, 0]).tolist() == [28, 29]


def test_rows_are_copies_and_padding_is_zero() -> None:
    tables = BlockTables(2, 4, 4)
    row = tables.add_row()
    tables.append(row, [9, 8, 7])
    copy = tables.rows([row], 4)
    tables.clear(row)
    tables.append(row, [1])
    assert copy.tolist() == [[9, 8, 7, 0]]
    assert tables.rows([row], 4).tolist() == [[1, 0, 0, 0]]
    assert tables.num_blocks(row) == 1


def test_extend_to_adds_only_what_is_new() -> None:
    tables = BlockTables(1, 4, 4)
    row = tables.add_row()
    blocks = [Block(3), Block(1)]
    tables.extend_to(row, blocks)
    tables.extend_to(row, blocks)
    blocks.append(Block(2))
    tables.extend_to(row, blocks)
    assert tables.rows([row]).tolist() == [[3, 1, 2]]


def test_rows_run_out_and_come_back_empty() -> None:
    tables = BlockTables(2, 2, 4)
    assert [tables.add_row(), tables.add_row()] == [0, 1]
    with pytest.raises(ResourceExhaustedError, match="all 2 rows"):
        tables.add_row()
    tables.append(0, [5, 6])
    tables.free_row(0)
    with pytest.raises(AssertionError, match="free already"):
        tables.free_row(0)
    assert tables.add_row() == 0
    assert tables.rows([0], 2).tolist() == [[0, 0]]


def test_misuse_is_refused() -> None:
    tables = BlockTables(1, 2, 4)
    row = tables.add_row()
    tables.append(row, [0])
    with pytest.raises(InternalError, match="3 blocks of at most 2"):
        tables.append(row, [1, 2])
    with pytest.raises(InternalError, match="beyond the blocks"):
        tables.slots(row, 3, 5)
