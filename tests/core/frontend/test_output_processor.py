"""Events, texts, stop strings and metrics of a sequence, against naive computations over the whole text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sagellm_core.engine_core.types import EngineCoreOutput, EngineCoreRequest, RequestTimings
from sagellm_core.output_processor import OutputProcessor, combine_outputs
from sagellm_core.tokenizer import Tokenizer
from sagellm_protocol.errors import DeadlineExceededError, InternalError
from sagellm_protocol.request import Request
from sagellm_protocol.response import FinishReason, Response
from sagellm_protocol.sampling import SamplingParams
from sagellm_protocol.stream import StreamEventDelta, StreamEventEnd

GetTokenizer = Callable[[str], Tokenizer]
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
PROPERTY = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


class Candidate(NamedTuple):
    token_id: int
    logprob: float
    rank: int


class TokenLogprobs(NamedTuple):
    token_id: int
    logprob: float
    rank: int
    top: tuple[Candidate, ...] = ()


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def make(
    tokenizer: Tokenizer, *, clock: Clock | None = None, core: dict[str, Any] | None = None, **sampling: Any
) -> Any:
    request = Request(prompt="x", request_id="r", trace_id="t", model="m")
    params = SamplingParams(max_tokens=10_000, **sampling)
    fields = {"prompt_token_ids": [1] * 8, "eos_token_ids": frozenset({2}), "arrival_time": 100.0, **(core or {})}
    sequence = EngineCoreRequest(request_id="r", sampling=params, **fields)
    return OutputProcessor(
        request, sequence, tokenizer, engine_id="e", clock=clock or Clock(), epoch=1e9, peak_mem_mb=lambda: 12.0
    )


def output(ids: Sequence[int], reason: FinishReason | None = None, **fields: Any) -> EngineCoreOutput:
    return EngineCoreOutput("r", list(ids), reason, **fields)


def drive(
    processor: OutputProcessor, outputs: Sequence[EngineCoreOutput]
) -> tuple[list[StreamEventDelta], Response, int]:
    """Run the outputs as an engine does; the deltas, the response and how many outputs were read before the end.

    Checks the grammar of the stream on the way.
    """
    events: list[Any] = [processor.start()]
    num_read = 0
    for number, item in enumerate(outputs, start=1):
        events += processor.add(item)
        if processor.finished and not num_read:
            num_read = number
    kinds = [event.event for event in events]
    assert kinds == ["start", *["delta"] * (len(kinds) - 2), "end"]
    assert {(event.request_id, event.trace_id, event.engine_id) for event in events} == {("r", "t", "e")}
    assert events[0].prompt_tokens == 8
    end, response = events[-1], processor.response()
    assert isinstance(end, StreamEventEnd)
    assert end.to_response().model_copy(update={"model": "m"}) == response.model_copy(
        update={"logprobs": end.to_response().logprobs, "prompt_logprobs": None}
    )
    deltas = events[1:-1]
    assert "".join(delta.chunk for delta in deltas) == response.output_text
    assert [token_id for delta in deltas for token_id in delta.chunk_tokens] == response.output_tokens
    return deltas, response, num_read


def split(ids: Sequence[int], cuts: Sequence[int], reason: FinishReason) -> list[EngineCoreOutput]:
    """Outputs of at least one token each; the last one finished."""
    pieces, start = [], 0
    for size in cuts:
        if start + size >= len(ids):
            break
        pieces.append(list(ids[start : start + size]))
        start += size
    return [*(output(piece) for piece in pieces), output(ids[start:], reason)]


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
@given(data=st.data())
@PROPERTY
def test_without_stop_strings_the_text_is_decode(
    tokenizers_by_name: GetTokenizer, name: str, data: st.DataObject
) -> None:
    tokenizer = tokenizers_by_name(name)
    ids = data.draw(st.lists(st.integers(3, tokenizer.vocab_size - 1), min_size=1, max_size=40))
    cuts = data.draw(st.lists(st.integers(1, 4), max_size=40))
    deltas, response, _ = drive(make(tokenizer), split(ids, cuts, LENGTH))
    assert response.output_text == tokenizer.decode(ids)
    assert response.output_tokens == ids
    assert response.finish_reason is LENGTH
    text = tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in delta.chunk for delta in deltas)


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
@given(data=st.data())
@PROPERTY
def test_stop_strings_equal_naive_search(tokenizers_by_name: GetTokenizer, name: str, data: st.DataObject) -> None:
    """Over any split into tokens and outputs: the text up to the first stop string complete, and no token too many."""
    tokenizer = tokenizers_by_name(name)
    text = data.draw(st.text(alphabet="ab 好é", min_size=1, max_size=30))
    pieces = data.draw(st.lists(st.integers(1, 6), max_size=10))
    # Encoding piece by piece gives splits that encoding the whole never would.
    parts = [text[sum(pieces[:i]) : sum(pieces[: i + 1])] for i in range(len(pieces))] + [text[sum(pieces) :]]
    ids = [token_id for part in parts for token_id in tokenizer.encode(part, add_special_tokens=False)]
    if not ids:
        return
    stops = data.draw(st.lists(st.text(alphabet="ab 好é", min_size=1, max_size=4), min_size=1, max_size=3))
    keep = data.draw(st.booleans())
    cuts = data.draw(st.lists(st.integers(1, 3), max_size=40))
    processor = make(tokenizer, stop=stops, include_stop_str_in_output=keep)
    _, response, _ = drive(processor, split(ids, cuts, LENGTH))

    whole = tokenizer.decode(ids)
    ends = sorted((whole.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in whole)
    if not ends:
        assert (response.output_text, response.output_tokens) == (whole, ids)
        assert (response.finish_reason, response.stop_reason) == (LENGTH, None)
        return
    end, _, stop = ends[0]
    assert response.output_text == whole[: end if keep else end - len(stop)]
    assert (response.finish_reason, response.stop_reason) == (STOP, stop)
    assert response.output_tokens == ids[: len(response.output_tokens)]
    assert stop in tokenizer.decode(response.output_tokens)
    if name == "byte_level":  # with byte fallback a run of bytes is text only when it has ended
        assert stop not in tokenizer.decode(response.output_tokens[:-1])


def test_a_stop_string_ends_the_request_before_the_engine_does(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("one. two. three.")
    _, response, num_read = drive(make(byte_level, stop="two"), [*map(output, zip(ids)), output([], LENGTH)])
    assert response.output_text == "one. "
    assert num_read < len(ids)
    assert len(response.output_tokens) == num_read
    assert response.usage.completion_tokens == num_read


def test_text_that_may_become_a_stop_string_waits(byte_level: Tokenizer) -> None:
    processor = make(byte_level, stop="END")
    chunks = []
    for char in "an EN or E":
        chunks += [event.chunk for event in processor.add(output(byte_level.encode(char)))]
    assert "".join(chunks) == "an EN or "
    assert "".join(e.chunk for e in processor.add(output([], LENGTH)) if isinstance(e, StreamEventDelta)) == "E"


def test_stop_strings_respect_min_tokens(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a a a a")
    assert len(ids) == 4
    _, response, _ = drive(make(byte_level, stop="a", min_tokens=3), [*map(output, zip(ids)), output([], LENGTH)])
    assert (response.output_text, response.output_tokens) == ("a a ", ids[:3])


@pytest.mark.parametrize("stop", [None, "unseen"])
def test_the_token_that_ends_gives_no_text(byte_level: Tokenizer, stop: str | None) -> None:
    word, end = byte_level.encode("hi"), byte_level.encode("!")
    outputs = [output(word), output(end, STOP, stop_reason=end[0])]
    _, response, _ = drive(make(byte_level, stop=stop, stop_token_ids=end), outputs)
    assert (response.output_text, response.output_tokens) == ("hi", [*word, *end])
    assert (response.finish_reason, response.stop_reason) == (STOP, end[0])
    _, response, _ = drive(make(byte_level, stop=stop, stop_token_ids=end, include_stop_str_in_output=True), outputs)
    assert response.output_text == "hi!"
    _, response, _ = drive(make(byte_level, stop=stop, skip_special_tokens=False), [output(word), output([2], STOP)])
    assert (response.output_text, response.stop_reason) == ("hi", None)
    _, response, _ = drive(make(byte_level, ignore_eos=True, skip_special_tokens=False), [output([*word, 2], LENGTH)])
    assert response.output_text == "hi<|im_end|>"


def test_an_incomplete_character_comes_at_the_end(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("👋")
    deltas, response, _ = drive(make(byte_level), [*map(output, zip(ids[:-1])), output([], LENGTH)])
    assert response.output_text == "\ufffd" == byte_level.decode(ids[:-1])
    assert [delta.chunk for delta in deltas] == ["", "", "", "\ufffd"]


@pytest.mark.parametrize("ending", ["engine error", "engine abort", "fail", "abort", "deadline"])
def test_errors_and_aborts_end_exactly_once(byte_level: Tokenizer, ending: str) -> None:
    processor = make(byte_level, stop="zz")
    events: list[Any] = processor.add(output(byte_level.encode("fuzz"[:3])))
    error = InternalError("the step failed; see the log")
    if ending == "engine error":
        events += processor.add(output([], FinishReason.ERROR, error=error.to_error()))
    elif ending == "engine abort":
        events += processor.add(output([], FinishReason.ABORT))
    elif ending == "fail":
        events += processor.fail(error)
    elif ending == "abort":
        events += processor.abort()
    else:
        events += processor.abort(DeadlineExceededError("too late"))
    for late in (processor.add(output([5], LENGTH)), processor.abort(), processor.fail(error)):
        assert late == []
    assert [event.event for event in events].count("end") == 1
    assert events[-1].event == "end"
    response = processor.response()
    failed = ending in ("engine error", "fail")
    assert response.finish_reason is (FinishReason.ERROR if failed else FinishReason.ABORT)
    assert (response.error is not None) == (failed or ending == "deadline")
    assert response.metrics.error_rate == float(failed)
    assert response.output_text == "fuz" == "".join(event.chunk for event in events[:-1])


def test_metrics_are_measured(byte_level: Tokenizer) -> None:
    clock = Clock()
    processor = make(byte_level, clock=clock)
    timings = RequestTimings(100.0, 100.02, 100.25, 100.7, evict_count=3, evict_ms=0.5, kv_used_bytes=4096)
    for now, ids, reason in ((100.3, [5], None), (100.4, [6], None), (100.7, [7, 8], None), (100.8, [9], LENGTH)):
        clock.now = now
        fields = {"num_cached_tokens": 4, "kv_used_tokens": 8 + len(ids)}
        processor.add(output(ids, reason, metrics=timings if reason else None, **fields))
    metrics = processor.response().metrics
    assert metrics.ttft_ms == pytest.approx(300)
    assert metrics.itl_list == pytest.approx([100, 300, 0, 100])
    assert metrics.tbt_ms == pytest.approx(125)
    assert metrics.tpot_ms == pytest.approx(500 / 4)
    assert metrics.throughput_tps == pytest.approx(5 / 0.8)
    assert (metrics.prefill_ms, metrics.decode_ms) == pytest.approx((230, 450))
    assert metrics.prefix_hit_rate == 0.5
    assert (metrics.kv_used_tokens, metrics.kv_used_bytes) == (10, 4096)
    assert (metrics.evict_count, metrics.evict_ms, metrics.peak_mem_mb) == (3, 0.5, 12.0)
    assert metrics.error_rate == 0
    stamps = metrics.timestamps
    assert stamps is not None
    assert (stamps.queued_at, stamps.scheduled_at, stamps.executed_at) == (100.0, 100.02, 100.02)
    assert (stamps.first_token_at, stamps.completed_at, stamps.epoch) == (100.3, 100.8, 1e9)
    assert processor.response().usage.cached_tokens == 4


def test_metrics_of_one_token_and_of_none(byte_level: Tokenizer) -> None:
    clock = Clock()
    processor = make(byte_level, clock=clock)
    clock.now = 100.5
    processor.add(output([5], LENGTH))
    metrics = processor.response().metrics
    assert (metrics.ttft_ms, metrics.tpot_ms, metrics.tbt_ms, metrics.itl_list) == (500, 0, 0, [])
    processor = make(byte_level, clock=clock)
    processor.abort()
    metrics = processor.response().metrics
    assert (metrics.ttft_ms, metrics.throughput_tps, metrics.prefill_ms) == (0, 0, 0)
    assert metrics.timestamps is not None
    assert metrics.timestamps.first_token_at is None


def test_logprobs_go_through(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a b")
    entries = [TokenLogprobs(i, -0.5, 2, (Candidate(7, -0.1, 1), Candidate(i, float("-inf"), 2))) for i in ids]
    outputs = [
        output(ids, logprobs=entries, prompt_logprobs=[None, entries[0]]),
        output(byte_level.encode("END"), LENGTH, logprobs=[entries[0]] * 3),
    ]
    deltas, response, _ = drive(make(byte_level, logprobs=2, prompt_logprobs=2), outputs)
    assert response.logprobs is not None
    assert [entry.token_id for entry in response.logprobs[: len(ids)]] == ids
    assert [entry.token for entry in response.logprobs[: len(ids)]] == ["a", " b"]
    assert response.logprobs[0].top[0].model_dump(exclude_none=True) == {
        "token_id": 7,
        "logprob": -0.1,
        "rank": 1,
        "token": byte_level.token_text(7),
    }
    assert response.logprobs[0].top[1].logprob == -9999
    assert [len(delta.logprobs or ()) for delta in deltas] == [len(delta.chunk_tokens) for delta in deltas]
    assert response.prompt_logprobs is not None
    assert response.prompt_logprobs[0] is None
    assert response.prompt_logprobs[1] == response.logprobs[0]
    assert response.outputs[0].cumulative_logprob == pytest.approx(-0.5 * len(response.logprobs))


def test_logprobs_end_with_the_tokens(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a b c")
    entries = [TokenLogprobs(token_id, -1.0, 1) for token_id in ids]
    _, response, _ = drive(make(byte_level, logprobs=0, stop="b"), [output(ids, LENGTH, logprobs=entries)])
    assert response.output_tokens == ids[:2]
    assert len(response.logprobs or ()) == 2


def finished(tokenizer: Tokenizer, index: int, text: str, clock: Clock) -> Response:
    processor = make(tokenizer, clock=clock, core={"choice_index": index})
    start = clock.now
    for token_id in tokenizer.encode(text):
        clock.now += 0.1 * (index + 1)
        for event in processor.add(output([token_id], kv_used_tokens=9)):
            assert event.index == index
    processor.add(output([], LENGTH))
    clock.now = start
    return processor.response()


def test_several_outputs_are_one_response(byte_level: Tokenizer) -> None:
    clock = Clock()
    one, two = (finished(byte_level, index, text, clock) for index, text in enumerate(("a b", "c")))
    response = combine_outputs([one, two])
    assert [(item.index, item.text) for item in response.outputs] == [(0, "a b"), (1, "c")]
    assert (response.output_text, response.request_id, response.finish_reason) == ("a b", "r", LENGTH)
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (8, 3)
    assert response.metrics.ttft_ms == pytest.approx(100)
    assert response.metrics.kv_used_tokens == 18
    assert response.metrics.throughput_tps == pytest.approx(3 / 0.2)
    assert combine_outputs([one]) is one
    assert StreamEventEnd.of(response).to_response().outputs == response.outputs


def test_a_failed_output_fails_the_request(byte_level: Tokenizer) -> None:
    good, bad = make(byte_level), make(byte_level, core={"choice_index": 1})
    good.add(output([5], LENGTH))
    bad.fail(InternalError("the step failed; see the log"))
    response = combine_outputs([good.response(), bad.response()])
    assert response.finish_reason is FinishReason.ERROR
    assert response.error is not None
    assert [item.finish_reason for item in response.outputs] == [LENGTH, FinishReason.ERROR]
    assert response.metrics.error_rate == 0.5
