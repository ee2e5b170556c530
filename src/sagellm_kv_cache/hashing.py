"""The names of cached content: a chain of SHA-256 digests, one a full block.

    root      = sha256(tag, cache_salt, lora_id)          one a tenant and adapter
    hash[0]   = sha256(root, tokens of block 0)
    hash[i]   = sha256(hash[i-1], tokens of block i)

So a hash names the *whole* sequence up to the end of its block together with everything else that its keys and
values depend on, and two requests share a block only where all of that is equal. Digests are kept at full length:
with a shorter or non-cryptographic hash one tenant could be served another's context by a constructed collision
(CVE-2025-25183 in vLLM). Equal on every machine and in every process, so routers can compute them too.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import sha256

from sagellm_protocol import InvalidArgumentError

TOKEN_BYTES = 4
_TAG = b"sagellm-kv-1"


def root_hash(cache_salt: str | None = None, lora_id: str | None = None) -> bytes:
    """The parent of every first block of one (salt, adapter) pair; None and "" are different."""
    return sha256(_TAG + _field(cache_salt) + _field(lora_id)).digest()


def hash_block(parent_hash: bytes, token_bytes: bytes) -> bytes:
    """The hash of a block from its predecessor's (or the root) and its encoded tokens.

    Unambiguous without a length: the parent has 32 bytes always, and all blocks of a pool hold as many tokens.
    """
    return sha256(parent_hash + token_bytes).digest()


def extend_block_hashes(
    hashes: list[bytes], token_ids: Sequence[int], block_size: int, num_blocks: int, root: bytes
) -> None:
    """Grow `hashes` in place to the first `num_blocks` blocks of `token_ids`; those present are not computed again."""
    first = len(hashes)
    if first >= num_blocks:
        return
    data = encode_tokens(token_ids[first * block_size : num_blocks * block_size])
    width = block_size * TOKEN_BYTES
    parent = hashes[-1] if hashes else root
    for start in range(0, len(data), width):
        parent = sha256(parent + data[start : start + width]).digest()
        hashes.append(parent)


def encode_tokens(token_ids: Sequence[int]) -> bytes:
    """Tokens as little-endian int32, four bytes each."""
    try:
        return struct.pack(f"<{len(token_ids)}i", *token_ids)
    except struct.error as error:
        raise InvalidArgumentError(
            f"a token id is not an integer of 32 bits ({error}); pass ids of the model's vocabulary", field="prompt"
        ) from error


def decode_tokens(token_bytes: bytes) -> tuple[int, ...]:
    """The inverse of `encode_tokens`."""
    return struct.unpack(f"<{len(token_bytes) // TOKEN_BYTES}i", token_bytes)


def digest_of(block_hash: bytes) -> int:
    """A block's part of `CacheDigest.xor`."""
    return int.from_bytes(block_hash[:8], "little")


def _field(value: str | None) -> bytes:
    """Length-prefixed, so that no two pairs of fields read the same; lone surrogates (legal in JSON) pass too."""
    if value is None:
        return b"\x00"
    data = value.encode("utf-8", "surrogatepass")
    return b"\x01" + struct.pack("<Q", len(data)) + data
