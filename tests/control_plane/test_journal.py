"""One stream out of several engines' streams."""

from __future__ import annotations

from typing import Any

import pytest

from sagellm_control_plane.journal import Journal
from sagellm_protocol import (
    CompletionOutput,
    FinishReason,
    InternalError,
    Request,
    Response,
    SamplingParams,
    StreamEventDelta,
    StreamEventEnd,
    StreamEventStart,
    TokenLogprob,
    UnavailableError,
)

NAMES = {"request_id": "r", "trace_id": "t", "engine_id": "e"}


def start(seed: int | None = 7) -> StreamEventStart:
    return StreamEventStart(prompt_tokens=3, seed=seed, **NAMES)


def delta(*tokens: int, index: int = 0, logprobs: bool = False) -> StreamEventDelta:
    entries = [TokenLogprob(token_id=token, logprob=-1.0) for token in tokens] if logprobs else None
    text = "".join(f"{token} " for token in tokens)
    return StreamEventDelta(chunk=text, chunk_tokens=list(tokens), index=index, logprobs=entries, **NAMES)


def end(*outputs: list[int], **fields: Any) -> StreamEventEnd:
    made = [
        CompletionOutput(index=index, token_ids=tokens, finish_reason=FinishReason.STOP, **fields)
        for index, tokens in enumerate(outputs)
    ]
    return StreamEventEnd.of(Response.of(made, **NAMES))


def make(**fields: Any) -> Journal:
    return Journal(Request(request_id="r", prompt="hi", **fields))


def deliver(journal: Journal, event: StreamEventDelta) -> None:
    journal.fresh.append(event)
    assert journal.read() == len(event.chunk_tokens)
    assert not journal.read(), "each token is entered once"


def test_an_undisturbed_stream_passes_as_it_is() -> None:
    journal, last = make(), end([1, 2])
    assert journal.remainder() is journal._request
    assert journal.start(start())
    deliver(journal, delta(1, 2))
    assert journal.end(last) is last


def test_the_next_engine_goes_on_with_tokens_and_seed() -> None:
    journal = make(sampling_params=SamplingParams(n=2, temperature=1.0))
    journal.start(start(seed=11))
    deliver(journal, delta(5, index=1))
    deliver(journal, delta(6, 7, index=1))
    point = journal.remainder().resume_from
    assert point is not None
    assert (point.output_token_ids, point.seed) == ([[], [5, 6, 7]], 11)
    assert not journal.start(start(seed=99)), "the caller has had its start"
    deliver(journal, delta(1))
    point = journal.remainder().resume_from
    assert point is not None
    assert (point.output_token_ids, point.seed) == ([[1], [5, 6, 7]], 11), "what later engines draw does not count"


def test_an_announced_seed_holds_even_before_the_first_token() -> None:
    journal = make()
    journal.start(start(seed=11))
    point = journal.remainder().resume_from
    assert point is not None
    assert (point.output_token_ids, point.seed) == ([], 11)


def test_the_end_of_a_moved_answer_is_whole() -> None:
    journal = make()
    journal.start(start())
    deliver(journal, delta(1, 2, logprobs=True))
    journal.remainder()
    deliver(journal, delta(3, logprobs=True))
    last = end([1, 2, 3], logprobs=[TokenLogprob(token_id=3, logprob=-1.0)], cumulative_logprob=-1.0)
    whole = journal.end(last, ttft_s=0.5)
    assert [entry.token_id for entry in whole.outputs[0].logprobs or ()] == [1, 2, 3]
    assert whole.outputs[0].cumulative_logprob == -3.0
    assert whole.metrics.ttft_ms == 500


def test_another_answer_than_the_one_delivered_is_refused() -> None:
    journal = make()
    journal.start(start())
    deliver(journal, delta(1, 2))
    journal.remainder()
    with pytest.raises(InternalError, match="made another answer than the one delivered"):
        journal.end(end([1, 9]))


def test_a_broken_end_holds_what_was_delivered() -> None:
    journal = make()
    journal.start(start())
    deliver(journal, delta(4, index=1))
    broken = journal.broken_end(UnavailableError("no engine"), FinishReason.ERROR, "e")
    assert [(output.index, output.token_ids, output.text) for output in broken.outputs] == [(0, [], ""), (1, [4], "4 ")]
    assert broken.error is not None
    assert broken.usage.completion_tokens == 1
    assert broken.usage.prompt_tokens == 3
