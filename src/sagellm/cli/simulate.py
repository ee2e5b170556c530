"""`sage-llm simulate`: routing and scheduling policies over simulated engines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sagellm.cli.display import figures_table, progress_bar
from sagellm_gateway.options import complete_routing_policy, complete_scheduling_policy

if TYPE_CHECKING:
    from sagellm_benchmark.simulator import SimulationConfig, SimulationReport
    from sagellm_benchmark.traces import TraceRequest

_ROUTERS = ("round_robin", "least_loaded", "cache_aware", "kv_overlap", "lmetric", "marginal_cost")
_WIDTH = 120  # of the table where the terminal is narrower, or none


@dataclass(frozen=True)
class SimulatedLoadFlags:
    """The requests: a recorded trace, or one that is made up."""

    trace: Annotated[
        Path | None, typer.Option(help="Mooncake or Azure trace. Default: conversations that are made up.")
    ] = None
    requests: Annotated[
        int | None, typer.Option(help="Only the first so many. Default: all; 4000 if made up.", min=1)
    ] = None
    speed: Annotated[float, typer.Option(help="Divides the times between arrivals.", min=1e-3)] = 1.0
    rate: Annotated[float, typer.Option(help="Requests a second, of those that are made up.", min=1e-3)] = 4.0
    seed: Annotated[int, typer.Option(help="Of what is made up and drawn.")] = 0


@dataclass(frozen=True)
class SimulatedEngineFlags:
    """The engines; all are alike. Times of steps are those of an assumed large accelerator."""

    engines: Annotated[int, typer.Option(help="How many.", min=1, max=4096)] = 8
    blocks: Annotated[int, typer.Option(help="Of each engine's KV cache.", min=1)] = 2048
    block_size: Annotated[int, typer.Option(help="Tokens of a block.", min=1)] = 512
    max_num_batched_tokens: Annotated[int, typer.Option(help="Of a step.", min=1)] = 8192
    max_num_seqs: Annotated[int, typer.Option(help="Requests at the same time on each engine.", min=1)] = 256
    step_times: Annotated[
        str | None, typer.Option(help="c0,a,q,k,b in seconds, see docs/simulator.md.", metavar="C0,A,Q,K,B")
    ] = None


@dataclass(frozen=True)
class SimulatedPolicyFlags:
    """What is compared, and by which limits."""

    routing_policy: Annotated[
        list[str] | None,
        typer.Option(help="Compare these; several times. Default: six.", autocompletion=complete_routing_policy),
    ] = None
    scheduling_policy: Annotated[
        list[str] | None,
        typer.Option(help="Of the queue; several times. Default: fifo.", autocompletion=complete_scheduling_policy),
    ] = None
    ttft: Annotated[float | None, typer.Option(help="Objective: milliseconds to the first token.", min=0.001)] = None
    tpot: Annotated[float | None, typer.Option(help="Objective: milliseconds between tokens.", min=0.001)] = None
    report_delay: Annotated[float, typer.Option(help="Milliseconds until engines' reports arrive.", min=0)] = 20.0
    known_times: Annotated[
        bool, typer.Option("--known-times", help="Tell step times to the control plane instead of letting it learn.")
    ] = False


def simulate_command(
    load: SimulatedLoadFlags, engine: SimulatedEngineFlags, policy: SimulatedPolicyFlags, *, as_json: bool
) -> None:
    """Run and print; see `sage-llm simulate --help`."""
    from sagellm_benchmark.simulator import as_json as results_as_json

    trace = _trace(load)
    configs = list(_configs(load, engine, policy))
    reports = list(_run_all(trace, configs, policy))
    if as_json:
        name = "synthetic" if load.trace is None else load.trace.name
        print(json.dumps(results_as_json(configs[0], reports, name), indent=2))
        return
    _print_table(reports)


def _run_all(
    trace: list[TraceRequest], configs: list[SimulationConfig], flags: SimulatedPolicyFlags
) -> Iterator[SimulationReport]:
    from sagellm_benchmark.simulator import GOODPUT_TPOT_S, GOODPUT_TTFT_S, simulate, summarize

    ttft_s = GOODPUT_TTFT_S if flags.ttft is None else flags.ttft / 1e3
    tpot_s = GOODPUT_TPOT_S if flags.tpot is None else flags.tpot / 1e3
    with progress_bar() as progress:
        task = progress.add_task("", total=len(configs))
        for config in configs:
            progress.update(task, description=f"{config.router}, {config.policy}")
            yield summarize(simulate(trace, config), config, ttft_s=ttft_s, tpot_s=tpot_s)
            progress.advance(task)


def _trace(load: SimulatedLoadFlags) -> list[TraceRequest]:
    from sagellm_benchmark.simulator import SyntheticLoad
    from sagellm_benchmark.traces import read_trace

    if load.trace is not None:
        return read_trace(load.trace, load.requests)
    made_up = SyntheticLoad(num_requests=load.requests or 4000, requests_per_s=load.rate, seed=load.seed)
    return made_up.requests()


def _configs(
    load: SimulatedLoadFlags, engine: SimulatedEngineFlags, policy: SimulatedPolicyFlags
) -> Iterator[SimulationConfig]:
    from sagellm_benchmark.simulator import EngineSpec, SimulationConfig
    from sagellm_control_plane.policies import get_policy
    from sagellm_control_plane.routing import get_router
    from sagellm_protocol import SLO

    told: dict[str, Any] = {} if engine.step_times is None else {"coefficients": _coefficients(engine.step_times)}
    spec = EngineSpec(
        num_blocks=engine.blocks,
        block_size=engine.block_size,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        max_num_seqs=engine.max_num_seqs,
        **told,
    )
    slo = None if policy.ttft is None and policy.tpot is None else SLO(ttft_ms=policy.ttft, tpot_ms=policy.tpot)
    routers, policies = policy.routing_policy or _ROUTERS, policy.scheduling_policy or ("fifo",)
    for name in routers:
        get_router(name)  # an unknown name is said before the first run
    for name in policies:
        get_policy(name)
    for scheduling in policies:
        for routing in routers:
            yield SimulationConfig(
                num_engines=engine.engines,
                speed=load.speed,
                router=routing,
                policy=scheduling,
                engine=spec,
                report_delay_s=policy.report_delay / 1e3,
                learns=not policy.known_times,
                slo=slo,
                seed=load.seed,
            )


def _coefficients(text: str) -> Any:
    from sagellm_control_plane.step_time import StepCoefficients
    from sagellm_protocol import InvalidArgumentError

    try:
        c0, a, q, k, b = (float(part) for part in text.split(","))
    except ValueError as error:
        raise InvalidArgumentError(
            f"step_times is {text!r}; give five numbers of seconds: c0,a,q,k,b", field="step_times"
        ) from error
    if c0 <= 0 or min(a, q, k, b) < 0:
        raise InvalidArgumentError(f"step_times is {text!r}; c0 must be above 0, no other below", field="step_times")
    return StepCoefficients(c0, a, q, k, b)


def _print_table(reports: list[SimulationReport]) -> None:
    from rich.console import Console

    has_policies = len({report.policy for report in reports}) > 1
    names = ("routing", "scheduling") if has_policies else ("routing",)
    figures = ("TTFT ms", "p50", "p90", "p99", "TPOT ms", "E2E s", "hits", "goodput", "busy")
    table = figures_table(*names, *figures, text=names)
    for report in reports:
        ttft = report.ttft_ms
        table.add_row(
            report.router,
            *([report.policy] if has_policies else []),
            *(f"{ttft[name]:,.0f}" for name in ("mean", "p50", "p90", "p99")),
            f"{report.tpot_ms['mean']:.1f}",
            f"{report.e2e_ms['mean'] / 1e3:.2f}",
            f"{report.hit_rate:.1%}",
            f"{report.goodput:.1%}",
            f"{report.utilization:.0%}",
        )
    console = Console(highlight=False)
    Console(highlight=False, width=max(_WIDTH, console.width)).print(table)
