"""What the control plane finds out of a prompt."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sagellm_control_plane.prompts import BlockNames, block_hashes
from sagellm_kv_cache.hashing import extend_block_hashes, root_hash
from sagellm_protocol import Request

BOUNDS = st.none() | st.integers(-14, 14)


@given(
    st.lists(st.integers(0, 2**31 - 1), max_size=45),
    st.integers(1, 7),
    st.lists(st.builds(slice, BOUNDS, BOUNDS, st.sampled_from([None, 1, 2, -1])) | st.integers(-12, 11), max_size=6),
)
def test_names_are_those_of_the_engines_in_whatever_order_they_are_asked_for(
    token_ids: list[int], block_size: int, indices: list[slice | int]
) -> None:
    expected: list[bytes] = []
    extend_block_hashes(expected, token_ids, block_size, len(token_ids) // block_size, root_hash("salt"))
    names = BlockNames(token_ids, block_size, root_hash("salt"))
    assert (len(names), bool(names)) == (len(expected), bool(expected))
    for index in indices:
        if isinstance(index, slice) or -len(expected) <= index < len(expected):
            assert names[index] == expected[index]
    assert list(names) == expected


def test_a_prompt_is_named_with_its_salt_and_adapter_where_its_tokens_are_known() -> None:
    plain, salted = (
        block_hashes(Request(prompt=list(range(40)), cache_salt=salt), 16) for salt in (None, "a tenant's own")
    )
    assert (len(plain), len(salted)) == (2, 2)
    assert plain[0] != salted[0]
    assert not block_hashes(Request(prompt="a text"), 16)
