"""Loads that are made up: conversations with a few system prompts, whose turns repeat what was said before."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from random import Random

from sagellm_benchmark.traces import BLOCK_TOKENS, TraceRequest


@dataclass(frozen=True, slots=True)
class SyntheticLoad:
    """Conversations begin as a Poisson process, have a geometric number of turns, and pause between them.

    Lengths are in tokens and log-normal around their means. `system_tokens` come before every conversation, in one of
    `num_systems` versions, the first the most frequent (Zipf).
    """

    num_requests: int = 4000
    requests_per_s: float = 4.0
    num_systems: int = 8
    system_tokens: int = 4096
    question_tokens: int = 1500
    answer_tokens: int = 200
    num_turns: float = 5.0
    pause_s: float = 20.0
    max_context_tokens: int = 100_000
    seed: int = 0

    def requests(self) -> list[TraceRequest]:
        """In the order of arrival; the same load gives the same requests."""
        rng, ids = Random(self.seed), count()
        systems = [[next(ids) for _ in range(self.system_tokens // BLOCK_TOKENS)] for _ in range(self.num_systems)]
        weights = [1 / (rank + 1) for rank in range(self.num_systems)]
        turns: list[tuple[float, int, list[int], int]] = []  # when, number, blocks so far, tokens beyond those
        requests: list[TraceRequest] = []
        begins_at, numbers = 0.0, count()
        while len(requests) < self.num_requests:
            if not turns or begins_at <= turns[0][0]:
                heappush(turns, (begins_at, next(numbers), rng.choices(systems, weights)[0], 0))
                begins_at += rng.expovariate(self.requests_per_s / self.num_turns)
                continue
            at_s, _, blocks, rest = heappop(turns)
            rest += _length(rng, self.question_tokens)
            output_len = _length(rng, self.answer_tokens)
            input_len = len(blocks) * BLOCK_TOKENS + rest
            blocks = [*blocks, *(next(ids) for _ in range(rest // BLOCK_TOKENS))]
            rest %= BLOCK_TOKENS
            # Where the last block is part full, nobody shares it: its name is used once.
            requests.append(TraceRequest(at_s, input_len, output_len, (*blocks, next(ids)) if rest else tuple(blocks)))
            if rng.random() < 1 - 1 / self.num_turns and input_len + output_len < self.max_context_tokens:
                again_at = at_s + rng.expovariate(1 / self.pause_s)
                heappush(turns, (again_at, next(numbers), blocks, rest + output_len))
        return requests


def _length(rng: Random, mean: int) -> int:
    """Log-normal with a sigma of 0.6, at least 1."""
    return max(1, round(mean * rng.lognormvariate(-0.18, 0.6)))
