"""Responses that were answered, so that they can be read again and continued.

Held in memory, apart for each API key, and bounded three ways: by number, by bytes and by age. What a key stores pushes
out the oldest of its own only. A response keeps its whole conversation, so that it can be continued when the responses
before it are gone.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from sagellm_protocol import NotFoundError


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response as JSON texts; `item_ids` are those of its input and output."""

    id: str
    body: bytes
    earlier: bytes  # a list of items: the conversation before this response's own input
    input: bytes  # a list of items
    output: bytes  # a list of items
    item_ids: frozenset[str]
    stored_at: float  # seconds of the store's clock

    @property
    def num_bytes(self) -> int:
        """What it takes, without what the interpreter adds."""
        return len(self.body) + len(self.earlier) + len(self.input) + len(self.output)


@dataclass(slots=True)
class _Shelf:
    """The responses of one key, oldest first."""

    responses: OrderedDict[str, StoredResponse] = field(default_factory=OrderedDict)
    num_bytes: int = 0

    def remove(self, response_id: str) -> None:
        self.num_bytes -= self.responses.pop(response_id).num_bytes


class ResponseStore:
    """See the module. The limits hold for each key; `max_age_s` is in seconds of `clock`."""

    def __init__(
        self,
        *,
        max_count: int = 1024,
        max_bytes: int = 64 * 2**20,
        max_age_s: float = 24 * 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._clock = clock
        self._shelves: dict[str | None, _Shelf] = {}

    def now(self) -> float:
        """The time to store a response with."""
        return self._clock()

    def put(self, owner: str | None, response: StoredResponse) -> None:
        """Keep a response of the key `owner`; one that is larger than the whole store is not kept."""
        self._forget_old()
        if response.num_bytes > self._max_bytes:
            return
        shelf = self._shelves.setdefault(owner, _Shelf())
        shelf.responses[response.id] = response
        shelf.num_bytes += response.num_bytes
        while len(shelf.responses) > self._max_count or shelf.num_bytes > self._max_bytes:
            shelf.remove(next(iter(shelf.responses)))

    def get(self, owner: str | None, response_id: str) -> StoredResponse:
        """A response of `owner`; `NotFoundError` for one that is unknown, expired, or another's."""
        self._forget_old()
        shelf = self._shelves.get(owner)
        if shelf is None or response_id not in shelf.responses:
            raise NotFoundError(
                f"no response {response_id!r} is stored; it may have expired, been deleted or sent with store=false",
                field="response_id",
            )
        return shelf.responses[response_id]

    def find_item(self, owner: str | None, item_id: str) -> StoredResponse | None:
        """The latest response of `owner` that has an item `item_id` in its input or output."""
        self._forget_old()
        shelf = self._shelves.get(owner)
        stored = () if shelf is None else reversed(shelf.responses.values())
        return next((response for response in stored if item_id in response.item_ids), None)

    def delete(self, owner: str | None, response_id: str) -> None:
        """Forget a response of `owner`; `NotFoundError` as for `get`."""
        self.get(owner, response_id)
        self._shelves[owner].remove(response_id)

    def _forget_old(self) -> None:
        oldest = self._clock() - self._max_age_s
        for owner, shelf in list(self._shelves.items()):
            while shelf.responses and next(iter(shelf.responses.values())).stored_at < oldest:
                shelf.remove(next(iter(shelf.responses)))
            if not shelf.responses:
                del self._shelves[owner]
