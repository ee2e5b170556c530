"""Stop strings in a growing text.

Holds `StopStringMatcher`. It promises: text it has released never has to be taken back, and what it releases, and where
it stops, do not depend on how the text was cut into chunks. A character costs constant time on average, however many
and however long the stop strings are (Aho and Corasick: "Efficient string matching", CACM 18(6), 1975).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["StopStringMatcher"]


@dataclass(slots=True, eq=False)
class _Node:
    """A prefix of some stop string; the text read so far ends with it and with no longer one."""

    depth: int = 0  # its length in characters
    children: dict[str, _Node] = field(default_factory=dict)
    fallback: _Node | None = None  # the longest proper suffix of this prefix that is a prefix too; None at the root
    match: str | None = None  # the longest stop string that the prefix ends with


class StopStringMatcher:
    """Finds the stop string that is complete first (of several complete at the same character, the longest).

    `feed` returns the text that is certainly before any stop string and holds back the rest: a suffix that may be the
    beginning of one. With `keep_match` the stop string itself stays in the text.
    """

    def __init__(self, stops: Sequence[str], *, keep_match: bool = False) -> None:
        self._root = _build_automaton(stops)
        self._keep_match = keep_match
        self._node = self._root
        self._held = ""
        self.matched: str | None = None

    def feed(self, chunk: str, *, may_stop: bool = True) -> str:
        """The released text. With a match, `matched` is set and everything after it is dropped, now and later.

        With `may_stop` False a stop string that completes in this chunk is text like any other.
        """
        if self.matched is not None:
            return ""
        text = self._held + chunk
        offset = len(self._held)
        for index, char in enumerate(chunk, start=offset + 1):
            self._node = _advance(self._node, char)
            if may_stop and self._node.match is not None:
                self.matched = self._node.match
                self._held = ""
                return text[: index if self._keep_match else index - len(self.matched)]
        num_held = _num_open(self._node)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """The text held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _build_automaton(stops: Sequence[str]) -> _Node:
    root = _Node()
    for stop in stops:
        node = root
        for char in stop:
            node = node.children.setdefault(char, _Node(depth=node.depth + 1))
        if stop:
            node.match = stop
    queue = deque([root])
    while queue:  # breadth first: a fallback is shorter, so it is finished before it is read
        node = queue.popleft()
        for char, child in node.children.items():
            child.fallback = root if node.fallback is None else _advance(node.fallback, char)
            child.match = child.match or child.fallback.match
            queue.append(child)
    return root


def _advance(node: _Node, char: str) -> _Node:
    """The node after reading `char`."""
    current: _Node | None = node
    while current is not None:
        child = current.children.get(char)
        if child is not None:
            return child
        node, current = current, current.fallback
    return node  # the root


def _num_open(node: _Node) -> int:
    """How many characters at the end of the text may become a stop string: the longest prefix that can still grow."""
    current = node
    while not current.children and current.fallback is not None:
        current = current.fallback
    return current.depth
