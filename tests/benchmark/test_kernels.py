from __future__ import annotations

import json

import pytest
import torch

from sagellm_backend import QuantizedTensor, get_provider
from sagellm_backend.ops import OP_NAMES
from sagellm_benchmark.kernel_cases import FORMATS, build_groups, make_weight, stored_bytes
from sagellm_benchmark.kernels import measure_kernels, plan_kernels, time_in_turns
from sagellm_benchmark.machine import Limits, measure_limits
from sagellm_benchmark.shapes import SHAPES, ModelShape, find_shape
from sagellm_protocol import InvalidArgumentError, NotFoundError

TINY = ModelShape(64, 4, 2, 16, 96, 256)
LIMITS = Limits(1e9, {"float32": 1e9, "bfloat16": 1e9, "int8": 1e9})


def test_every_op_has_cases() -> None:
    measured = {group.op for group in build_groups(TINY, ["bf16"], [1, 8])}
    # What has no cost of its own to speak of, or is measured as part of sampling.
    assert set(OP_NAMES) - measured <= {"quantize_linear", "sample_tokens"}


@pytest.mark.parametrize("native", [True, False])
def test_every_case_runs(native: bool) -> None:
    ops = get_provider("cpu", native=native).ops
    for group in build_groups(TINY, FORMATS, [1, 3]):
        if group.op == "paged_attention" and "16384" in group.cases[0].label:
            continue  # slow, and no other code than shorter contexts
        calls = group.bind(ops)
        assert len(calls) == len(group.cases)
        for call in calls:
            call(0)
            call(1)


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_those_of_the_packed_weight(name: str) -> None:
    weight = make_weight(64, 128, name)
    packed = get_provider("cpu").ops.pack_linear(weight)
    if isinstance(weight, QuantizedTensor) and packed.format != weight.format:
        pytest.skip("kept in a wider format")
    assert packed.nbytes == pytest.approx(stored_bytes(64, 128, name), rel=0.35 if name == "q5_k" else 1e-9)


def test_the_lm_head_is_measured_for_sampled_rows_only() -> None:
    labels = [case.label for group in build_groups(TINY, ["bf16"], [1, 512]) for case in group.cases]
    assert [label for label in labels if label.startswith("lm_head")] == ["lm_head 256x64 bf16, 1 rows"]


def test_report() -> None:
    threads = torch.get_num_threads()
    plan = plan_kernels("builtin", ops=["linear", "rms_norm"], formats=["int8"], rows=[1])
    seen: list[str] = []
    report = measure_kernels(plan, seconds=0.001, on_case=seen.append, limits=LIMITS)
    data = json.loads(json.dumps(report.to_json()))
    assert len(seen) == len(data["results"]) == len(plan.cases) == 6
    assert data["num_threads"] == threads
    for result in report.results:
        assert result.seconds > 0
        assert result.source == plan.ops.explain()[result.case.op]
        assert (result.speedup is None) == (result.source == "reference")
    linear = [result for result in report.results if result.case.op == "linear"]
    # A limit is never below what a kernel reached.
    assert report.limits.peak("int8") >= max(result.flops_per_second for result in linear)
    assert report.limits.read_bytes_per_second >= max(result.bytes_per_second for result in linear)


def test_without_the_reference() -> None:
    plan = plan_kernels("builtin", ops=["rms_norm"], rows=[1])
    assert measure_kernels(plan, seconds=0.0, reference=False, limits=LIMITS).results[0].speedup is None


def test_calls_take_turns_and_get_ascending_numbers() -> None:
    first: list[int] = []
    second: list[int] = []
    times = time_in_turns([first.append, second.append], seconds=0.0)
    assert len(times) == 2
    assert first == second == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ops": ["nothing"]}, "no op 'nothing'"),
        ({"formats": ["int3"]}, "unknown format 'int3'"),
        ({"rows": [0]}, "at least 1"),
    ],
)
def test_wrong_plans(arguments: dict[str, list[str]], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        plan_kernels("builtin", **arguments)  # type: ignore[arg-type]


def test_shapes() -> None:
    assert find_shape("0.5b") is SHAPES["0.5b"]
    assert SHAPES["0.5b"].matrices()["qkv"] == (1152, 896)
    assert find_shape("builtin").vocab_size == 4096
    with pytest.raises(NotFoundError):
        find_shape("./no-such-model")


def test_limits_of_this_machine() -> None:
    limits = measure_limits(get_provider("cpu").ops)
    assert limits.read_bytes_per_second > 1e8
    assert all(rate > 1e8 for rate in limits.flops_per_second.values())
    assert limits.raised(read=1e15).read_bytes_per_second == 1e15
