"""The matcher against a naive search in the whole text, whatever the chunks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_core.stop_strings import StopStringMatcher

# Few letters, so that texts and stop strings overlap in every way.
TEXT = st.text(alphabet="ab好", max_size=40)
STOPS = st.lists(st.text(alphabet="ab好", min_size=1, max_size=5), min_size=1, max_size=4)
CUTS = st.lists(st.integers(0, 5), max_size=40)


def naive(text: str, stops: Sequence[str], keep: bool) -> tuple[str, str | None]:
    """The text up to the stop string that is complete first, the longest of those; found by looking everywhere."""
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    end, _, stop = min(found)
    return text[: end if keep else end - len(stop)], stop


def chunks_of(text: str, cuts: Sequence[int]) -> list[str]:
    chunks, start = [], 0
    for size in cuts:
        chunks.append(text[start : start + size])
        start += size
    return [*chunks, text[start:]]


@given(text=TEXT, stops=STOPS, cuts=CUTS, keep=st.booleans())
def test_released_text_equals_naive_search(text: str, stops: list[str], cuts: list[int], keep: bool) -> None:
    matcher = StopStringMatcher(stops, keep_match=keep)
    released = "".join(matcher.feed(chunk) for chunk in chunks_of(text, cuts))
    assert (released + matcher.flush(), matcher.matched) == naive(text, stops, keep)


@given(text=TEXT, stops=STOPS)
def test_no_more_is_held_back_than_may_become_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopStringMatcher(stops)
    released = ""
    for end, char in enumerate(text, start=1):
        released += matcher.feed(char)
        if matcher.matched is not None:
            break
        held = text[len(released) : end]
        assert text[:end] == released + held
        suffixes = [text[start:end] for start in range(end + 1)]
        assert held == next(suffix for suffix in suffixes if any(stop.startswith(suffix) for stop in stops))


@given(before=TEXT, after=TEXT, stops=STOPS, cuts=CUTS)
def test_text_before_min_tokens_cannot_stop(before: str, after: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopStringMatcher(stops)
    released = "".join(matcher.feed(chunk, may_stop=False) for chunk in chunks_of(before, cuts))
    assert matcher.matched is None
    released += "".join(matcher.feed(chunk) for chunk in chunks_of(after, cuts)) + matcher.flush()
    text = before + after
    ends = [
        (end, -len(stop), stop)
        for stop in stops
        for end in range(len(before) + 1, len(text) + 1)
        if text[:end].endswith(stop)
    ]
    assert matcher.matched == (min(ends)[2] if ends else None)
    assert released == (text[: min(ends)[0] + min(ends)[1]] if ends else text)


def test_text_after_the_match_is_dropped() -> None:
    matcher = StopStringMatcher(["END"])
    assert matcher.feed("so it E") == "so it "
    assert matcher.feed("ND and on") == ""
    assert matcher.matched == "END"
    assert matcher.feed("more") == ""
    assert matcher.flush() == ""


@pytest.mark.parametrize("length", [10_000])
def test_long_stop_strings_are_no_burden(length: int) -> None:
    matcher = StopStringMatcher(["a" * length + str(index) for index in range(4)])
    assert "".join(matcher.feed("a") for _ in range(2 * length)) == "a" * length
    assert matcher.flush() == "a" * length
