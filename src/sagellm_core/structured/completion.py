"""Short texts that complete a form: searched symbol by symbol, joined to a completion that is known already.

The library says which symbols may come next and which are forced, but not whether two states are the same. So nothing
here is exact: what is found is always a completion (the grammar accepted it), but perhaps not the shortest.

1. *Nearby*: Dijkstra's search by length over a few states. Wherever the rest of a known completion, from one of its
   places of choice, is accepted, the two are joined. So to close what a token has opened costs a few states, however
   much the form demands behind it.
2. *Straight ahead*: one path that takes closing marks before others and leaves loops after a while. It finds a long
   way, too.
3. *Back again*: from the last place of choice to the first, a nearby search looks for a shorter way on, joined to what
   is known from there. This cuts out what the form does not demand.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, overload

from sagellm_core.structured.symbols import Choice, choices_among, has_symbol, is_text
from sagellm_core.structured.vocabulary import Vocabulary

_FIRST_STATES, _NEARBY_STATES, _IMPROVING_STATES, _STATES_PER_WAY = 12, 48, 24, 4
_MAX_SYMBOLS = 16_384
_RECENT_STATES, _REPEATS_PER_RANK = (
    96,
    6,
)  # what was written so often lately, from states that look alike, may be a loop
_DIGITS = "0-9"
_STAYING_RANK = 8  # of what leads from a text to a state that looks the same
_MAX_JOINTS = 16
_GLANCE = 24  # symbols that mostly show whether a text goes on so
_STATES_PER_TURN = 32  # then other threads get theirs


@dataclass(frozen=True, slots=True)
class Completion:
    """Symbols that complete a text, and how to write them with the fewest of the model's tokens.

    `costs[i]` tokens write `symbols[i:]`, the first of them `lengths[i]` symbols. `joints` are the lengths of those
    ends of `symbols` that begin at a place of choice, rising.
    """

    symbols: str = ""
    costs: Sequence[int] = (0,)
    lengths: Sequence[int] = (0,)
    joints: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.costs[0]

    @property
    def first_token(self) -> str:
        """The symbols of the first token; nothing where nothing is left to write."""
        return self.symbols[: self.lengths[0]]

    def after(self, count: int) -> Completion:
        """What is left when `count` symbols have been written."""
        size = len(self.symbols) - count
        joints = self.joints
        if joints and joints[-1] > size:
            joints = tuple(joint for joint in joints if joint <= size)
        return Completion(self.symbols[count:], self.costs[count:], self.lengths[count:], joints)

    def behind(self, symbols: str, choices: Iterable[int], vocabulary: Vocabulary) -> Completion:
        """`symbols`, with places of choice at `choices` (rising), and then this."""
        text = symbols + self.symbols
        costs, lengths = vocabulary.prepend(text, self.costs, self.lengths, len(symbols))
        joints = (len(text) - place for place in reversed([*choices]))
        return Completion(text, costs, lengths, (*self.joints, *joints))


def completes(matcher: Any, symbols: str, vocabulary: Vocabulary) -> bool:
    """Whether the grammar accepts `symbols` and then the end."""
    ids = [*map(ord, symbols[:_GLANCE])]
    if matcher.validate_tokens(ids) != len(ids):
        return False
    ids += [*map(ord, symbols[_GLANCE:]), vocabulary.eos_symbol]
    return bool(matcher.validate_tokens(ids) == len(ids))


class _State:
    """A matcher with what may come next; `mask` and `forced` tell states apart."""

    __slots__ = ("forced", "mask", "matcher")

    def __init__(self, matcher: Any) -> None:
        self.matcher = matcher
        self.mask: bytes = matcher.compute_bitmask()
        # The library writes a special token as a byte that no text holds and its number.
        self.forced: bytes = matcher.compute_ff_bytes().partition(b"\xff")[0]

    @property
    def looks(self) -> tuple[bytes, bytes]:
        return self.mask, self.forced

    def then(self, symbols: str) -> _State | None:
        matcher = self.matcher.deep_copy()
        if matcher.try_consume_tokens([*map(ord, symbols)]) != len(symbols):
            return None
        return _State(matcher)


class _Allowance:
    """How many states a search may still look at. Where it is not urgent, other threads get a turn now and then."""

    def __init__(self, num_states: int, *, urgent: bool) -> None:
        self.left, self._urgent = num_states, urgent

    def take(self) -> bool:
        self.left -= 1
        if not self._urgent and self.left % _STATES_PER_TURN == 0:
            time.sleep(0)
        return self.left >= 0

    def part(self, num_states: int) -> _Allowance:
        """Some of these states, to be given back with `put_back`."""
        part = _Allowance(min(num_states, max(self.left, 0)), urgent=self._urgent)
        self.left -= part.left
        return part

    def put_back(self, part: _Allowance) -> None:
        self.left += max(part.left, 0)


def _same(state: _State) -> _State:
    return state


@overload
def _shorter(first: Completion | None, second: Completion) -> Completion: ...
@overload
def _shorter(first: Completion | None, second: Completion | None) -> Completion | None: ...
def _shorter(first: Completion | None, second: Completion | None) -> Completion | None:
    if first is None or (second is not None and second.num_tokens < first.num_tokens):
        return second
    return first


class CompletionSearch:
    """Finds completions for the states of one grammar; `literals` are texts that it may demand as a whole."""

    def __init__(self, vocabulary: Vocabulary, literals: Sequence[str] = ()) -> None:
        self._vocabulary = vocabulary
        self._literals = [literal.encode().decode("latin-1") for literal in literals]
        self._choices: dict[bytes, list[Choice]] = {}

    def find(
        self, matcher: Any, known: Completion | None = None, *, fits: int | None = None, max_states: int
    ) -> Completion | None:
        """A completion from the matcher's state: a short one, or with `fits` the first of at most so many tokens.

        None if there is none among the first `max_states` states. The matcher stays as it is.
        """
        allowance = _Allowance(max_states, urgent=fits is not None)
        root = _State(matcher)
        below = _MAX_SYMBOLS if fits is None else fits * self._vocabulary.longest_token + 1
        found = None
        if fits is not None:  # anything that fits will do
            found = self._nearby(root, known, below, fits, allowance.part(_FIRST_STATES))
            if found is not None and found.num_tokens <= fits:
                return found
        ahead = self._straight_ahead(root, known, below, allowance)
        if ahead is not None and fits is not None:
            found = _shorter(found, self._back_again(*ahead, allowance.part(0)))
            if found.num_tokens <= fits:
                return found
        nearby = allowance.part(_NEARBY_STATES)
        found = _shorter(found, self._nearby(root, known, below, fits, nearby))
        allowance.put_back(nearby)
        if ahead is not None and (fits is None or found is None or found.num_tokens > fits):
            found = _shorter(found, self._back_again(*ahead, allowance))
        return found

    def _nearby(
        self, root: _State, known: Completion | None, below: int, fits: int | None, allowance: _Allowance
    ) -> Completion | None:
        """Of completions with fewer than `below` symbols the shortest, or the first of at most `fits` tokens."""
        best: Completion | None = None
        order = 0
        queue: list[tuple[int, int, Callable[[], _State | None], str, tuple[int, ...]]] = []
        queue.append((0, 0, partial(_same, root), "", ()))
        while queue:
            length, _, arrive, path, places = heapq.heappop(queue)
            if length >= below or not allowance.take():
                break
            state = arrive()
            if state is None:
                continue
            end = self._end_from(state, known, below - length)
            if end is not None:
                found = end.behind(path, places, self._vocabulary)
                below = len(found.symbols)
                if best is None or found.num_tokens <= best.num_tokens:
                    best = found
                if fits is not None and best.num_tokens <= fits:
                    return best
            ways = self._ways_on(state)
            if len(ways) > 1:
                places = (*places, length)
            for symbols, _, child in ways:
                if length + len(symbols) < below:
                    order += 1
                    # Most are never arrived at.
                    arrive = partial(state.then, symbols) if child is None else partial(_same, child)
                    heapq.heappush(queue, (length + len(symbols), order, arrive, path + symbols, places))
        return best

    def _straight_ahead(
        self, root: _State, known: Completion | None, below: int, allowance: _Allowance
    ) -> tuple[str, list[tuple[int, int, _State]], Completion] | None:
        """A path to a state from where the end is known: symbols, places and numbers of choices, and that end."""
        state, path = root, ""
        places: list[tuple[int, int, _State]] = []
        recent: deque[tuple[tuple[bytes, bytes], str]] = deque(maxlen=_RECENT_STATES)
        while len(path) < below and allowance.take():
            end = self._end_from(state, known, below - len(path))
            if end is not None:
                return path, places, end
            ways = [
                (symbols, rank, child)
                for symbols, rank, seen in self._ways_on(state)
                if (child := seen or state.then(symbols)) is not None
            ]
            if not ways:
                return None
            if len(ways) > 1:
                # A blank that may be left out is never a shorter way on.
                only_blanks = not is_text(state.mask) and all(symbols.isspace() for symbols, _, _ in ways[1:])
                places.append((len(path), 0 if only_blanks else len(ways), state))
            looks, runs_text = state.looks, is_text(state.mask)
            ranks = []
            for symbols, rank, child in ways:
                if child.matcher.is_accepting():
                    rank = -1
                elif runs_text and child.looks == looks:
                    rank += _STAYING_RANK
                kind = _DIGITS if symbols.isdigit() else symbols
                count = recent.count((looks, kind))
                # Of equals the one that was taken less; but equal digits are written with fewer tokens.
                ranks.append((rank + count // _REPEATS_PER_RANK, 0 if kind == _DIGITS else count))
            symbols, _, state = ways[ranks.index(min(ranks))]
            if len(ways) > 1:
                recent.append((looks, _DIGITS if symbols.isdigit() else symbols))
                if len(recent) == _RECENT_STATES and len({looks for looks, _ in recent}) == 1:
                    return None  # nothing here shows the way
            path += symbols
        return None

    def _back_again(
        self,
        path: str,
        places: Sequence[tuple[int, int, _State]],
        end: Completion,
        allowance: _Allowance,
    ) -> Completion:
        """The way from `_straight_ahead`, shortened from its end to its beginning."""
        until = len(path)
        for place, num_ways, state in reversed(places):
            end = end.behind(path[place:until], (0,), self._vocabulary)
            until = place
            part = allowance.part(min(_STATES_PER_WAY * num_ways, _IMPROVING_STATES))
            shorter = self._nearby(state, end, len(end.symbols), None, part)
            allowance.put_back(part)
            if shorter is not None and shorter.num_tokens <= end.num_tokens:
                end = shorter
        return end.behind(path[:until], (), self._vocabulary)

    def _end_from(self, state: _State, known: Completion | None, below: int) -> Completion | None:
        """What completes the text here: nothing, or the shortest end of `known`, of fewer than `below` symbols.

        Only the longest such ends are tried: what leads back to `known` mostly does so near its beginning.
        """
        if state.matcher.is_accepting():
            return Completion()
        if known is None or state.forced:
            return None
        size, num_tried = len(known.symbols), 0
        best: int | None = None
        for joint in reversed(known.joints):
            if joint < below and has_symbol(state.mask, ord(known.symbols[size - joint])):
                num_tried += 1
                if completes(state.matcher, known.symbols[size - joint :], self._vocabulary):
                    best = joint
                if num_tried == _MAX_JOINTS:
                    break
        return None if best is None else known.after(size - best)

    def _ways_on(self, state: _State) -> list[tuple[str, int, _State | None]]:
        """What may be written next, with its rank, and where it leads if that was looked at.

        Where a text runs, most symbols lead to states that look alike: one of those is enough. What other states of the
        grammar looked like must not matter here, or the outcome would depend on other requests.
        """
        if state.forced:
            return [(state.forced.decode("latin-1"), 0, None)]
        choices = self._choices.get(state.mask)
        if choices is None:
            choices = choices_among(state.mask, self._literals, self._vocabulary.eos_symbols)
            self._choices[state.mask] = choices
        if not is_text(state.mask):
            return [(symbols, rank, None) for symbols, rank in choices]
        ways: dict[tuple[bytes, bytes] | str, tuple[str, int, _State | None]] = {}
        for symbols, rank in choices:
            child = state.then(symbols)
            if child is not None:
                ways.setdefault(child.looks if len(symbols) == 1 else symbols, (symbols, rank, child))
        return [*ways.values()]
