"""Scenarios against an engine and their metrics as JSON; `python -m sagellm_core.demo --config FILE [--verbose]`.

A `Scenario` is a list of prompts that run with a given concurrency. `run_scenarios` returns plain JSON values: every
request's metrics, and for each scenario their aggregate and the measured throughput.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sagellm_core.command import run_command
from sagellm_core.config import DemoConfig, load_config
from sagellm_protocol import InvalidArgumentError, Metrics, Response, SamplingParams

if TYPE_CHECKING:
    from sagellm_core.llm_engine import LLMEngine


@dataclass(frozen=True, slots=True)
class Scenario:
    """Prompts (texts or token ids) to answer, at most `concurrency` at the same time."""

    name: str
    prompts: Sequence[str | list[int]]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    concurrency: int = 1


async def run_scenarios(
    engine: LLMEngine, scenarios: Sequence[Scenario], on_done: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Run scenarios one after the other on a started engine; `on_done` gets each one's result.

    A request that fails is counted and reported in its scenario; one that is wrong raises `InvalidArgumentError`.
    """
    results = []
    for scenario in scenarios:
        results.append(await _run_scenario(engine, scenario))
        if on_done is not None:
            on_done(results[-1])
    return {"engine": engine.get_info(), "scenarios": results}


async def _run_scenario(engine: LLMEngine, scenario: Scenario) -> dict[str, Any]:
    places = asyncio.Semaphore(scenario.concurrency)

    async def answer(prompt: str | list[int]) -> Response:
        async with places:
            return await engine.generate(prompt, sampling_params=scenario.sampling)

    started_at = time.monotonic()
    tasks = [asyncio.ensure_future(answer(prompt)) for prompt in scenario.prompts]
    try:
        responses = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return _summarise(scenario, responses, time.monotonic() - started_at)


def _summarise(scenario: Scenario, responses: Sequence[Response], duration_s: float) -> dict[str, Any]:
    num_output_tokens = sum(response.usage.completion_tokens for response in responses)
    aggregate = Metrics.aggregate(response.metrics for response in responses)
    return {
        "name": scenario.name,
        "num_requests": len(responses),
        "concurrency": scenario.concurrency,
        "duration_s": duration_s,
        "num_prompt_tokens": sum(response.usage.prompt_tokens for response in responses),
        "num_output_tokens": num_output_tokens,
        "output_tokens_per_second": num_output_tokens / duration_s if duration_s > 0 else 0.0,
        "metrics": aggregate.model_dump(mode="json", exclude={"itl_list"}),
        "requests": [_describe(response) for response in responses],
    }


def _describe(response: Response) -> dict[str, Any]:
    return {
        "request_id": response.request_id,
        "finish_reason": response.finish_reason.value,
        "prompt_tokens": response.usage.prompt_tokens,
        "output_tokens": response.usage.completion_tokens,
        "output_text": response.output_text,
        "error": None if response.error is None else response.error.model_dump(mode="json"),
        "metrics": response.metrics.model_dump(mode="json"),
    }


def write_results(results: dict[str, Any], output: Path) -> None:
    """Write results as JSON; `InvalidArgumentError` where the file cannot be written."""
    try:
        output.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError(f"cannot write {output}: {error.strerror}; choose another output") from error


# ---- python -m sagellm_core.demo ----------------------------------------------------------------------


def run_demo(
    config: Annotated[Path, typer.Option(help="YAML or JSON, see examples/config_cpu.yaml.")],
    output: Annotated[Path | None, typer.Option(help="Where the metrics go; default: the configuration's.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print every answer.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the engine's log.")] = False,
) -> None:
    """Answer the prompts of a configuration and write their metrics."""
    demo = load_config(config)
    results = asyncio.run(_run(demo, verbose=verbose))
    path = output or Path(demo.output)
    write_results(results, path)
    metrics = results["scenarios"][0]["metrics"]
    print(
        f"{len(demo.prompts)} requests, {results['scenarios'][0]['output_tokens_per_second']:.1f} tokens/s, "
        f"TTFT {metrics['ttft_ms']:.1f} ms, TPOT {metrics['tpot_ms']:.1f} ms; metrics: {path}"
    )


async def _run(demo: DemoConfig, *, verbose: bool) -> dict[str, Any]:
    from sagellm_core.llm_engine import LLMEngine

    async with LLMEngine(demo.engine) as engine:
        prompts: list[str | list[int]] = list(demo.prompts)
        if demo.chat and engine.tokenizer.has_chat_template:
            prompts = [engine.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in demo.prompts]
        scenario = Scenario("demo", prompts, demo.sampling, demo.concurrency)
        results = await run_scenarios(engine, [scenario])
    if verbose:
        for prompt, request in zip(demo.prompts, results["scenarios"][0]["requests"], strict=True):
            print(f"> {prompt}\n{request['output_text']}\n")
    return results


def main() -> None:
    """The command."""
    run_command(run_demo)


if __name__ == "__main__":
    main()
