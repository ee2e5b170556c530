"""When requests are sent: at random with a mean rate, all at once, or as a trace has it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from sagellm_protocol import InvalidArgumentError


def random_times(count: int, rate: float, *, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """Seconds at which `count` requests are sent: gaps of mean `1 / rate` from a gamma distribution.

    A `burstiness` of 1 is a Poisson process; below 1 requests come in bursts, above 1 more evenly (it is the shape of
    the distribution, as in vLLM's `bench serve`). An infinite rate sends all at once. The first is sent at 0.
    """
    if not rate > 0:
        raise InvalidArgumentError(f"the request rate must be above 0, got {rate:g}; inf is all at once", field="rate")
    if not (0 < burstiness < math.inf):
        raise InvalidArgumentError(f"burstiness must be a number above 0, got {burstiness:g}", field="burstiness")
    if math.isinf(rate):
        return [0.0] * count
    generator = random.Random(seed)
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        now += generator.gammavariate(burstiness, 1 / (rate * burstiness))
    return times


def recorded_times(times: Sequence[float | None], *, speed: float = 1.0) -> list[float]:
    """The times of a trace, `speed` times as fast.

    Raises `InvalidArgumentError` where it has none.
    """
    if not (0 < speed < math.inf):
        raise InvalidArgumentError(f"speed must be a number above 0, got {speed:g}", field="speed")
    known = [moment for moment in times if moment is not None]
    if len(known) < len(times):
        raise InvalidArgumentError("the data holds no times; give a request rate", field="rate")
    begin = min(known, default=0.0)
    return [(moment - begin) / speed for moment in known]
