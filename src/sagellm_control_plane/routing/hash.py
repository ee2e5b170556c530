"""`hash`: the same beginning of a prompt goes to the same engine; no knowledge of caches is needed.

Consistent (rendezvous) hashing: each engine has a weight for each key and the highest wins, so that an engine that
comes or goes moves only its own keys (Thaler and Ravishankar, 1998). Loads are bounded: see `below_load_bound`.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from sagellm_control_plane.fleet import Fleet
from sagellm_control_plane.routing.base import Choice, RoutedRequest, RoutingPolicy, Rows, below_load_bound
from sagellm_control_plane.text_index import TEXT_BLOCK_BYTES

_BEGINNING_TOKENS = 128


class PrefixHash(RoutingPolicy):
    """By the first tokens of the prompt, or the first bytes of its text."""

    name = "hash"
    wants_tokens = True

    def choose(self, request: RoutedRequest, rows: Rows, fleet: Fleet, now: float) -> Choice:
        """See `RoutingPolicy.choose`."""
        hashes = request.block_hashes[: max(1, _BEGINNING_TOKENS // request.block_size)]
        text = (request.text or "")[:TEXT_BLOCK_BYTES]
        return choose_by_hash(hashes[-1] if hashes else text.encode("utf-8", "surrogatepass"), rows, fleet)


def choose_by_hash(key: bytes, rows: Rows, fleet: Fleet) -> Choice:
    """The engine of a key, or the next one in the key's own order while that stands out by its load."""
    weights = _weights(key, fleet.key[rows])
    may = below_load_bound(rows, fleet)
    best = int(np.where(may, weights, np.uint64(0)).argmax())
    rule = "by hash" if best == int(weights.argmax()) else "by hash, past busier engines"
    return Choice(int(rows[best]), rule=rule)


def _weights(key: bytes, engine_keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A pseudo-random number for each pair: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    mixed: NDArray[np.uint64] = engine_keys ^ np.uint64(int.from_bytes(blake2b(key, digest_size=8).digest(), "little"))
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    mixed |= np.uint64(1)  # never 0, which stands for an engine that may not
    return mixed
