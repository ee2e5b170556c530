"""What a document may hold, counted before it is parsed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_core import json_limits
from sagellm_core.json_limits import check_depth, check_structure
from sagellm_protocol import InvalidArgumentError

DOCUMENTS = st.recursive(
    st.integers() | st.booleans() | st.text(alphabet='ab"\\{[,:', max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(alphabet='a"\\{', max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


def numbers_in(value: Any) -> tuple[int, int, int]:
    """Containers, members and commas."""
    if not isinstance(value, (list, dict)):
        return 0, 0, 0
    children = list(value.values()) if isinstance(value, dict) else value
    inner = [numbers_in(child) for child in children]
    own = (1, len(value) if isinstance(value, dict) else 0, max(0, len(value) - 1))
    return tuple(sum(column) for column in zip(own, *inner, strict=True))  # type: ignore[return-value]


@given(DOCUMENTS, st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)))
def test_only_what_is_outside_of_texts_counts(document: Any, limits: tuple[int, int, int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        names = ("objects and lists", "members", "entries")
        characters = (b"{[", b":", b",")
        patch.setattr(json_limits, "_LIMITS", tuple(zip(characters, limits, names, strict=True)))
        too_many = any(number > limit for number, limit in zip(numbers_in(document), limits, strict=True))
        body = json.dumps(document).encode()
        if too_many:
            with pytest.raises(InvalidArgumentError, match="holds more than"):
                check_structure(body)
        else:
            check_structure(body)


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b"[" + b"[]," * 40_000 + b"0]", "objects and lists"),
        (b"{" + b'"":0,' * 70_000 + b'"":0}', "members"),
        (b"[" + b"0," * 1_100_000 + b"0]", "entries"),
        (b"[" + b'"",' * 140_000 + b"0]", "strings"),
    ],
)
def test_the_limits(body: bytes, name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=name):
        check_structure(body)


@pytest.mark.parametrize(
    "text", ["{[" * 1_000_000, '\\"' * 1_000_000, '{"a": [1, 2]}' * 200_000, "\\" * 3_000_001, '\\"{' * 500_000]
)
def test_a_text_may_hold_anything(text: str) -> None:
    check_structure(json.dumps({"prompt": text}).encode())


@pytest.mark.parametrize("wide", [b"", b",[]" * 100])
def test_depth(wide: bytes) -> None:
    body = b"[" * 5 + b"0" + wide + b"]" * 5
    check_depth(json.loads(body), body, 6)
    with pytest.raises(InvalidArgumentError, match="nested deeper than 4"):
        check_depth(json.loads(body), body, 4)
