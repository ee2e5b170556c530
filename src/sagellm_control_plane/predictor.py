"""What the control plane expects: when a first token comes, how fast the next ones, how long an answer gets.

Step times are learned for each engine (`step_time`), lengths of answers for each tenant and model, and how fast places
become free for each model. All of it belongs to one event loop, and is bounded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from itertools import accumulate
from math import log2
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sagellm_control_plane.first_token import first_token_s
from sagellm_control_plane.fleet import Fleet, prefill_attention
from sagellm_control_plane.step_time import DEFAULT_PRIOR, StepCoefficients, StepTimeModel

if TYPE_CHECKING:
    from sagellm_core.engine_core.report import StepSample

_MAX_LENGTHS = 4096  # pairs of tenant and model
_BINS_PER_OCTAVE = 4
_NUM_BINS = 21 * _BINS_PER_OCTAVE  # up to 2 million tokens
_FADE = 0.99  # what each answer leaves of the weight of those before it: the last hundred count
_ENOUGH = 20.0  # answers of a tenant, from which on those of others with the same model no longer count
_REFRESH = 8  # answers after which quantiles are computed anew
_MOST = 1e9  # of the newest answer's weight, before all weights are scaled down
_SERVICE_SHARE = 0.05  # of the newest answer in the mean time of service


class OutputLengths:
    """How many tokens answers have, as a histogram that forgets; bins are a quarter of an octave."""

    def __init__(self) -> None:
        self._counts = [0.0] * _NUM_BINS
        self._total = 0.0  # of the counts
        self._newest = 1.0  # what the newest answer weighs: to let it grow is to let all others fade
        self._quantiles: dict[float, float | None] = {}  # asked for since the last change that counts
        self._num_added = 0

    @property
    def weight(self) -> float:
        """Answers that count; at most a hundred."""
        return self._total / self._newest

    def add(self, num_tokens: int) -> None:
        """Learn from an answer."""
        self._newest /= _FADE
        self._counts[min(_bin(num_tokens), _NUM_BINS - 1)] += self._newest
        self._total += self._newest
        self._num_added += 1
        if self._newest > _MOST:
            self._counts = [count / self._newest for count in self._counts]
            self._total, self._newest = sum(self._counts), 1.0
        # One answer among a hundred changes no quantile that matters.
        if self._num_added <= _ENOUGH or self._num_added % _REFRESH == 0:
            self._quantiles.clear()

    def quantile(self, share: float) -> float | None:
        """What `share` of the answers don't exceed; None if there are none."""
        if share not in self._quantiles:
            self._quantiles[share] = self._compute_quantile(share)
        return self._quantiles[share]

    def _compute_quantile(self, share: float) -> float | None:
        if self._total <= 1e-9 * self._newest:
            return None
        sums = enumerate(accumulate(self._counts))
        number = next((number for number, reached in sums if reached >= share * self._total), _NUM_BINS - 1)
        return float(2 ** ((number + 0.5) / _BINS_PER_OCTAVE) - 1)


def _bin(num_tokens: int) -> int:
    return int(_BINS_PER_OCTAVE * log2(1 + num_tokens))


def _median(values: NDArray[np.float64]) -> float:
    """numpy's own takes ten times as long for a few values."""
    ranked = np.sort(values)
    return float(ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) / 2


