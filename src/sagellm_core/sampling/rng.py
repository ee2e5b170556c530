"""Random numbers without a state: philox4x32-10, a counter-based generator, vectorised in numpy.

A number is a pure function of (seed, position), so a request draws the same numbers in any batch, after any preemption
and on any replica. Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011; constants and
known answers from the authors' Random123 library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 10
_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)  # golden ratio, sqrt(3) - 1

# The third counter word separates uses of one seed, so that they never share a number.
_STREAM_TOKENS = 0
_STREAM_SEEDS = 1
_MAX_UINT64 = 2**64 - 1
_FEW = 16  # so many numbers are computed faster one by one than by numpy


def _philox(counter: Sequence[Any], key: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    """Ten rounds: four counter words and two key words give four random words; all int, or all [n] uint64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # below 2**64: nothing overflows
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK32, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _MASK32, (k1 + _KEY_INCREMENTS[1]) & _MASK32
    return c0, c1, c2, c3


def philox4x32(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Philox of `counter` [n, 4] with `key` [n, 2]; returns [n, 4] random words."""
    c0, c1, c2, c3 = counter.T.astype(np.uint64)
    k0, k1 = key.T.astype(np.uint64)
    return np.stack(_philox((c0, c1, c2, c3), (k0, k1)), axis=-1).astype(np.uint32)


def uniform(seed: int, position: int) -> float:
    """One number of `uniforms`."""
    seed &= _MAX_UINT64
    low, high, _, _ = _philox((position & _MASK32, position >> 32, _STREAM_TOKENS, 0), (seed & _MASK32, seed >> 32))
    return float((((high << 32 | low) >> 12) + 0.5) * 2.0**-52)


def uniform_list(seeds: Sequence[int], positions: Sequence[int]) -> list[float]:
    """`uniforms` of Python numbers."""
    if len(seeds) <= _FEW:
        return [uniform(seed, position) for seed, position in zip(seeds, positions, strict=True)]
    wide = np.array([seed & _MAX_UINT64 for seed in seeds], dtype=np.uint64)
    numbers: list[float] = uniforms(wide, np.array(positions, dtype=np.int64)).tolist()
    return numbers


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
    wide: NDArray[np.uint64] = (words[:, 1] << np.uint64(32)) | words[:, 0]
    return wide


def _halves(values: NDArray[np.uint64]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    return (values & np.uint64(_MASK32)).astype(np.uint32), (values >> np.uint64(32)).astype(np.uint32)
