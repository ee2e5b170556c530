"""`sage-llm bench latency` and `throughput`: an engine under load, as plain JSON values.

Both feed random token ids, greedy and without an end token, so that the work is exactly what was asked for. Warm-up
batches come first and are not counted; each measured batch has prompts of its own, so that no prefix cache helps.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sagellm_benchmark import timing
from sagellm_benchmark.requests import random_prompts, stream_batch
from sagellm_benchmark.timing import Summary, TokenTimes
from sagellm_protocol import InvalidArgumentError

if TYPE_CHECKING:
    from sagellm_core import LLMEngine


@dataclass(frozen=True, slots=True)
class Load:
    """What a run asks of the engine: `requests` prompts, at most `concurrency` at a time; lengths in tokens."""

    input_len: int
    output_len: int
    requests: int
    concurrency: int
    runs: int
    warmup: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len", "requests", "concurrency", "runs"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} must be at least 1, got {getattr(self, name)}", field=name)


async def run_load(engine: LLMEngine, load: Load, on_run: Callable[[], None] | None = None) -> list[TokenTimes]:
    """The arrivals of every measured batch; `on_run` is called after each batch, warm-up included."""
    vocab_size = engine.model_config.spec.vocab_size
    measured = []
    for number in range(load.warmup + load.runs):
        prompts = random_prompts(load.requests, load.input_len, vocab_size, load.seed + number)
        times = await stream_batch(engine, prompts, load.output_len, concurrency=load.concurrency)
        if number >= load.warmup:
            measured.append(times)
        if on_run is not None:
            on_run()
    return measured


def describe_latency(engine: LLMEngine, load: Load, runs: list[TokenTimes]) -> dict[str, Any]:
    """What a user of one of `load.requests` equal requests sees: milliseconds, over all requests of all runs."""
    requests = [arrivals for times in runs for arrivals in times]
    return {
        "benchmark": "latency",
        **_common(engine, load, runs),
        "ttft_ms": _milliseconds(timing.first_token_times(requests)),
        "tpot_ms": _milliseconds(timing.times_per_token(requests)),
        "itl_ms": _milliseconds(timing.gaps(requests)),
        "latency_ms": _milliseconds([arrivals[-1] for arrivals in requests]),
        "prefill_tokens_per_second": _median(timing.prefill_rate(times, load.input_len) for times in runs),
    }


def describe_throughput(engine: LLMEngine, load: Load, runs: list[TokenTimes]) -> dict[str, Any]:
    """What the engine does in a second, medians over the runs."""
    tokens_each = load.input_len + load.output_len
    per_second = statistics.median(len(times) / timing.duration(times) for times in runs)
    return {
        "benchmark": "throughput",
        **_common(engine, load, runs),
        "requests_per_second": per_second,
        "total_tokens_per_second": per_second * tokens_each,
    }


def _common(engine: LLMEngine, load: Load, runs: list[TokenTimes]) -> dict[str, Any]:
    return {
        "engine": engine.get_info(),
        "load": asdict(load),
        "output_tokens_per_second": _median(timing.output_rate(times) for times in runs),
        "decode_tokens_per_second": _median(timing.decode_rate(times) for times in runs),
        "runs": [
            {
                "duration_s": timing.duration(times),
                "output_tokens_per_second": timing.output_rate(times),
                "decode_tokens_per_second": timing.decode_rate(times),
            }
            for times in runs
        ],
    }


def _milliseconds(seconds: list[float]) -> dict[str, float] | None:
    return Summary.of([1e3 * value for value in seconds]).to_json() if seconds else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
