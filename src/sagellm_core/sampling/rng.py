"""Random numbers without a state: philox4x32-10, a counter-based generator, vectorised in numpy.

A number is a pure function of (seed, position), so a request draws the same numbers in any batch, after any preemption
and on any replica. Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011; constants and
known answers from the authors' Random123 library.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 10
_MASK32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
# The key of round r is key + r * (golden ratio, sqrt(3) - 1), modulo 2**32.
_KEY_INCREMENTS = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
_KEY_STEPS = np.arange(_ROUNDS, dtype=np.uint64)[:, None, None] * _KEY_INCREMENTS

# The third counter word separates uses of one seed, so that they never share a number.
_STREAM_TOKENS = 0
_STREAM_SEEDS = 1
_MAX_UINT64 = 2**64 - 1


def philox4x32(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Ten rounds of Philox over `counter` [n, 4] with `key` [n, 2]; returns [n, 4] random words."""
    even = counter.T[::2].astype(np.uint64)  # words 0 and 2: [2, n]
    odd = counter.T[1::2].astype(np.uint64)  # words 1 and 3
    round_keys = (key.T.astype(np.uint64) + _KEY_STEPS) & _MASK32  # [rounds, 2, n]
    for round_key in round_keys:
        products = _MULTIPLIERS * even  # below 2**64: nothing overflows
        even = (products[::-1] >> _SHIFT32) ^ odd ^ round_key
        odd = products[::-1] & _MASK32
    words = np.stack([even[0], odd[0], even[1], odd[1]], axis=-1)
    return words.astype(np.uint32)


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in the open interval (0, 1) for each (seed, position): [n] float64 with 52 random bits.

    `position` is the index in prompt + output of the token to draw. A request that moves to another engine as prompt +
    emitted tokens therefore goes on with the very numbers it would have drawn where it was.
    """
    bits = _words64(seeds, positions.astype(np.uint64), _STREAM_TOKENS) >> np.uint64(12)
    # Half a step away from both ends; with 53 bits the largest would round to 1.
    numbers: NDArray[np.float64] = (bits.astype(np.float64) + 0.5) * 2.0**-52
    return numbers


def derive_seed(seed: int, index: int) -> int:
    """The seed of output `index` of a request with `seed`; output 0 keeps the request's own, as if n were 1."""
    if index == 0:
        return seed
    seeds = np.array([seed & _MAX_UINT64], dtype=np.uint64)
    return int(_words64(seeds, np.array([index], dtype=np.uint64), _STREAM_SEEDS)[0])


def _words64(seeds: NDArray[np.uint64], counters: NDArray[np.uint64], stream: int) -> NDArray[np.uint64]:
    """The first 64 bits of the Philox block of each (seed, counter)."""
    counter = np.zeros((len(seeds), 4), dtype=np.uint32)
    counter[:, 0], counter[:, 1] = _halves(counters)
    counter[:, 2] = stream
    words = philox4x32(counter, np.stack(_halves(seeds), axis=-1)).astype(np.uint64)
    wide: NDArray[np.uint64] = (words[:, 1] << _SHIFT32) | words[:, 0]
    return wide


def _halves(values: NDArray[np.uint64]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    return (values & _MASK32).astype(np.uint32), (values >> _SHIFT32).astype(np.uint32)
