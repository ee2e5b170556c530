"""The policy of docs/scheduler.md works as it stands there, and the page's table says what the configuration has."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_executor import FakeExecutor, expected_tokens
from sagellm_core.config import LLMEngineConfig
from sagellm_core.engine_core.engine_core import EngineCore
from sagellm_core.engine_core.policy import POLICIES
from sagellm_core.engine_core.types import EngineCoreRequest
from sagellm_protocol import SamplingParams

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "scheduler.md").read_text(encoding="utf-8")
PROMPTS = {"long": list(range(20)), "middle": list(range(9)), "short": [1, 2]}


@pytest.fixture
def policy() -> Iterator[str]:
    """The name under which the page's class is registered, for the time of a test."""
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    used = re.search(r'scheduling_policy="(\w+)"', PAGE)
    assert code
    assert used
    with pytest.MonkeyPatch.context() as patch:
        for name in list(POLICIES):
            patch.setitem(POLICIES, name, POLICIES[name])
        exec(compile(code[1], "docs/scheduler.md", "exec"), {"__name__": "docs_scheduler"})
        yield used[1]
        POLICIES.pop(used[1])


def serve_one_by_one(scheduling_policy: str) -> tuple[list[str], dict[str, list[int]]]:
    """The order in which requests that came at once were served by a batch of one, and their tokens."""
    executor = FakeExecutor(num_blocks=32, block_size=4)
    ticks = itertools.count()
    fields = {"model_path": "fake", "max_model_len": 64, "max_batch_size": 1, "scheduling_policy": scheduling_policy}
    core = EngineCore(LLMEngineConfig.model_validate(fields), executor, clock=lambda: next(ticks) * 1e-3)
    for name, prompt in PROMPTS.items():
        core.add_request(EngineCoreRequest(name, prompt, SamplingParams(max_tokens=3, ignore_eos=True)))
    tokens: dict[str, list[int]] = {name: [] for name in PROMPTS}
    while core.has_work:
        for output in core.step():
            tokens[output.request_id] += output.new_token_ids
    order = [step.scheduled[0].request_id for step in executor.steps]
    return list(dict.fromkeys(order)), tokens


def test_the_policy_orders_requests_and_changes_no_token(policy: str) -> None:
    order, tokens = serve_one_by_one(policy)
    assert order == ["short", "middle", "long"]
    assert serve_one_by_one("fcfs")[0] == ["long", "middle", "short"]
    assert tokens == {name: expected_tokens(prompt, 3) for name, prompt in PROMPTS.items()}


def test_the_table_gives_the_defaults() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", PAGE, flags=re.MULTILINE)
    shown = {True: "on", False: "off"}
    fields = LLMEngineConfig.model_fields
    assert rows
    for name, default in rows:
        value = fields[name].default
        assert default == (shown[value] if isinstance(value, bool) else str(value)), name
