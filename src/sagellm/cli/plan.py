"""`sage-llm plan`: which parallel layout a model should have on given devices."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sagellm.cli.display import figures_table

if TYPE_CHECKING:
    from sagellm_control_plane.planner import Estimate, Plan

_ROWS = 12
_WIDTH = 110  # of the table where the terminal is narrower, or none


@dataclass(frozen=True)
class PlanFlags:
    """What a service shall keep, the requests that it gets, and what may be used."""

    ttft: Annotated[float | None, typer.Option(help="Milliseconds to the first token, for 90 % of requests.")] = None
    tpot: Annotated[float | None, typer.Option(help="Milliseconds between tokens.")] = None
    input_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 1024
    output_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 256
    hit_rate: Annotated[float, typer.Option(help="Share of a prompt that the prefix cache holds.")] = 0.0
    weights: Annotated[str | None, typer.Option(help="bfloat16, float8, int8, int4. Default: the checkpoint's.")] = None
    kv: Annotated[str | None, typer.Option(help="Type of the KV cache. Default: bfloat16.")] = None
    strategy: Annotated[
        list[str] | None, typer.Option(help="Use this kind only: TP, PP, DP, EP, Hybrid; several times.")
    ] = None
    hardware: Annotated[list[Path] | None, typer.Option(help="YAML with devices of your own; several times.")] = None


def plan_command(model: str, gpus: str, flags: PlanFlags, *, as_json: bool) -> None:
    """Print the plan."""
    from sagellm_control_plane.planner.explain import as_json as plan_as_json
    from sagellm_control_plane.planner.explain import explain

    plan = _make(model, gpus, flags)
    if as_json:
        print(json.dumps(plan_as_json(plan), indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(
        f"{plan.model.name}: {plan.model.num_params / 1e9:.1f} B parameters in {plan.model.weight_dtype} on "
        f"{plan.cluster}, prompts of {flags.input_tokens} and answers of {flags.output_tokens} tokens"
    )
    _print_table(plan)
    for line in explain(plan):
        console.print(f"- {line}")


def _make(name: str, gpus: str, flags: PlanFlags) -> Plan:
    from sagellm_control_plane.config import ParallelismConfig
    from sagellm_control_plane.planner import Objectives, load_devices, make_plan, parse_cluster, read_model_costs
    from sagellm_core.models.hub import resolve_config

    cluster = parse_cluster(gpus, load_devices(*flags.hardware or ()))
    objectives = Objectives(flags.ttft, flags.tpot, flags.input_tokens, flags.output_tokens, flags.hit_rate)
    config = ParallelismConfig.model_validate({"supported_strategies": flags.strategy} if flags.strategy else {})
    model = read_model_costs(resolve_config(name), name=name, weight_dtype=flags.weights, kv_dtype=flags.kv)
    return make_plan(model, cluster, objectives, config)


def _print_table(plan: Plan) -> None:
    from rich.console import Console

    columns = ("layout", "tokens/s", "TTFT p90", "TPOT", "batch", "weights", "KV tokens", "")
    table = figures_table(*columns, text=("layout", ""))
    pareto = {id(item) for item in plan.pareto}
    for item in plan.estimates[:_ROWS]:
        table.add_row(*_row(item), _mark(plan, item, is_pareto=id(item) in pareto))
    console = Console(highlight=False)
    console = Console(highlight=False, width=max(_WIDTH, console.width))
    console.print(table)
    if len(plan.estimates) > _ROWS:
        console.print(f"{len(plan.estimates) - _ROWS} more layouts fit; --json lists them.")


def _row(item: Estimate) -> tuple[str, ...]:
    return (
        str(item.layout),
        f"{item.tokens_per_s:,.0f}",
        f"{item.ttft_ms:.0f} ms",
        f"{item.tpot_ms:.1f} ms",
        str(item.batch_size),
        f"{item.weights_gib:.1f} GiB",
        f"{item.num_kv_tokens:,}",
    )


def _mark(plan: Plan, item: Estimate, *, is_pareto: bool) -> str:
    if item is plan.best:
        return "chosen"
    if not item.is_good:
        return "misses the objectives"
    return "Pareto" if is_pareto else ""
