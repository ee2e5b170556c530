"""How long a step of an engine takes, learned while it runs.

    T = c0 + a * P + q * A + k * KV + b * B

P prefill tokens of the step, A the pairs of tokens that they compare (sum of p * (context + p / 2)), KV the sum of the
contexts of the decoding sequences, B their number. The same form serves router, queue, planner and simulator. Each term
costs time and none gives any back, so the fit is by non-negative least squares (Lawson and Hanson, Solving Least
Squares Problems, 1974, chapter 23).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import astuple, dataclass
from math import ceil
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sagellm_core.engine_core.report import StepSample

_MAX_BUCKETS = 256
_MEMORY = 64  # samples that the mean of a bucket rests on; older ones fade
_HALF_LIFE = 20_000  # steps after which a bucket without new samples counts half
_MIN_SAMPLES = 5
_REFIT_AFTER = 32  # samples
_OUTLIER = 4.0  # times a bucket's mean: a pause of the machine, not of the model
_PRIOR_WEIGHT = 0.01  # of the belief in the prior, against one bucket


@dataclass(frozen=True, slots=True)
class StepCoefficients:
    """Seconds: of a step, a prefill token, a pair of tokens compared, a token of context, a decoding sequence."""

    c0: float
    a: float
    q: float
    k: float
    b: float

    def step_s(self, prefill_tokens: float, prefill_attention: float, kv_tokens: float, num_decoding: float) -> float:
        """How long one step takes."""
        return (
            self.c0 + self.a * prefill_tokens + self.q * prefill_attention + self.k * kv_tokens + self.b * num_decoding
        )

    def prefill_s(self, num_prompt_tokens: int, num_cached_tokens: int = 0, *, tokens_per_step: int = 2048) -> float:
        """How long an idle engine computes a prompt, of which it has a part in its cache."""
        uncached = max(1, num_prompt_tokens - num_cached_tokens)
        attention = uncached * (2 * num_prompt_tokens - uncached) / 2
        return ceil(uncached / tokens_per_step) * self.c0 + self.a * uncached + self.q * attention

    def decode_s(self, kv_tokens: float, num_decoding: float) -> float:
        """How long one step of decoding takes: the time between two tokens."""
        return self.c0 + self.k * kv_tokens + self.b * num_decoding


# A large accelerator with a model of some billion parameters; what a cold engine is taken for, and corrected by its
# first steps.
DEFAULT_PRIOR = StepCoefficients(c0=6e-3, a=55e-6, q=2e-9, k=13e-9, b=30e-6)


@dataclass(slots=True)
class _Bucket:
    """The mean of like steps: features (without the constant) and duration."""

    features: NDArray[np.float64]
    duration_s: float
    num_samples: int
    last: int  # number of the newest sample


class StepTimeModel:
    """The coefficients of one engine, by its own steps.

    Like steps share a bucket, so that a thousand steps of the same decode batch weigh no more than the few prefills
    between them; relative errors count, so that short steps are met as well as long ones. Until there are some samples
    the prior speaks; what the samples don't show (no prefill yet, say) stays in the prior's proportion to the rest.
    """

    def __init__(self, prior: StepCoefficients = DEFAULT_PRIOR) -> None:
        self._prior = prior
        self._buckets: OrderedDict[tuple[int, ...], _Bucket] = OrderedDict()
        self._num_samples = 0
        self._fitted_at = 0
        self._coefficients = prior

    @property
    def num_samples(self) -> int:
        """Steps seen."""
        return self._num_samples

    @property
    def coefficients(self) -> StepCoefficients:
        """As of the last steps; the prior below 5 of them."""
        due = _MIN_SAMPLES if self._fitted_at == 0 else self._fitted_at + _REFIT_AFTER
        if self._num_samples >= due:
            self._coefficients = self._fit()
            self._fitted_at = self._num_samples
        return self._coefficients

    def observe(self, sample: StepSample) -> None:
        """Learn from one step."""
        features = np.array(
            [sample.prefill_tokens, sample.prefill_attention, sample.kv_tokens, sample.num_decoding], np.float64
        )
        key = tuple(int(2 * exponent) for exponent in np.log2(1 + features))
        self._num_samples += 1
        bucket = self._buckets.get(key)
        if bucket is None:
            self._buckets[key] = _Bucket(features, sample.duration_s, 1, self._num_samples)
            if len(self._buckets) > _MAX_BUCKETS:
                self._buckets.popitem(last=False)
            return
        self._buckets.move_to_end(key)
        bucket.num_samples, bucket.last = min(bucket.num_samples + 1, _MEMORY), self._num_samples
        share = 1 / bucket.num_samples
        bucket.features += share * (features - bucket.features)
        bucket.duration_s += share * (min(sample.duration_s, _OUTLIER * bucket.duration_s) - bucket.duration_s)

    def _fit(self) -> StepCoefficients:
        buckets = list(self._buckets.values())
        features = np.array([[1.0, *bucket.features] for bucket in buckets])
        durations = np.array([max(bucket.duration_s, 1e-9) for bucket in buckets])
        ages = np.array([self._num_samples - bucket.last for bucket in buckets])
        counts = np.array([bucket.num_samples for bucket in buckets])
        weights = np.sqrt(np.minimum(counts, 8) / 8 * 0.5 ** (ages / _HALF_LIFE)) / durations

        prior = np.array(astuple(self._prior))
        believed = np.maximum(prior * _scale(features @ prior, durations), 1e-15)
        # In units of the believed values, all columns are alike, and the prior is a row of its own for each.
        matrix = np.vstack([features * believed * weights[:, None], _PRIOR_WEIGHT * np.eye(5)])
        target = np.concatenate([durations * weights, np.full(5, _PRIOR_WEIGHT)])
        return StepCoefficients(*(float(value) for value in nnls(matrix, target) * believed))


def _scale(predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> float:
    """How much slower the engine is than its prior, as most of its buckets say."""
    return float(np.median(measured / np.maximum(predicted, 1e-12)))


def nnls(matrix: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """The x >= 0 that minimises |matrix @ x - target|, by the active-set method of Lawson and Hanson."""
    gram, moment = matrix.T @ matrix, matrix.T @ target
    num = len(moment)
    x = np.zeros(num)
    active = np.zeros(num, bool)  # the variables that are free to be positive
    tolerance = 1e-12 * float(np.abs(moment).max(initial=1e-300))
    for _ in range(3 * num):
        gradient = np.where(active, -np.inf, moment - gram @ x)
        if gradient.max() <= tolerance:
            break
        active[gradient.argmax()] = True
        while True:
            solution = np.zeros(num)
            solution[active] = np.linalg.lstsq(gram[np.ix_(active, active)], moment[active], rcond=None)[0]
            negative = active & (solution <= 0)
            if not negative.any():
                x = solution
                break
            ratios = np.where(negative, x / np.maximum(x - solution, 1e-300), np.inf)
            x = x + ratios.min() * (solution - x)
            active &= ratios > ratios.min()  # those that have come down to 0
            x[~active] = 0.0
    return x
