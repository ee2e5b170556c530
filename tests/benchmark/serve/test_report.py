from __future__ import annotations

import pytest

from sagellm_benchmark.serve.drive import Outcome, Run
from sagellm_benchmark.serve.report import Objectives, describe, each_request
from sagellm_protocol import InvalidArgumentError


def outcome(sent_at: float, *arrivals: float, end: float, num_output: int) -> Outcome:
    return Outcome(sent_at, sent_at, list(arrivals), end, num_prompt_tokens=10, num_output_tokens=num_output)


def failed(kind: str, message: str) -> Outcome:
    return Outcome(0.0, 0.0, ended_at=0.5, error=kind, message=message)


FAST = outcome(0.0, 0.1, 0.2, 0.3, end=0.3, num_output=5)  # ttft 100 ms, tpot 50 ms, messages 100 ms apart
SLOW = outcome(1.0, 1.4, 2.0, end=2.0, num_output=2)  # ttft 400 ms, tpot 600 ms
SINGLE = outcome(1.0, 1.1, end=1.1, num_output=1)


def test_figures_by_their_definitions() -> None:
    figures = describe(Run([FAST, SLOW], 2.0, 2), Objectives())
    assert figures["requests_per_second"] == 1.0
    assert figures["output_tokens_per_second"] == 3.5
    assert figures["total_tokens_per_second"] == 13.5
    assert figures["ttft_ms"]["mean"] == pytest.approx(250)
    assert figures["tpot_ms"]["max"] == pytest.approx(600)
    assert figures["tpot_ms"]["min"] == pytest.approx(50)
    assert figures["itl_ms"]["p50"] == pytest.approx(100)
    assert figures["latency_ms"]["p50"] == pytest.approx(650)
    assert figures["goodput"] is None


def test_goodput_counts_who_met_every_objective() -> None:
    run = Run([FAST, SLOW, SINGLE, failed("timeout", "")], 2.0, 2)

    def met(**objectives: float) -> float:
        return describe(run, Objectives(**objectives))["goodput"]["attainment"] * 4

    assert met(ttft_ms=200) == 2
    assert met(ttft_ms=500) == 3
    assert met(tpot_ms=100) == 2  # a single token has no time per token to miss
    assert met(ttft_ms=500, tpot_ms=700, latency_ms=400) == 2
    assert describe(run, Objectives(ttft_ms=200))["goodput"]["requests_per_second"] == 1.0


def test_failures_are_counted_by_kind_and_stand_in_no_latency() -> None:
    wrong = [failed("status 400 invalid_argument", "too long")] * 2 + [failed("timeout", "late")]
    figures = describe(Run([FAST, *wrong], 1.0, 2), Objectives())
    assert figures["num_failed"] == 3
    assert figures["requests_per_second"] == 1.0
    assert figures["latency_ms"]["max"] == pytest.approx(300)
    assert figures["errors"] == [
        {"kind": "status 400 invalid_argument", "count": 2, "messages": ["too long"]},
        {"kind": "timeout", "count": 1, "messages": ["late"]},
    ]


def test_where_nothing_was_answered_there_are_no_latencies() -> None:
    figures = describe(Run([failed("timeout", "")], 1.0, 1), Objectives(ttft_ms=1))
    assert figures["ttft_ms"] is None
    assert figures["goodput"]["attainment"] == 0


def test_lateness_is_what_sending_was_behind() -> None:
    late = Outcome(1.0, 1.25, [1.5], 1.5, 1, 1)
    assert describe(Run([late], 1.0, 1), Objectives())["late_ms_p99"] == pytest.approx(250)


def test_each_request_is_plain() -> None:
    assert each_request(Run([SINGLE], 1.0, 1))[0]["arrivals"] == [1.1]


def test_objectives_are_above_0() -> None:
    with pytest.raises(InvalidArgumentError, match="ttft_ms"):
        Objectives(ttft_ms=0)
