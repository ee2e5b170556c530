"""The index of cached content: block hash -> block, and the events that tell of its changes.

One hash leads to one block. Where two requests compute the same tokens side by side, the first to finish a block is
indexed and the other's block stays a private duplicate: block tables are append-only, so it is not swapped. If the
indexed one has been evicted by the time the duplicate is freed, the duplicate takes its place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from sagellm_kv_cache.block import Block
from sagellm_kv_cache.events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    CacheDigest,
    EventBatch,
    EventQueue,
    KVCacheEvent,
)
from sagellm_kv_cache.hashing import TOKEN_BYTES, decode_tokens, digest_of, encode_tokens


class PrefixCache:
    """Finds, enters and removes full blocks. It knows nothing of reference counts: that is the pool's part."""

    def __init__(self, block_size: int, events: EventQueue) -> None:
        self.block_size = block_size
        self.events = events
        self._index: dict[bytes, Block] = {}
        self._xor = 0

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._index.values())

    def __contains__(self, block: Block) -> bool:
        """Whether lookups lead to this very block (not to a duplicate of its content)."""
        return block.block_hash is not None and self._index.get(block.block_hash) is block

    @property
    def digest(self) -> CacheDigest:
        """The digest of what is indexed."""
        return CacheDigest(len(self._index), self._xor)

    def match(self, root: bytes, hashes: Sequence[bytes], token_ids: Sequence[int]) -> list[Block]:
        """The blocks of the longest cached prefix, from the start of the sequence to the first miss.

        `hashes` is the chain over `token_ids` from `root`. Each hit is compared with the tokens themselves, so that
        not even a wrong or outdated `hashes` can lead to another sequence's keys and values.
        """
        hits: list[Block] = []
        for block_hash in hashes:
            block = self._index.get(block_hash)
            if block is None:
                break
            hits.append(block)
        return hits[: self._num_verified(hits, root, token_ids)]

    def _num_verified(self, hits: list[Block], root: bytes, token_ids: Sequence[int]) -> int:
        if not hits or hits[0].parent_hash != root:
            return 0
        tokens = encode_tokens(token_ids[: len(hits) * self.block_size])
        if b"".join([block.token_bytes for block in hits]) == tokens:
            return len(hits)
        width = self.block_size * TOKEN_BYTES
        for index, block in enumerate(hits):
            if block.token_bytes != tokens[index * width : (index + 1) * width]:
                return index
        return len(hits)

    def store(self, blocks: Iterable[Block]) -> None:
        """Index full, consecutive blocks of one sequence; content that is indexed already is left as it is."""
        run: list[Block] = []
        for block in blocks:
            assert block.block_hash is not None, f"{block!r} is not full"
            if block.block_hash in self._index:
                self._put_stored(run)
                run = []
            else:
                self._index[block.block_hash] = block
                self._xor ^= digest_of(block.block_hash)
                run.append(block)
        self._put_stored(run)

    def remove(self, blocks: Sequence[Block]) -> None:
        """Forget these indexed blocks: they are being evicted."""
        hashes: list[bytes] = []
        for block in blocks:
            assert block in self, f"{block!r} is not indexed"
            assert block.block_hash is not None
            del self._index[block.block_hash]
            self._xor ^= digest_of(block.block_hash)
            hashes.append(block.block_hash)
        if self.events.is_enabled and hashes:
            self.events.put(BlockRemoved(tuple(hashes)))

    def clear(self) -> None:
        """Forget everything."""
        self._index.clear()
        self._xor = 0
        if self.events.is_enabled:
            self.events.put(AllBlocksCleared())

    def resync_events(self) -> EventBatch:
        """The whole index as events, predecessors first; replaces what is queued."""
        children: defaultdict[bytes | None, list[Block]] = defaultdict(list)
        for block in self:
            children[block.parent_hash].append(block)
        # Runs start where the predecessor is not indexed: at roots, and behind evicted blocks.
        pending = [block for parent in children if parent not in self._index for block in children[parent]]
        events: list[KVCacheEvent] = [AllBlocksCleared()]
        while pending:
            run = [pending.pop()]
            while len(followers := children[run[-1].block_hash]) == 1:
                run.append(followers[0])
            events.append(self._stored(run))
            pending.extend(followers)
        return self.events.replace(events)

    def _put_stored(self, run: list[Block]) -> None:
        if run and self.events.is_enabled:
            self.events.put(self._stored(run))

    def _stored(self, run: Sequence[Block]) -> BlockStored:
        parent_hash = run[0].parent_hash
        assert parent_hash is not None
        return BlockStored(
            hashes=tuple(block.block_hash for block in run if block.block_hash is not None),
            parent_hash=parent_hash,
            token_ids=decode_tokens(b"".join(block.token_bytes for block in run)),
            block_size=self.block_size,
        )
