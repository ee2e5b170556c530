"""The scheduler's promises: a request's tokens never depend on company, chunks, hits or preemption."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_executor import FakeExecutor, expected_tokens
from sagellm_core.config import LLMEngineConfig
from sagellm_core.engine_core.engine_core import EngineCore
from sagellm_core.engine_core.types import EngineCoreOutput, EngineCoreRequest
from sagellm_protocol import BatchType, FinishReason, InvalidArgumentError, ResourceExhaustedError, SamplingParams


def make_core(
    num_blocks: int = 64, block_size: int = 4, fail_on: frozenset[int] = frozenset(), **options: object
) -> tuple[EngineCore, FakeExecutor]:
    executor = FakeExecutor(num_blocks, block_size, fail_on)
    fields = {"model_path": "fake", "max_model_len": 64, "max_batch_size": 8, **options}
    ticks = itertools.count()
    return EngineCore(LLMEngineConfig.model_validate(fields), executor, clock=lambda: next(ticks) * 1e-3), executor


def make_request(
    request_id: str,
    prompt: Sequence[int],
    max_tokens: int = 4,
    arrival: float = 0.0,
    priority: int = 0,
    **fields: object,
) -> EngineCoreRequest:
    sampling = SamplingParams.model_validate({"max_tokens": max_tokens, "ignore_eos": True, **fields})
    return EngineCoreRequest(request_id, list(prompt), sampling, arrival_time=arrival, priority=priority)


def run(core: EngineCore, limit: int = 2000) -> dict[str, list[EngineCoreOutput]]:
    """Step until nothing is left; all outputs by request."""
    outputs: dict[str, list[EngineCoreOutput]] = {}
    for _ in range(limit):
        if not core.has_work:
            core.kv_cache.check_integrity()
            assert core.kv_cache.num_free_blocks == core.kv_cache.num_blocks, "blocks leaked"
            return outputs
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
    raise AssertionError(f"still working after {limit} steps")


def tokens(outputs: list[EngineCoreOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.new_token_ids]


def test_one_request_gets_its_tokens_and_ends_by_length() -> None:
    core, executor = make_core()
    core.add_request(make_request("a", range(10), max_tokens=6))
    outputs = run(core)["a"]
    assert tokens(outputs) == expected_tokens(range(10), 6)
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert [step.batch_type for step in executor.steps] == [BatchType.PREFILL] + [BatchType.DECODE] * 5


def test_prompts_are_chunked_and_decodes_do_not_wait_behind_them() -> None:
    core, executor = make_core(prefill_chunk_size=8, max_num_batched_tokens=8)
    core.add_request(make_request("short", [1, 2], max_tokens=10))
    core.step()
    core.add_request(make_request("long", range(30), max_tokens=2, arrival=1.0))
    outputs = run(core)
    assert tokens(outputs["long"]) == expected_tokens(range(30), 2)
    mixed = [step for step in executor.steps if step.batch_type is BatchType.MIXED]
    assert mixed
    assert all(step.num_scheduled_tokens <= 8 for step in executor.steps)
    assert all(step.num_decodes == 1 for step in mixed)  # the short request got its token in each of them


def test_without_chunked_prefill_a_prompt_is_computed_in_one_step() -> None:
    core, executor = make_core(enable_chunked_prefill=False, max_num_batched_tokens=4)
    core.add_request(make_request("a", range(40), max_tokens=2))
    assert tokens(run(core)["a"]) == expected_tokens(range(40), 2)
    assert executor.steps[0].num_scheduled_tokens == 40


def test_a_shared_prefix_is_computed_once() -> None:
    core, executor = make_core()
    core.add_request(make_request("a", [*range(16), 1]))
    run(core)
    core.add_request(make_request("b", [*range(16), 2]))
    last = run(core)["b"][-1]
    assert last.num_cached_tokens == 16
    assert executor.steps[4].num_scheduled_tokens == 1
    assert core.stats().prefix_hit_tokens == 16


def test_a_repeated_prompt_still_computes_its_last_token() -> None:
    core, _ = make_core()
    for name in ("a", "b"):
        core.add_request(make_request(name, range(16)))
        outputs = run(core)
        assert tokens(outputs[name]) == expected_tokens(range(16), 4)
    assert outputs["b"][-1].num_cached_tokens == 12


def test_preemption_recomputes_and_changes_nothing() -> None:
    core, _ = make_core(num_blocks=16, enable_prefix_caching=False)
    for i in range(4):
        core.add_request(make_request(f"r{i}", [i] * 8, max_tokens=24, arrival=float(i)))
    outputs = run(core)
    assert core.scheduler.num_preemptions > 0
    for i in range(4):
        assert tokens(outputs[f"r{i}"]) == expected_tokens([i] * 8, 24)
    assert outputs["r0"][-1].metrics is not None
    assert outputs["r0"][-1].metrics.num_preemptions == 0  # the first to come is the last to give way


def test_a_request_aborted_while_preempted_tells_the_most_it_held() -> None:
    core, _ = make_core(num_blocks=8, max_model_len=32)
    for i in range(2):
        core.add_request(make_request(f"r{i}", range(i, i + 12), max_tokens=20, arrival=i))
    while core.scheduler.num_preemptions == 0:
        core.step()
    output = core.abort_request("r1")
    assert output is not None
    assert output.metrics is not None
    assert output.metrics.kv_used_tokens == 16  # the cache was full with 16 tokens, 4 blocks, of either
    assert output.metrics.kv_used_bytes == 4 * 4 * 8
    run(core)


def test_priority_goes_first_and_gives_way_last() -> None:
    core, executor = make_core(scheduling_policy="priority", max_batch_size=1)
    core.add_request(make_request("later", [1], priority=5, arrival=0.0))
    core.add_request(make_request("urgent", [2], priority=-1, arrival=1.0))
    run(core)
    order = [step.scheduled[0].request_id for step in executor.steps]
    assert order == ["urgent"] * 4 + ["later"] * 4


@pytest.mark.parametrize(
    ("fields", "count", "reason"),
    [
        ({"stop_token_ids": [expected_tokens(range(5), 3)[2]]}, 3, expected_tokens(range(5), 3)[2]),
        ({"stop_token_ids": [expected_tokens(range(5), 3)[2]], "min_tokens": 4}, 8, None),
    ],
)
def test_stop_tokens_and_min_tokens(fields: dict[str, object], count: int, reason: int | None) -> None:
    assert len(set(expected_tokens(range(5), 8))) == 8
    core, _ = make_core()
    core.add_request(make_request("a", range(5), max_tokens=8, **fields))
    outputs = run(core)["a"]
    assert tokens(outputs) == expected_tokens(range(5), count)
    assert outputs[-1].stop_reason == reason


def test_a_request_ends_at_max_model_len() -> None:
    core, _ = make_core()
    core.add_request(make_request("a", range(60), max_tokens=50))
    outputs = run(core)["a"]
    assert len(tokens(outputs)) == 4
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_bad_requests_are_refused_and_disturb_nobody() -> None:
    core, _ = make_core(max_num_waiting=2)
    core.add_request(make_request("a", range(5)))
    with pytest.raises(InvalidArgumentError, match="64 tokens"):
        core.add_request(make_request("long", range(64)))
    with pytest.raises(InvalidArgumentError, match="fresh id"):
        core.add_request(make_request("a", range(5)))
    core.add_request(make_request("b", range(5)))
    with pytest.raises(ResourceExhaustedError, match="max_num_waiting"):
        core.add_request(make_request("c", range(5)))
    assert set(run(core)) == {"a", "b"}


def test_a_failing_step_ends_its_own_requests_only() -> None:
    core, _ = make_core(fail_on=frozenset({2}), max_batch_size=1)
    core.add_request(make_request("hit", range(5), arrival=0.0))
    core.add_request(make_request("spared", range(6), arrival=1.0))
    outputs = run(core)
    assert outputs["hit"][-1].finish_reason is FinishReason.ERROR
    assert outputs["hit"][-1].error is not None
    assert "the fake device broke" in outputs["hit"][-1].error.message
    assert tokens(outputs["spared"]) == expected_tokens(range(6), 4)


def test_aborting_frees_the_blocks_at_once() -> None:
    core, _ = make_core()
    core.add_request(make_request("a", range(40), max_tokens=20))
    core.step()
    assert core.kv_cache.num_free_blocks < core.kv_cache.num_blocks
    output = core.abort_request("a")
    assert output is not None
    assert output.finish_reason is FinishReason.ABORT
    assert core.kv_cache.num_free_blocks == core.kv_cache.num_blocks
    assert core.abort_request("a") is None
    assert not core.has_work


PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=30)
WORKLOADS = st.lists(
    st.tuples(PROMPTS, st.integers(1, 12), st.integers(0, 6), st.integers(0, 1), st.booleans()), min_size=1, max_size=10
)


@settings(max_examples=150, deadline=None)
@given(
    workload=WORKLOADS,
    num_blocks=st.integers(11, 40),
    block_size=st.sampled_from([4, 8]),
    budget=st.integers(1, 40),
    chunk=st.one_of(st.none(), st.integers(1, 20)),
    caching=st.booleans(),
    policy=st.sampled_from(["fcfs", "priority"]),
)
def test_tokens_do_not_depend_on_batching(
    workload: list[tuple[list[int], int, int, int, bool]],
    num_blocks: int,
    block_size: int,
    budget: int,
    chunk: int | None,
    caching: bool,
    policy: str,
) -> None:
    core, _ = make_core(
        num_blocks,
        block_size,
        max_model_len=44,
        max_batch_size=4,
        max_num_batched_tokens=budget,
        enable_chunked_prefill=chunk is not None,
        prefill_chunk_size=chunk or 1,
        enable_prefix_caching=caching,
        scheduling_policy=policy,
    )
    outputs: dict[str, list[EngineCoreOutput]] = {}
    for step_number in range(3000):
        for i, (prompt, max_tokens, arrival, priority, aborted) in enumerate(workload):
            if step_number == arrival:
                core.add_request(make_request(str(i), prompt, max_tokens, float(arrival), priority))
            if aborted and step_number == arrival + 3:
                core.abort_request(str(i))
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
        core.kv_cache.check_integrity()
        if step_number > 10 and not core.has_work:
            break
    assert not core.has_work
    assert core.kv_cache.num_free_blocks == core.kv_cache.num_blocks
    for i, (prompt, max_tokens, _, _, aborted) in enumerate(workload):
        got = tokens(outputs.get(str(i), []))
        expected = expected_tokens(prompt, max_tokens)
        assert got == expected[: len(got)]
        assert aborted or len(got) == max_tokens
