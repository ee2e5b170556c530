"""Reports on their way out: nothing but the token ids of cached blocks stays behind."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_core.engine_core.report import EngineReport, EngineStats, StepSample
from sagellm_core.report_codec import CacheEvents, PackedReport, pack_cache, pack_report, unpack_cache, unpack_report
from sagellm_kv_cache import AllBlocksCleared, BlockRemoved, BlockStored, CacheDigest, EventBatch

counts = st.integers(0, 2**40)
hashes = st.binary(min_size=8, max_size=32)
many_hashes = st.lists(hashes, min_size=1, max_size=4).map(tuple)
events = st.one_of(
    st.builds(BlockStored, many_hashes, hashes, st.lists(counts, max_size=4).map(tuple), st.integers(1, 256)),
    st.builds(BlockRemoved, many_hashes),
    st.just(AllBlocksCleared()),
)
batches = st.builds(EventBatch, counts, st.lists(events, max_size=5).map(tuple), counts)
seconds = st.floats(0, 1e6)
stats = st.builds(EngineStats, *[counts] * 4, st.floats(0, 1), *[counts] * 5)
steps = st.lists(st.builds(StepSample, counts, seconds, counts, counts, seconds), max_size=3).map(tuple)
digests = st.builds(CacheDigest, counts, st.integers(0, 2**64 - 1))
reports = st.builds(EngineReport, st.text(max_size=16), counts, stats, steps, batches, digests)


def without_tokens(batch: EventBatch) -> EventBatch:
    kept = tuple(replace(event, token_ids=()) if isinstance(event, BlockStored) else event for event in batch)
    return replace(batch, events=kept)


@pytest.mark.parametrize("codec", [msgspec.json, msgspec.msgpack])
@given(report=reports)
def test_a_report_comes_back(codec: object, report: EngineReport) -> None:
    content = codec.encode(pack_report(report))  # type: ignore[attr-defined]
    found = unpack_report(codec.decode(content, type=PackedReport))  # type: ignore[attr-defined]
    assert found == replace(report, cache=without_tokens(report.cache))


@given(batch=batches)
def test_cache_events_come_back(batch: EventBatch) -> None:
    content = msgspec.json.encode(pack_cache(batch))
    assert unpack_cache(msgspec.json.decode(content, type=CacheEvents)) == without_tokens(batch)
