"""Reports and cache events on their way out of the engine's process: plain structs for msgpack and JSON.

Token ids of cached blocks stay with the engine: whoever keeps a copy of its index needs the blocks' hashes only.
"""

from __future__ import annotations

import msgspec

from sagellm_core.engine_core.report import EngineReport, EngineStats, StepSample
from sagellm_kv_cache.events import AllBlocksCleared, BlockRemoved, BlockStored, CacheDigest, EventBatch


class Stored(msgspec.Struct, array_like=True, gc=False, tag=1):
    """`BlockStored` without its token ids."""

    hashes: tuple[bytes, ...]
    parent_hash: bytes
    block_size: int


class Removed(msgspec.Struct, array_like=True, gc=False, tag=2):
    """`BlockRemoved`."""

    hashes: tuple[bytes, ...]


class Cleared(msgspec.Struct, array_like=True, gc=False, tag=3):
    """`AllBlocksCleared`."""


class CacheEvents(msgspec.Struct, array_like=True, gc=False):
    """`EventBatch`."""

    sequence: int
    events: tuple[Stored | Removed | Cleared, ...]
    num_dropped: int


class PackedReport(msgspec.Struct, array_like=True, gc=False):
    """`EngineReport`; `steps` holds the fields of each `StepSample` in order."""

    epoch: str
    sequence: int
    stats: EngineStats
    steps: list[tuple[int, float, int, int, float]]
    cache: CacheEvents
    digest: CacheDigest


def pack_cache(batch: EventBatch) -> CacheEvents:
    """Cache events as they travel."""
    return CacheEvents(batch.sequence, tuple(_pack_event(event) for event in batch), batch.num_dropped)


def unpack_cache(events: CacheEvents) -> EventBatch:
    """Cache events as they were, without token ids."""
    return EventBatch(events.sequence, tuple(_unpack_event(event) for event in events.events), events.num_dropped)


def _pack_event(event: BlockStored | BlockRemoved | AllBlocksCleared) -> Stored | Removed | Cleared:
    if isinstance(event, BlockStored):
        return Stored(event.hashes, event.parent_hash, event.block_size)
    return Removed(event.hashes) if isinstance(event, BlockRemoved) else Cleared()


def _unpack_event(event: Stored | Removed | Cleared) -> BlockStored | BlockRemoved | AllBlocksCleared:
    if isinstance(event, Stored):
        return BlockStored(event.hashes, event.parent_hash, (), event.block_size)
    return BlockRemoved(event.hashes) if isinstance(event, Removed) else AllBlocksCleared()


def pack_report(report: EngineReport) -> PackedReport:
    """A report as it travels."""
    return PackedReport(
        report.epoch,
        report.sequence,
        report.stats,
        [
            (step.prefill_tokens, step.prefill_attention, step.kv_tokens, step.num_decoding, step.duration_s)
            for step in report.steps
        ],
        pack_cache(report.cache),
        report.digest,
    )


def unpack_report(report: PackedReport) -> EngineReport:
    """The report; its cache events come without token ids."""
    return EngineReport(
        epoch=report.epoch,
        sequence=report.sequence,
        stats=report.stats,
        steps=tuple(StepSample(*step) for step in report.steps),
        cache=unpack_cache(report.cache),
        digest=report.digest,
    )
