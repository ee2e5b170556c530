"""When an engine is doubted, and when it is lost."""

from __future__ import annotations

import random

import pytest

from sagellm_control_plane.health import HealthWatch
from sagellm_control_plane.lifecycle_config import LifecycleConfig
from sagellm_control_plane.restarts import Restarts

CONFIG = LifecycleConfig(hang_timeout_s=10, stall_timeout_s=60, probe_interval_s=2, probes_to_lose=2)


@pytest.fixture
def health() -> HealthWatch:
    watch = HealthWatch(CONFIG, random.Random(1))
    watch.begin(0)
    return watch


def test_silence_alone_is_doubt_and_unanswered_checks_make_it_certain(health: HealthWatch) -> None:
    assert health.look(4.9) is None
    assert not health.is_doubted
    assert health.look(5) is None
    assert health.is_doubted
    assert health.look(50) is None, "nobody has asked it yet"
    health.probed(50, None)
    assert health.look(51) is None
    health.probed(52, None)
    assert "no sign of life for 53.0 s" in (health.look(53) or "")


def test_checks_that_fail_are_forgiven_before_the_time_is_over(health: HealthWatch) -> None:
    health.probed(3, None)
    health.probed(6, None)
    assert health.look(9) is None
    health.report(9.5, num_steps=1, has_work=True)
    assert health.look(19) is None, "the count of failed checks began anew"


def test_trust_comes_back_after_several_signs(health: HealthWatch) -> None:
    health.look(6)
    health.report(6.5, num_steps=0, has_work=False)
    assert health.is_doubted
    health.look(12)
    assert health.is_doubted, "silent again: the signs are counted anew"
    health.report(12.1, num_steps=0, has_work=False)
    health.probed(12.2, True)
    assert not health.is_doubted


def test_work_without_steps_is_a_hang(health: HealthWatch) -> None:
    for second in range(100):
        health.report(second, num_steps=7, has_work=False)
        assert health.look(second) is None, "without work there are no steps"
    for second in range(100, 159):
        health.report(second, num_steps=7, has_work=True)
        assert health.look(second) is None
    health.report(159, num_steps=8, has_work=True)
    assert health.look(218.9) is None
    reason = health.look(219)
    assert reason is not None
    assert "no step for 60.0 s" in reason


def test_a_denial_counts_without_silence(health: HealthWatch) -> None:
    health.report(1, num_steps=0, has_work=False)
    health.probed(1, False)
    assert health.look(1) is None
    health.report(2, num_steps=0, has_work=False)
    health.probed(3, False)
    assert "says that it does not work" in (health.look(3) or "")


def test_checks_are_jittered_and_only_for_the_silent(health: HealthWatch) -> None:
    delays = set()
    for second in range(50):
        health.report(second, num_steps=second, has_work=True)
        assert not health.is_probe_due(second + 1.59)
        assert health.is_probe_due(second + 2.41)
        delays.add(next(step for step in range(160, 241) if health.is_probe_due(second + step / 100)))
    assert len(delays) > 20
    health.ask(51)
    assert health.is_probe_due(51)


def test_the_watchers_own_absence_is_no_silence(health: HealthWatch) -> None:
    health.probed(1, None)
    health.probed(2, None)
    health.excuse(100)
    assert health.look(104.9) is None
    assert not health.is_doubted
    assert not health.is_probe_due(103)


def test_pauses_double_up_to_a_limit_and_end_in_a_crash_loop() -> None:
    config = LifecycleConfig(restart_backoff_s=1, max_restart_backoff_s=5, max_restarts=5)
    restarts = Restarts(config, random.Random(1))
    delays = [restarts.next_delay() for _ in range(6)]
    assert delays.pop() is None
    for delay, nominal in zip(delays, (1, 2, 4, 5, 5), strict=True):
        assert delay is not None
        assert 0.8 * nominal <= delay <= 1.2 * nominal
    restarts.forget()
    assert restarts.next_delay() is not None
