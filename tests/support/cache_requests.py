"""A request with just what the KV cache manager reads, for tests that need no engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from sagellm_kv_cache import Block, KVCacheManager


@dataclass(eq=False)
class FakeRequest:
    """Satisfies `sagellm_kv_cache.CacheRequest`."""

    token_ids: list[int]
    request_id: str = "req-test"
    num_computed_tokens: int = 0
    blocks: list[Block] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    cache_salt: str | None = None
    lora_id: str | None = None
    read_prefix_cache: bool = True

    @property
    def block_ids(self) -> list[int]:
        return [block.block_id for block in self.blocks]


def compute(manager: KVCacheManager, request: FakeRequest, num_tokens: int | None = None) -> int:
    """Admit if needed and compute up to `num_tokens` (default: all); returns how many tokens came from the cache."""
    cached, num_cached = manager.find_cached_prefix(request) if not request.blocks else ([], 0)
    done = max(request.num_computed_tokens, num_cached)
    target = len(request.token_ids) if num_tokens is None else num_tokens
    assert manager.allocate_slots(request, target - done, cached)
    request.num_computed_tokens = target
    manager.cache_full_blocks(request)
    return num_cached


def run_and_free(manager: KVCacheManager, request: FakeRequest, *, retention: int = 0) -> int:
    """Compute a request from start to end; returns how many tokens came from the cache."""
    num_cached = compute(manager, request)
    release(manager, request, retention=retention)
    return num_cached


def release(manager: KVCacheManager, request: FakeRequest, *, retention: int = 0) -> None:
    """Give the blocks back, as at the end or at a preemption."""
    manager.free(request, retention=retention)
    request.num_computed_tokens = 0
