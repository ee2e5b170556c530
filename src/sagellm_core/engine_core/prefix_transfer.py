"""Cached prefixes out of an engine core and into another, a bounded number of bytes between two steps.

`read_prefix` and `write_prefix` run in the step loop's thread; `export_prefix` and `import_prefix` call them until all
is done. What is in between evicted simply ends an export, or is written once more by an import.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from sagellm_core.engine_core.client import EngineCoreClient
from sagellm_core.engine_core.engine_core import EngineCore
from sagellm_core.kv_format import KVFormat, PrefixBlocks
from sagellm_kv_cache import Block
from sagellm_protocol import KVErrorCode, KVTransferError, UnsupportedError

# Copied at once: some ten milliseconds in which no step runs.
_MAX_BYTES = 64 * 2**20


@dataclass(slots=True, eq=False)
class _Prefix:
    """A `CacheRequest` that stands for a sequence nobody runs."""

    token_ids: Sequence[int]
    cache_salt: str | None
    lora_id: str | None
    request_id: str = "prefix transfer"
    num_computed_tokens: int = 0
    blocks: list[Block] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    read_prefix_cache: bool = False


async def export_prefix(
    client: EngineCoreClient, token_ids: Sequence[int], cache_salt: str | None, lora_id: str | None
) -> PrefixBlocks | None:
    """The full cached blocks of the longest cached prefix of `token_ids`; None where there is none."""
    prefix = _Prefix(tuple(token_ids), cache_salt, lora_id)
    parts: list[bytes] = []
    num_blocks = 0
    while True:
        format, part = await client.call(partial(read_prefix, prefix=prefix, first=num_blocks))
        if not part:
            break
        parts.append(part)
        num_blocks += len(part) // format.bytes_per_block
    if not num_blocks:
        return None
    block_size = await client.call(lambda core: core.kv_cache.block_size)
    tokens = tuple(token_ids[: num_blocks * block_size])
    return await asyncio.to_thread(lambda: PrefixBlocks.of(tokens, cache_salt, lora_id, format, b"".join(parts)))


async def import_prefix(client: EngineCoreClient, blocks: PrefixBlocks) -> int:
    """Put blocks into the prefix cache; returns how many of their tokens are cached now."""
    await asyncio.to_thread(blocks.verify)
    num_cached, is_more = 0, True
    while is_more:
        num_cached, is_more = await client.call(partial(write_prefix, blocks=blocks))
    return num_cached


def read_prefix(core: EngineCore, *, prefix: _Prefix, first: int) -> tuple[KVFormat, bytes]:
    """The content of cached blocks from number `first` on, as much as may be read at once; empty at the end."""
    _check_caching(core)
    format = core.executor.kv_format()
    most = max(1, _MAX_BYTES // format.bytes_per_block)
    found = core.kv_cache.find_cached_blocks(prefix)[first : first + most]
    return format, core.executor.read_blocks([block.block_id for block in found]) if found else b""


def write_prefix(core: EngineCore, *, blocks: PrefixBlocks) -> tuple[int, bool]:
    """Write blocks that are missing, as many as may be written at once: (tokens cached, whether some are to come).

    They count as free blocks at once, like those of a finished request. Blocks that requests hold make no room: where
    there is not enough, the first ones are taken.
    """
    _check_caching(core)
    core.executor.kv_format().check_equals(blocks.format)
    cache, width = core.kv_cache, blocks.format.bytes_per_block
    if len(blocks.data) != blocks.num_blocks * width or blocks.num_tokens != blocks.num_blocks * cache.block_size:
        raise KVTransferError(
            f"{blocks.num_tokens} tokens and {len(blocks.data)} bytes are no blocks of {cache.block_size} tokens and "
            f"{width} bytes; export them again",
            retryable=False,
            kv_code=KVErrorCode.LAYOUT_MISMATCH.value,
        )
    prefix = _Prefix(blocks.token_ids, blocks.cache_salt, blocks.lora_id)
    found = cache.find_cached_blocks(prefix)
    room = cache.num_free_blocks - sum(block.ref_count == 0 for block in found)
    num_new = min(blocks.num_blocks - len(found), room, max(1, _MAX_BYTES // width))
    if num_new <= 0:
        return len(found) * cache.block_size, False
    num_blocks = len(found) + num_new
    prefix.token_ids = blocks.token_ids[: num_blocks * cache.block_size]
    if not cache.allocate_slots(prefix, num_new * cache.block_size, found):
        return len(found) * cache.block_size, False
    try:
        data = memoryview(blocks.data)[len(found) * width : num_blocks * width]
        core.executor.write_blocks([block.block_id for block in prefix.blocks[len(found) :]], data)
        prefix.num_computed_tokens = len(prefix.token_ids)
        cache.cache_full_blocks(prefix)
    finally:
        cache.free(prefix)
    return num_blocks * cache.block_size, num_blocks < blocks.num_blocks


def _check_caching(core: EngineCore) -> None:
    if not core.kv_cache.enable_prefix_caching:
        raise UnsupportedError(
            "prefixes are handed over through the prefix cache, which is off; set enable_prefix_caching",
            field="enable_prefix_caching",
        )
