"""The figures of a KV cache at one moment."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KVCacheStats:
    """Counters since the manager was made (they never go back) and gauges of now.

    A block is used while a request holds it; blocks that only the prefix cache keeps count as free, for they are
    given up on demand. Prefix tokens are counted once an admission (a resumed request is admitted again), and only
    for requests that may read the cache.
    """

    num_blocks: int
    num_used_blocks: int
    num_cached_blocks: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    evict_count: int
    evict_ms: float

    @property
    def num_free_blocks(self) -> int:
        """Blocks that a request could get now."""
        return self.num_blocks - self.num_used_blocks

    @property
    def usage(self) -> float:
        """Share of the blocks in use, 0 to 1."""
        return self.num_used_blocks / self.num_blocks

    @property
    def prefix_hit_rate(self) -> float:
        """Share of the queried tokens that were found, 0 to 1; 0 before the first query."""
        return self.prefix_hit_tokens / self.prefix_query_tokens if self.prefix_query_tokens else 0.0
