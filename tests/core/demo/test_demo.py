"""Scenarios and the demo's configuration files."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from fake_engine import FakeEngine
from sagellm_core import load_config
from sagellm_core.demo import Scenario, run_scenarios, write_results
from sagellm_protocol import InvalidArgumentError, Metrics, NotFoundError, Request, Response, SamplingParams

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


class GeneratingEngine(FakeEngine):
    """Counts how many requests run together."""

    max_together = 0

    async def generate(self, prompt: Any, *, sampling_params: SamplingParams) -> Response:
        answering = asyncio.ensure_future(self.execute(Request(prompt=prompt, sampling_params=sampling_params)))
        await asyncio.sleep(0)
        self.max_together = max(self.max_together, len(self.running))
        return await answering


async def run(engine: GeneratingEngine, *scenarios: Scenario) -> dict[str, Any]:
    await engine.start()
    return await run_scenarios(engine, scenarios)  # type: ignore[arg-type]


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_scenarios_keep_to_their_concurrency(concurrency: int) -> None:
    engine = GeneratingEngine()
    scenario = Scenario("s", ["a"] * 9, SamplingParams(max_tokens=5), concurrency)
    await run(engine, scenario)
    assert engine.max_together == concurrency


async def test_results_hold_every_request_and_their_aggregate() -> None:
    done: list[str] = []
    engine = GeneratingEngine()
    await engine.start()
    results = await run_scenarios(
        engine,  # type: ignore[arg-type]
        [
            Scenario("good", ["a b", [1, 2, 3]], SamplingParams(max_tokens=4)),
            Scenario("bad", ["fail", "a"], SamplingParams(max_tokens=2), 2),
        ],
        on_done=lambda result: done.append(result["name"]),
    )
    assert done == ["good", "bad"]
    assert json.loads(json.dumps(results)) == results
    good, bad = results["scenarios"]
    assert (good["num_requests"], good["num_prompt_tokens"], good["num_output_tokens"]) == (2, 5, 8)
    assert good["output_tokens_per_second"] == pytest.approx(8 / good["duration_s"])
    assert bad["metrics"]["error_rate"] == 0.5
    assert bad["requests"][0]["error"]["message"] == "the fake broke"
    for request in good["requests"]:
        Metrics.model_validate(request["metrics"])


async def test_a_wrong_request_ends_the_run() -> None:
    with pytest.raises(InvalidArgumentError, match="refused"):
        await run(GeneratingEngine(), Scenario("s", ["a", "refuse"]))


def test_results_go_where_they_can(tmp_path: Path) -> None:
    write_results({"a": "é"}, tmp_path / "m.json")
    assert json.loads((tmp_path / "m.json").read_text(encoding="utf-8")) == {"a": "é"}
    with pytest.raises(InvalidArgumentError, match=r"cannot write .*; choose another output"):
        write_results({}, tmp_path / "no" / "m.json")


@pytest.mark.parametrize(("name", "kind"), [("config_cpu.yaml", "cpu"), ("config_cuda.yaml", "cuda")])
def test_the_examples_are_valid(name: str, kind: str) -> None:
    config = load_config(EXAMPLES / name)
    assert config.engine.backend_type == kind
    assert len(config.prompts) > 1
    assert config.output == "metrics.json"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("engine: {}", "engine.model_path is required"),
        ("engine: {model_path: builtin}\nprompt: [x]", "'prompt' is not a field .*did you mean 'prompts'"),
        ("engine: {model_path: builtin}\nsampling: {temperature: -1}", "temperature must be >= 0"),
        ("- 1", "must hold a mapping"),
        ("a: [", "neither valid YAML nor JSON"),
    ],
)
def test_configuration_errors_name_file_and_field(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "demo.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        load_config(file)
    assert str(file) in caught.value.message


def test_a_configuration_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no configuration file"):
        load_config(tmp_path / "none.yaml")


def test_json_is_a_configuration_too(tmp_path: Path) -> None:
    file = tmp_path / "demo.json"
    file.write_text(json.dumps({"engine": {"model_path": "builtin"}, "concurrency": 2}), encoding="utf-8")
    assert load_config(file).concurrency == 2
