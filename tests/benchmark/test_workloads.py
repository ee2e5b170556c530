"""Workloads: names, files, prompts of exact lengths."""

from __future__ import annotations

from pathlib import Path

import pytest

from sagellm_benchmark import WORKLOADS, ScenarioSpec, Workload, build_scenario, load_workload
from sagellm_core.models import resolve_model
from sagellm_core.tokenizer import Tokenizer, load_tokenizer
from sagellm_protocol import InvalidArgumentError, NotFoundError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(resolve_model("builtin"))


def test_year1_is_what_was_agreed() -> None:
    specs = load_workload("year1").scenarios
    assert [(s.name, s.num_requests, s.prompt_tokens, s.output_tokens, s.concurrency) for s in specs] == [
        ("short", 5, 128, 128, 1),
        ("long", 3, 200, 200, 1),
        ("stress", 10, 256, 256, 10),
    ]
    assert set(WORKLOADS) == {"year1", "short", "long", "stress"}


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 128, 5000])
def test_prompts_have_exactly_the_length_and_differ(tokenizer: Tokenizer, num_tokens: int) -> None:
    spec = ScenarioSpec(name="s", num_requests=12, prompt_tokens=num_tokens, output_tokens=9, concurrency=4)
    scenario = build_scenario(spec, tokenizer)
    assert [len(prompt) for prompt in scenario.prompts] == [num_tokens] * 12
    assert scenario == build_scenario(spec, tokenizer)
    assert scenario.concurrency == 4
    assert scenario.sampling.max_tokens == 9
    assert scenario.sampling.ignore_eos
    if num_tokens > 4:
        other = build_scenario(spec.model_copy(update={"name": "other"}), tokenizer)
        heads = {tuple(prompt[:4]) for prompt in (*scenario.prompts, *other.prompts)}
        assert len(heads) == 24, "a prefix cache finds nothing"
    assert not tokenizer.special_token_ids & {token_id for prompt in scenario.prompts for token_id in prompt}


def test_a_workload_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "w.yaml"
    file.write_text(
        "name: mine\nscenarios:\n  - {name: a, num_requests: 2, prompt_tokens: 3, output_tokens: 4}\n"
        "  - {name: b, num_requests: 1, prompt_tokens: 3, output_tokens: 4, concurrency: 2}\n",
        encoding="utf-8",
    )
    workload = load_workload(str(file))
    assert workload.name == "mine"
    assert [spec.concurrency for spec in workload.scenarios] == [1, 2]
    assert Workload.model_validate(workload.model_dump()) == workload


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nscenarios: []", "scenarios must not be empty"),
        ("name: x\nscenarios: [{name: a, num_requests: 0, prompt_tokens: 1, output_tokens: 1}]", "num_requests"),
        ("name: x\nscenarios: [{name: a}]", "is required"),
        ("{", "cannot be read as YAML"),
        ("", "workload"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "w.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        load_workload(str(file))
    assert str(file) in caught.value.message


def test_an_unknown_workload_lists_the_known_ones() -> None:
    with pytest.raises(NotFoundError, match=r"neither a workload \(year1, short, long, stress\) nor a YAML file"):
        load_workload("year2")
