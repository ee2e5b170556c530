"""The ledger of what every engine has in flight: one row an engine, one numpy column a figure.

The control plane books a request in the moment it decides, so the next decision already sees it: no figure that a
choice rests on has to travel. Whatever is booked is booked out again by `end`; with no request in flight every sum is
exactly 0: columns that are computed with are float64, but hold whole numbers and halves only.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sagellm_control_plane.step_time import DEFAULT_PRIOR, StepCoefficients
from sagellm_protocol import InvalidArgumentError

_FIRST_ROWS = 64

# Figures of a row, by the type of their columns. The first ones are the ledger: 0 while nothing is in flight.
_LEDGER = {
    "num_requests": np.int64,
    "num_queued": np.int64,
    "queued_tokens": np.float64,
    "queued_attention": np.float64,
    "num_decoding": np.float64,
    "kv_tokens": np.float64,
    "held_tokens": np.int64,
}
_STATIC = {
    "capacity": np.int64,
    "max_num_batched_tokens": np.float64,
    "price": np.float64,
    "key": np.uint64,
    "group": np.int64,
    "c0": np.float64,
    "a": np.float64,
    "q": np.float64,
    "k": np.float64,
    "b": np.float64,
    "last_grant": np.int64,
}
_FIRST_VALUE = {"max_num_batched_tokens": 1}  # of rows not in use, which whole columns are computed with too


class Booking:
    """One stay of a request on one engine; a request that moves gets a new one.

    `num_sequences` answers are decoded side by side. `attention` are the pairs of tokens that the prefill compares:
    Σ p(ctx + p/2) over its chunks, whatever their sizes. The rest is the ledger's own.
    """

    __slots__ = (
        "attention",
        "generation",
        "is_decoding",
        "num_cached_tokens",
        "num_prompt_tokens",
        "num_sequences",
        "num_tokens",
        "num_uncached_tokens",
        "row",
    )

    def __init__(self, num_prompt_tokens: int, num_cached_tokens: int = 0, num_sequences: int = 1) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.num_cached_tokens = num_cached_tokens
        self.num_uncached_tokens = num_prompt_tokens - num_cached_tokens  # that the engine has to compute
        self.num_sequences = num_sequences
        self.attention = prefill_attention(num_prompt_tokens, self.num_uncached_tokens)
        self.row = -1  # where it is booked in; -1 before and after
        self.generation = 0  # of the row: a row is used again after its engine has left
        self.is_decoding = False
        self.num_tokens = 0  # decoded, of all sequences


def prefill_attention(num_prompt_tokens: int, num_uncached_tokens: int) -> float:
    """Pairs of tokens compared by a prefill of the last `num_uncached_tokens` of a prompt."""
    return num_uncached_tokens * (2 * num_prompt_tokens - num_uncached_tokens) / 2


class Fleet:
    """All engines that requests may be routed to, as columns. Belongs to one event loop.

    Ledger, by row: `num_requests` in flight; `num_queued` of them without a first token, with `queued_tokens` of their
    prompts to compute and `queued_attention`, the pairs that these compare; `num_decoding` sequences; `kv_tokens`, Σ
    context of those; `held_tokens`, context of all in flight. Static: `capacity` (places), `max_num_batched_tokens`,
    `price` (of an hour, in any one currency), `c0, a, q, k, b` (seconds, see `StepCoefficients`), `key` (a hash of the
    id), `group` (an index into `group_names`). `last_grant` numbers the grants, -1 before the first. `full` are the
    rows without a place.

    Columns are replaced when the fleet grows: read them from the fleet at every decision.
    """

    num_requests: NDArray[np.int64]
    num_queued: NDArray[np.int64]
    queued_tokens: NDArray[np.float64]
    queued_attention: NDArray[np.float64]
    num_decoding: NDArray[np.float64]
    kv_tokens: NDArray[np.float64]
    held_tokens: NDArray[np.int64]
    capacity: NDArray[np.int64]
    max_num_batched_tokens: NDArray[np.float64]
    price: NDArray[np.float64]
    key: NDArray[np.uint64]
    group: NDArray[np.int64]
    c0: NDArray[np.float64]
    a: NDArray[np.float64]
    q: NDArray[np.float64]
    k: NDArray[np.float64]
    b: NDArray[np.float64]
    last_grant: NDArray[np.int64]

    def __init__(self) -> None:
        self.size = _FIRST_ROWS  # rows of the columns, used or not
        self.group_names: list[str] = []  # places in the topology; only ever grows
        self.full: set[int] = set()
        self._ids: dict[int, str] = {}
        self._rows: dict[str, int] = {}
        self._rows_in_use = np.empty(0, np.intp)
        self._free = list(range(self.size - 1, -1, -1))
        self._generations = [0] * self.size
        self._num_grants = 0
        for name, kind in (_LEDGER | _STATIC).items():
            setattr(self, name, np.full(self.size, _FIRST_VALUE.get(name, 0), kind))
        self._look_into_columns()

    def __len__(self) -> int:
        return len(self._rows)

    # ---- engines --------------------------------------------------------------------------------------

    def add(
        self,
        engine_id: str,
        *,
        capacity: int = 32,
        max_num_batched_tokens: int = 2048,
        price: float = 0.0,
        group: str = "",
        coefficients: StepCoefficients = DEFAULT_PRIOR,
    ) -> int:
        """The row of a new engine. `group` is its place in the topology, outermost first: `zone/rack/host`."""
        if engine_id in self._rows:
            raise InvalidArgumentError(
                f"an engine {engine_id!r} has a row already; choose another id", field="engine_id"
            )
        if not self._free:
            self._grow()
        row = self._free.pop()
        self._ids[row], self._rows[engine_id] = engine_id, row
        self._rows_in_use = np.sort(np.fromiter(self._ids, np.intp, len(self._ids)))
        self.capacity[row], self.max_num_batched_tokens[row] = capacity, max_num_batched_tokens
        self.price[row], self.last_grant[row] = price, -1
        if capacity <= 0:
            self.full.add(row)
        if group not in self.group_names:
            self.group_names.append(group)
        self.group[row] = self.group_names.index(group)
        self.key[row] = int.from_bytes(blake2b(engine_id.encode(), digest_size=8).digest(), "little")
        self.set_coefficients(row, coefficients)
        return row

    def remove(self, row: int) -> None:
        """Forget an engine with all that is booked on it; bookings that end later change nothing."""
        del self._rows[self._ids.pop(row)]
        self._rows_in_use = self._rows_in_use[self._rows_in_use != row]
        self._generations[row] += 1
        for name in _LEDGER:
            getattr(self, name)[row] = 0
        self.full.discard(row)
        self._free.append(row)

    def set_coefficients(self, row: int, coefficients: StepCoefficients) -> None:
        """What the engine's steps cost, as last learned."""
        self.c0[row], self.a[row], self.q[row] = coefficients.c0, coefficients.a, coefficients.q
        self.k[row], self.b[row] = coefficients.k, coefficients.b

    def row_of(self, engine_id: str) -> int:
        """The row of an engine; KeyError for one without."""
        return self._rows[engine_id]

    def engine_id(self, row: int) -> str:
        """The engine of a row; KeyError for a row that is not in use."""
        return self._ids[row]

    def rows(self) -> NDArray[np.intp]:
        """The rows in use, ascending; an array that is replaced, never changed."""
        return self._rows_in_use

    # ---- the ledger -----------------------------------------------------------------------------------

    def grant(self, row: int, booking: Booking) -> None:
        """Book a request in, before its prefill."""
        assert booking.row < 0, "a booking is one stay: make a new one for the next engine"
        booking.row, booking.generation = row, self._generations[row]
        requests, queued, tokens, attention, _, _, held, capacity, last_grant = self._cells
        last_grant[row] = self._num_grants
        self._num_grants += 1
        requests[row] += 1
        queued[row] += 1
        tokens[row] += booking.num_uncached_tokens
        attention[row] += booking.attention
        held[row] += booking.num_prompt_tokens
        if requests[row] >= capacity[row]:
            self.full.add(row)

    def first_token(self, booking: Booking) -> None:
        """The prefill is over, the sequences decode; a second call changes nothing."""
        row = booking.row
        if booking.is_decoding or not self._is_booked(booking):
            return
        booking.is_decoding = True
        _, queued, tokens, attention, decoding, kv_tokens, _, _, _ = self._cells
        queued[row] -= 1
        tokens[row] -= booking.num_uncached_tokens
        attention[row] -= booking.attention
        decoding[row] += booking.num_sequences
        kv_tokens[row] += booking.num_prompt_tokens * booking.num_sequences

    def advance(self, booking: Booking, num_tokens: int) -> None:
        """`num_tokens` were decoded, of all sequences together; the first of them end the prefill."""
        if not self._is_booked(booking):
            return
        self.first_token(booking)
        booking.num_tokens += num_tokens
        _, _, _, _, _, kv_tokens, held, _, _ = self._cells
        kv_tokens[booking.row] += num_tokens
        held[booking.row] += num_tokens

    def end(self, booking: Booking) -> None:
        """Book a request out, wherever it stood; a second call changes nothing."""
        row = booking.row
        if self._is_booked(booking):
            requests, queued, tokens, attention, decoding, kv_tokens, held, capacity, _ = self._cells
            requests[row] -= 1
            held[row] -= booking.num_prompt_tokens + booking.num_tokens
            if booking.is_decoding:
                decoding[row] -= booking.num_sequences
                kv_tokens[row] -= booking.num_prompt_tokens * booking.num_sequences + booking.num_tokens
            else:
                queued[row] -= 1
                tokens[row] -= booking.num_uncached_tokens
                attention[row] -= booking.attention
            if requests[row] < capacity[row]:
                self.full.discard(row)
        booking.row = -1

    def _is_booked(self, booking: Booking) -> bool:
        return booking.row >= 0 and booking.generation == self._generations[booking.row]

    def _grow(self) -> None:
        old, self.size = self.size, 2 * self.size
        for name in _LEDGER | _STATIC:
            column = getattr(self, name)
            new = np.full(old, _FIRST_VALUE.get(name, 0), column.dtype)
            setattr(self, name, np.concatenate([column, new]))
        self._look_into_columns()
        self._generations += [0] * old
        self._free = list(range(self.size - 1, old - 1, -1))

    def _look_into_columns(self) -> None:
        """The same memory a cell at a time, as Python's numbers: numpy's own take five times as long."""
        self._cells: list[memoryview[Any]] = [
            memoryview(getattr(self, name)) for name in (*_LEDGER, "capacity", "last_grant")
        ]
