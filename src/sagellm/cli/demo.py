"""`sage-llm demo`: a workload against an engine, its metrics into a file."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sagellm.cli.bench import check_writable
from sagellm.cli.display import figures_table
from sagellm.cli.session import make_engine
from sagellm_core.command import print_quietly

if TYPE_CHECKING:
    from sagellm_benchmark import Workload
    from sagellm_core import LLMEngine
    from sagellm_core.options import EngineFlags


def run_demo(workload: str, output: Path, engine: EngineFlags) -> None:
    """Run the workload's scenarios one after the other and write their metrics as JSON."""
    from sagellm_benchmark import load_workload
    from sagellm_core.demo import write_results

    chosen = load_workload(workload)
    check_writable(output)
    results = asyncio.run(_run(make_engine(engine), chosen))
    write_results(results, output)
    Console().print(_table(results["scenarios"]))
    print_quietly(f"metrics: {output}")


async def _run(engine: LLMEngine, workload: Workload) -> dict[str, Any]:
    from sagellm_benchmark import build_scenario
    from sagellm_core.demo import run_scenarios

    async with engine:
        scenarios = [build_scenario(spec, engine.tokenizer) for spec in workload.scenarios]
        results = await run_scenarios(
            engine, scenarios, on_done=lambda result: print_quietly(f"{result['name']}: {result['duration_s']:.1f} s")
        )
    return {"workload": workload.model_dump(mode="json"), **results}


def _table(scenarios: list[dict[str, Any]]) -> Table:
    columns = ("scenario", "requests", "at a time", "TTFT ms", "TPOT ms", "tokens/s", "errors")
    table = figures_table(*columns, text=("scenario",))
    for scenario in scenarios:
        metrics = scenario["metrics"]
        table.add_row(
            Text(scenario["name"]),
            str(scenario["num_requests"]),
            str(scenario["concurrency"]),
            f"{metrics['ttft_ms']:.1f}",
            f"{metrics['tpot_ms']:.1f}",
            f"{scenario['output_tokens_per_second']:.1f}",
            f"{metrics['error_rate']:.0%}",
        )
    return table
