from __future__ import annotations

import itertools
import struct
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_kv_cache import hash_block, root_hash
from sagellm_kv_cache.hashing import decode_tokens, encode_tokens, extend_block_hashes
from sagellm_protocol import InvalidArgumentError

token_lists = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40)


def test_known_answers() -> None:
    """Routers and other engines compute these too: a change breaks them and needs a new tag."""
    plain = root_hash()
    assert plain.hex() == "af52ff14f8c6212906bbf39ebb0250041e8ee415e205c889f904aee2bf7789bd"
    assert plain == sha256(b"sagellm-kv-1" + b"\x00" + b"\x00").digest()
    salted = root_hash("s", "l")
    assert salted.hex() == "2208afc3e8f53c6c9113eec8c3818331983a63ceb1c6a3d104e3ea063591adb2"
    one = b"\x01" + struct.pack("<Q", 1)
    assert salted == sha256(b"sagellm-kv-1" + one + b"s" + one + b"l").digest()
    block = hash_block(plain, encode_tokens([1, 2, 3, -1]))
    assert block.hex() == "4c155ff2023a3122374bc69f76dc0ac073fe74af020ee107836e69ade25d7b71"
    assert block == sha256(plain + bytes.fromhex("010000000200000003000000ffffffff")).digest()


def test_extra_keys_are_never_mixed_up() -> None:
    values = [None, "", "a", "b", "ab", "\x00", "\x01", "a\x00", "\ud800", "é", "e\u0301"]
    roots = {root_hash(salt, lora) for salt, lora in itertools.product(values, values)}
    assert len(roots) == len(values) ** 2
    assert all(len(root) == 32 for root in roots)


@given(token_lists, st.integers(1, 5), st.data())
def test_a_chain_does_not_depend_on_how_it_was_grown(
    token_ids: list[int], block_size: int, data: st.DataObject
) -> None:
    num_blocks = len(token_ids) // block_size
    expected, parent = [], root_hash("salt")
    for index in range(num_blocks):
        parent = hash_block(parent, encode_tokens(token_ids[index * block_size : (index + 1) * block_size]))
        expected.append(parent)
    grown: list[bytes] = []
    stops = data.draw(st.lists(st.integers(0, num_blocks), max_size=4).map(sorted))
    for stop in [*stops, num_blocks]:
        extend_block_hashes(grown, token_ids, block_size, stop, root_hash("salt"))
    assert grown == expected


def test_a_hash_names_the_whole_prefix() -> None:
    chains = []
    for token_ids in ([1, 2, 3, 4], [9, 2, 3, 4], [2, 1, 3, 4]):
        chain: list[bytes] = []
        extend_block_hashes(chain, token_ids, 2, 2, root_hash())
        chains.append(chain)
    assert len({chain[1] for chain in chains}) == 3  # equal second blocks, different first ones


@given(token_lists)
def test_encoding_is_little_endian_int32_and_reversible(token_ids: list[int]) -> None:
    data = encode_tokens(token_ids)
    assert data == b"".join(token_id.to_bytes(4, "little", signed=True) for token_id in token_ids)
    assert decode_tokens(data) == tuple(token_ids)


@pytest.mark.parametrize("bad", [2**31, -(2**31) - 1, 1.5, "1"])
def test_what_is_no_token_id_is_refused(bad: object) -> None:
    with pytest.raises(InvalidArgumentError, match="token id is not an integer of 32 bits"):
        encode_tokens([1, bad])  # type: ignore[list-item]
