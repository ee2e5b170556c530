"""Marks in a model's text: where one begins, and what may still become one when more text comes."""

from __future__ import annotations

from collections.abc import Iterable


def find_mark(text: str, marks: Iterable[str]) -> tuple[int, str] | None:
    """The place of the first of `marks` in `text`, and which it is."""
    places = [(place, mark) for mark in marks if (place := text.find(mark)) >= 0]
    return min(places, default=None)


def num_undecided(text: str, marks: Iterable[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a mark."""
    return max((_overlap(text, mark) for mark in marks), default=0)


def _overlap(text: str, mark: str) -> int:
    place = text.find(mark[0], max(0, len(text) - len(mark) + 1))
    while place >= 0:
        if mark.startswith(text[place:]):
            return len(text) - place
        place = text.find(mark[0], place + 1)
    return 0