class Predictor:
    """Expectations over the engines of a fleet. Times are seconds; `rows` are rows of the fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._steps: dict[int, StepTimeModel] = {}
        self._lengths: OrderedDict[tuple[str, str], OutputLengths] = OrderedDict()
        self._service_s: OrderedDict[str, float] = OrderedDict()

    # ---- learning -------------------------------------------------------------------------------------

    def add_engine(self, row: int, prior: StepCoefficients = DEFAULT_PRIOR) -> None:
        """Begin with an engine anew; `prior` is what it is taken for until it has made some steps."""
        self._steps[row] = StepTimeModel(prior)
        self._fleet.set_coefficients(row, prior)

    def remove_engine(self, row: int) -> None:
        """Forget an engine."""
        self._steps.pop(row, None)

    def observe_steps(self, row: int, steps: Iterable[StepSample]) -> None:
        """Learn from an engine's steps; the fleet is told what they cost."""
        model = self._steps.get(row)
        if model is None:
            return  # its engine was removed while the report was on its way
        for step in steps:
            model.observe(step)
        self._fleet.set_coefficients(row, model.coefficients)

    def observe_answer(self, tenant: str, model: str, num_tokens: int, service_s: float) -> None:
        """Learn from a whole answer: tokens of one choice, and the time that it held its place."""
        if tenant:
            self._observe_length((tenant, model), num_tokens)
        self._observe_length(("", model), num_tokens)
        known = self._service_s.get(model)
        if known is None:
            self._service_s[model] = service_s
            if len(self._service_s) > _MAX_LENGTHS:
                self._service_s.popitem(last=False)
        else:
            self._service_s[model] = known + _SERVICE_SHARE * (service_s - known)
            self._service_s.move_to_end(model)

    def _observe_length(self, key: tuple[str, str], num_tokens: int) -> None:
        lengths = self._lengths.get(key)
        if lengths is None:
            lengths = self._lengths[key] = OutputLengths()
            if len(self._lengths) > _MAX_LENGTHS:
                self._lengths.popitem(last=False)
        else:
            self._lengths.move_to_end(key)
        lengths.add(num_tokens)

    # ---- lengths --------------------------------------------------------------------------------------

    def output_tokens(self, tenant: str, model: str, limit: int, *, quantile: float = 0.5) -> int:
        """Tokens that an answer will have, at most `limit`, which is taken where nothing is known."""
        expected: float | None = None
        if tenant:
            own = self._lengths.get((tenant, model))
            if own is not None and own.weight >= _ENOUGH:
                expected = own.quantile(quantile)
        if expected is None:
            common = self._lengths.get(("", model))
            expected = None if common is None else common.quantile(quantile)
        return limit if expected is None or expected >= limit else max(round(expected), 1)

    def has_seen(self, model: str) -> bool:
        """Whether an answer of the model was learned from."""
        return model in self._service_s

    # ---- times ----------------------------------------------------------------------------------------

    def ttft_s(
        self, rows: NDArray[np.intp], num_prompt_tokens: int, num_cached_tokens: NDArray[np.int64] | int = 0
    ) -> NDArray[np.float64]:
        """Until the first token on each engine if the request went there now: prefills ahead of it, and its own."""
        uncached = np.maximum(1, num_prompt_tokens - np.asarray(num_cached_tokens))
        return first_token_s(self._fleet, num_prompt_tokens, uncached, rows)[1]

    def tpot_s(
        self, rows: NDArray[np.intp], num_context_tokens: int = 0, *, num_sequences: int = 1
    ) -> NDArray[np.float64]:
        """Between two tokens on each engine, with `num_sequences` more of such a context there."""
        fleet = self._fleet
        kv_tokens = fleet.kv_tokens[rows] + num_sequences * num_context_tokens
        seconds: NDArray[np.float64] = (
            fleet.c0[rows] + fleet.k[rows] * kv_tokens + fleet.b[rows] * (fleet.num_decoding[rows] + num_sequences)
        )
        return seconds

    def prefill_s(self, num_prompt_tokens: int) -> float:
        """Until the first token on an engine of average speed that has nothing else to compute; 0 without engines."""
        fleet, rows = self._fleet, self._fleet.rows()
        if not len(rows):
            return 0.0
        num_steps = np.ceil(num_prompt_tokens / np.maximum(1, fleet.max_num_batched_tokens[rows]))
        step_s = fleet.c0[rows] + fleet.k[rows] * fleet.kv_tokens[rows] + fleet.b[rows] * fleet.num_decoding[rows]
        attention = prefill_attention(num_prompt_tokens, num_prompt_tokens)
        return _median(num_steps * step_s + fleet.a[rows] * num_prompt_tokens + fleet.q[rows] * attention)

    def decode_s(self, num_tokens: int) -> float:
        """For so many tokens of one sequence, on an engine of average speed and its load of now; 0 without engines."""
        rows = self._fleet.rows()
        return num_tokens * _median(self.tpot_s(rows)) if len(rows) else 0.0

    def service_s(self, model: str, num_prompt_tokens: int, num_output_tokens: int) -> float:
        """How long such a request will hold its place: as answers of late did, or by the step times."""
        known = self._service_s.get(model)
        if known is not None:
            return known
        return self.prefill_s(num_prompt_tokens) + self.decode_s(num_output_tokens)

    def queue_wait_s(
        self, model: str, num_ahead: int, num_places: int, num_prompt_tokens: int, num_output_tokens: int
    ) -> float:
        """Until the place of a request that has `num_ahead` others before it, when all of its model's places are taken.

        By Little's law: `num_places` places become free once in a mean time of service each. Infinite without places.
        """
        if num_places <= 0:
            return float("inf")
        return (num_ahead + 1) * self.service_s(model, num_prompt_tokens, num_output_tokens) / num_places
