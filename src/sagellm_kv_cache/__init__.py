"""KV blocks and what requests can share of them: block pool, hash-chained prefix cache, eviction, block tables.

Bookkeeping only, in Python and numpy: the tensors that the blocks stand for belong to `sagellm_backend`.
`KVCacheManager` is the way in; `docs/kv-cache.md` explains the mechanism on one page.
"""

from sagellm_kv_cache.block import Block, FreeBlockQueue
from sagellm_kv_cache.block_pool import BlockPool
from sagellm_kv_cache.block_table import BlockTables
from sagellm_kv_cache.events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    CacheDigest,
    EventBatch,
    EventQueue,
    KVCacheEvent,
)
from sagellm_kv_cache.eviction import (
    EVICTION_POLICIES,
    CostPolicy,
    EvictionPolicy,
    HeapPolicy,
    LFUPolicy,
    LRUPolicy,
    PriorityPolicy,
    create_eviction_policy,
)
from sagellm_kv_cache.hashing import digest_of, extend_block_hashes, hash_block, root_hash
from sagellm_kv_cache.manager import CacheRequest, KVCacheManager
from sagellm_kv_cache.prefix_cache import PrefixCache
from sagellm_kv_cache.stats import KVCacheStats

__all__ = [
    "EVICTION_POLICIES",
    "AllBlocksCleared",
    "Block",
    "BlockPool",
    "BlockRemoved",
    "BlockStored",
    "BlockTables",
    "CacheDigest",
    "CacheRequest",
    "CostPolicy",
    "EventBatch",
    "EventQueue",
    "EvictionPolicy",
    "FreeBlockQueue",
    "HeapPolicy",
    "KVCacheEvent",
    "KVCacheManager",
    "KVCacheStats",
    "LFUPolicy",
    "LRUPolicy",
    "PrefixCache",
    "PriorityPolicy",
    "create_eviction_policy",
    "digest_of",
    "extend_block_hashes",
    "hash_block",
    "root_hash",
]
