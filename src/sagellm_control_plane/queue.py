"""The requests that wait for an engine, in the order of a policy.

Each destination (a model and what is asked of it) has its lanes, each lane a heap: see `policies.base`. A pop looks at
the first of every lane of the destinations that are open, so what waits for a busy model holds up no other; where the
policy tells which keys become less, at the top of a heap of lanes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from sagellm_control_plane.lazy_heap import LazyHeap
from sagellm_control_plane.policies.base import Destination, Key, SchedulingPolicy, WaitingRequest
from sagellm_protocol import ResourceExhaustedError

_MAX_OVERTAKEN = 16  # times that others may go before a request because it would rather wait; so many are asked at most
_SPARE = 64  # entries of requests that have left, before heaps are cleared of them


class _Entry(NamedTuple):
    order: Key
    sequence_number: int  # decides ties
    number: int  # its own, so that no comparison goes further
    waiting: WaitingRequest
    lane: Hashable


class WaitQueue:
    """At most `max_num_waiting` requests, and one more, which may be granted or refused at once."""

    def __init__(self, policy: SchedulingPolicy, max_num_waiting: int) -> None:
        self.policy = policy
        self.max_num_waiting = max_num_waiting
        self._entries: dict[WaitingRequest, _Entry] = {}
        self._lanes: dict[Destination, dict[Hashable, list[_Entry]]] = {}
        self._firsts: dict[Destination, LazyHeap[Hashable, tuple[Key, int]]] = {}  # lanes, by what is first in them
        self._changes: list[tuple[float, int, _Entry]] = []  # when requests need a lane and an order anew
        self._deadlines: list[tuple[float, int, WaitingRequest]] = []
        self._num_by_destination: dict[Destination, int] = {}
        self._num_overtaken: dict[WaitingRequest, int] = {}  # of those that were
        self._num_gone = 0  # entries in lanes whose requests have left or moved; never the first of a lane
        self._numbers = itertools.count()
        self._now = 0.0
        self._generation = policy.generation

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, waiting: object) -> bool:
        return waiting in self._entries

    def __iter__(self) -> Iterator[WaitingRequest]:
        """In no order that means anything."""
        return iter(list(self._entries))

    @property
    def is_overfull(self) -> bool:
        """Whether there is one more than may stay."""
        return len(self._entries) > self.max_num_waiting

    @property
    def num_by_destination(self) -> dict[Destination, int]:
        """How many wait for each; without those that nobody waits for."""
        return dict(self._num_by_destination)

    @property
    def next_deadline(self) -> float:
        """When the next request will be late; infinite if none can be."""
        heap = self._deadlines
        while heap and heap[0][2] not in self._entries:
            heappop(heap)
        return heap[0][0] if heap else float("inf")

    def push(self, waiting: WaitingRequest, now: float) -> None:
        """Let a request wait; `ResourceExhaustedError` if there is one too many already."""
        if self.is_overfull:
            raise self.full_error()
        assert waiting not in self._entries, "a request waits once"
        self.policy.on_arrival(waiting, now)
        self._join(waiting, now)
        self._num_by_destination[waiting.destination] = self._num_by_destination.get(waiting.destination, 0) + 1
        if waiting.deadline < float("inf"):
            heappush(self._deadlines, (waiting.deadline, next(self._numbers), waiting))
        self._forget_the_gone()

    def full_error(self, retry_after_s: float | None = None) -> ResourceExhaustedError:
        """What is said of one request too many."""
        when = "later" if retry_after_s is None else f"in {max(1.0, retry_after_s):.0f} s"
        known = {} if retry_after_s is None else {"retry_after_s": retry_after_s}
        return ResourceExhaustedError(
            f"{self.max_num_waiting} requests are waiting already; try again {when}", context=known
        )

    def remove(self, waiting: WaitingRequest, now: float) -> bool:
        """Forget a request; False if it does not wait here."""
        if waiting not in self._entries:
            return False
        self._withdraw(self._entries.pop(waiting))
        self._num_overtaken.pop(waiting, None)
        left = self._num_by_destination[waiting.destination] - 1
        if left:
            self._num_by_destination[waiting.destination] = left
        else:
            del self._num_by_destination[waiting.destination]
        self.policy.on_left(waiting, now)
        return True

    def first(
        self, now: float, is_open: Callable[[Destination], bool] = lambda destination: True
    ) -> WaitingRequest | None:
        """The request whose turn it is, of those whose destination is open; it stays."""
        self._bring_up_to_date(now)
        best: WaitingRequest | None = None
        best_key: tuple[Key, int] | None = None
        for destination in self._lanes:
            if not is_open(destination):
                continue
            for entry in self._candidates(destination):
                key = self._key(entry)
                if best_key is None or key < best_key:
                    best, best_key = entry.waiting, key
        return best

    def pop(
        self,
        now: float,
        is_open: Callable[[Destination], bool] = lambda destination: True,
        would_wait: Callable[[WaitingRequest], bool] | None = None,
    ) -> WaitingRequest | None:
        """As `first`, and the request leaves.

        Where it `would_wait`, the first of the next few that would not goes instead, if to the policy it is all the
        same. Nobody is overtaken more than 16 times that way, and where all would wait the first one goes.
        """
        waiting = self.first(now, is_open)
        if waiting is not None and would_wait is not None:
            waiting = self._first_that_goes(waiting, would_wait)
        if waiting is not None:
            self.remove(waiting, now)
        return waiting

    def expire(self, now: float) -> list[WaitingRequest]:
        """Remove the requests whose deadline has passed; returns them."""
        late = []
        while self.next_deadline <= now:
            waiting = heappop(self._deadlines)[2]
            self.remove(waiting, now)
            late.append(waiting)
        return late

    # ---- steps of the above ---------------------------------------------------------------------------

    def _first_that_goes(self, first: WaitingRequest, would_wait: Callable[[WaitingRequest], bool]) -> WaitingRequest:
        heap = self._lanes[first.destination][self._entries[first].lane]
        if len(heap) == 1:
            return first
        passed: list[_Entry] = []
        chosen: WaitingRequest | None = None
        while heap and len(passed) < _MAX_OVERTAKEN:
            entry = heap[0]
            if self._entries.get(entry.waiting) is not entry:
                self._num_gone -= 1
                heappop(heap)
                continue
            if passed and not self.policy.is_alike(first, entry.waiting):
                break
            if self._num_overtaken.get(entry.waiting, 0) >= _MAX_OVERTAKEN or not would_wait(entry.waiting):
                chosen = entry.waiting
                break
            passed.append(heappop(heap))
        for entry in passed:
            heappush(heap, entry)
            if chosen is not None:
                self._num_overtaken[entry.waiting] = self._num_overtaken.get(entry.waiting, 0) + 1
        return chosen or first

    def _key(self, entry: _Entry) -> tuple[Key, int]:
        return self.policy.key(entry.waiting, self._now), entry.sequence_number

    def _candidates(self, destination: Destination) -> Iterable[_Entry]:
        """The first of each lane, or of the one lane that goes before all others."""
        lanes, firsts = self._lanes[destination], self._firsts.get(destination)
        if firsts is None:
            return [heap[0] for heap in lanes.values()]
        lane = firsts.first()
        return [lanes[lane][0]]

    def _join(self, waiting: WaitingRequest, now: float) -> None:
        self._now = now
        lane = self.policy.lane(waiting, now)
        order = self.policy.order(waiting, now)
        entry = _Entry(order, waiting.sequence_number, next(self._numbers), waiting, lane)
        self._entries[waiting] = entry
        heap = self._lanes.setdefault(waiting.destination, {}).setdefault(lane, [])
        heappush(heap, entry)
        if heap[0] is entry and self.policy.lowered() is not None:
            self._firsts_of(waiting.destination).put(lane)
        change = self.policy.changes_at(waiting, now)
        if now < change < float("inf"):
            heappush(self._changes, (change, entry.number, entry))

    def _firsts_of(self, destination: Destination) -> LazyHeap[Hashable, tuple[Key, int]]:
        firsts = self._firsts.get(destination)
        if firsts is None:
            lanes = self._lanes[destination]
            firsts = self._firsts[destination] = LazyHeap(lambda lane: self._key(lanes[lane][0]))
        return firsts

    def _withdraw(self, entry: _Entry) -> None:
        """Take an entry that is no longer in `_entries` out of its lane; one behind others stays there as a husk."""
        destination = entry.waiting.destination
        lanes = self._lanes[destination]
        heap = lanes[entry.lane]
        self._num_gone += 1
        while heap and self._entries.get(heap[0].waiting) is not heap[0]:
            heappop(heap)
            self._num_gone -= 1
        firsts = self._firsts.get(destination)
        if heap:
            if firsts is not None:
                firsts.put(entry.lane)
        else:
            del lanes[entry.lane]
            if firsts is not None:
                firsts.discard(entry.lane)
            if not lanes:
                del self._lanes[destination]
                self._firsts.pop(destination, None)
        if self._num_gone > len(self._entries) + _SPARE:
            self._clear_husks()

    def _bring_up_to_date(self, now: float) -> None:
        self._now = now
        if self.policy.generation != self._generation:
            self._generation = self.policy.generation
            self._lanes, self._firsts, self._changes, self._num_gone = {}, {}, [], 0
            for waiting in list(self._entries):
                self._join(waiting, now)
        while self._changes and self._changes[0][0] <= now:
            entry = heappop(self._changes)[2]
            if self._entries.get(entry.waiting) is entry:
                del self._entries[entry.waiting]
                self._withdraw(entry)
                self._join(entry.waiting, now)
        if lowered := self.policy.lowered():
            for destination, lanes in self._lanes.items():
                for lane in lowered & lanes.keys():
                    self._firsts[destination].put(lane)
            lowered.clear()

    def _clear_husks(self) -> None:
        entries = self._entries
        for lanes in self._lanes.values():
            for heap in lanes.values():
                heap[:] = [entry for entry in heap if entries.get(entry.waiting) is entry]
                heapify(heap)
        self._num_gone = 0

    def _forget_the_gone(self) -> None:
        """Keep the heaps of times as short as the queue: most requests leave long before their time."""
        limit, entries = 2 * len(self._entries) + _SPARE, self._entries
        if len(self._deadlines) > limit:
            self._deadlines = [item for item in self._deadlines if item[2] in entries]
            heapify(self._deadlines)
        if len(self._changes) > limit:
            self._changes = [item for item in self._changes if entries.get(item[2].waiting) is item[2]]
            heapify(self._changes)
