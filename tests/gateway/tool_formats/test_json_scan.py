"""Where values and calls lie in JSON, found in one pass."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_gateway.tool_formats.json_scan import CallHead, Head, ValueScan

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text('"\\{}[],:a\n\u00e9')
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)
CONTAINERS = st.lists(VALUES) | st.dictionaries(st.text(), VALUES) | st.text()


@given(value=CONTAINERS, behind=st.text('"\\{}[] a'), size=st.integers(1, 9), spaces=st.sampled_from([None, 1]))
def test_the_end_of_a_value_is_that_of_the_json_library(value: Any, behind: str, size: int, spaces: int | None) -> None:
    written = json.dumps(value, indent=spaces)
    text, scan = written + behind, ValueScan()
    ends = [
        place + end for place in range(0, len(text), size) if (end := scan.feed(text[place : place + size])) is not None
    ]
    assert ends[0] == len(written)


@given(
    arguments=st.dictionaries(st.text(), VALUES),
    others=st.dictionaries(st.sampled_from(["type", "id"]), VALUES),
    size=st.integers(1, 9),
    indent=st.sampled_from([None, 2]),
    is_first=st.booleans(),
)
def test_a_call_is_found_wherever_its_members_stand(
    arguments: dict[str, Any], others: dict[str, Any], size: int, indent: int | None, is_first: bool
) -> None:
    members = {"name": "f", "arguments": arguments, **others}
    members = {**others, **members} if is_first else {"arguments": arguments, **members}
    text = json.dumps(members, indent=indent)
    head, number = CallHead({"f"}), 0
    kind = Head.UNDECIDED
    while kind is Head.UNDECIDED:
        number += size
        assert number < len(text) + size
        kind = head.read(text[:number])
    assert head.name == "f"
    if kind is Head.ARGUMENTS:
        end = ValueScan().feed(text[head.position :])
        assert json.loads(text[head.position :][:end]) == arguments
    else:
        assert kind is Head.WHOLE
        assert head.position == len(text)
        assert json.loads(head.arguments or "") == arguments


@pytest.mark.parametrize(
    "text",
    [
        *("x", "[", '{"other', '{"name" 1', '{"name": "f" "', '{"name": 5,', '{"name": "\\x"', '{"name": "g"', "{}"),
        *('{"name": "f", ]', '{"arguments": [1]', '{"arguments": "no"', '{"arguments": {]}', '{"name": "f",}'),
        *('{"name": "f", "a": ,', '{"name": "f"; "a"', '{"type": :', '{"id": 1}'),
    ],
)
def test_what_is_no_call_is_known_at_once(text: str) -> None:
    assert CallHead({"f"}).read(text) is Head.NO_CALL


@pytest.mark.parametrize(
    "text", ["", " ", "{", '{"', '{"na', '{"name"', '{"name": ', '{"name": "f"', '{"name": "f", "arg']
)
def test_what_may_be_a_call_is_undecided(text: str) -> None:
    assert CallHead({"f"}).read(text) is Head.UNDECIDED
