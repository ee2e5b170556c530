"""`sage-llm bench`: latency, throughput and kernels, as a table and as JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from sagellm.cli.display import figures_table, progress_bar
from sagellm.cli.session import make_engine
from sagellm_core.command import print_quietly
from sagellm_protocol import InvalidArgumentError

if TYPE_CHECKING:
    from sagellm_benchmark.kernels import KernelReport
    from sagellm_benchmark.serving import Load
    from sagellm_benchmark.timing import TokenTimes
    from sagellm_core import LLMEngine
    from sagellm_core.options import EngineFlags


def bench_latency(engine: EngineFlags, load: Load, file: Path | None) -> None:
    """Batches one after another; what each request of a batch sees."""
    from sagellm_benchmark.serving import describe_latency

    result = _measure(engine, load, describe_latency, file)
    Console().print(latency_table(result))


def bench_throughput(engine: EngineFlags, load: Load, file: Path | None) -> None:
    """Many requests at a time; what the engine does in a second."""
    from sagellm_benchmark.serving import describe_throughput

    result = _measure(engine, load, describe_throughput, file)
    Console().print(throughput_table(result))


def _measure(
    flags: EngineFlags,
    load: Load,
    describe: Callable[[LLMEngine, Load, list[TokenTimes]], dict[str, Any]],
    file: Path | None,
) -> dict[str, Any]:
    check_writable(file)
    engine = make_engine(
        flags,
        max_batch_size=load.concurrency,
        max_model_len=load.input_len + load.output_len,
        # A longer queue than the engine's own default is what this command is for.
        max_num_waiting=max(4096, load.requests),
    )
    result = asyncio.run(_run(engine, load, describe))
    write_results(result, file)
    return result


async def _run(
    engine: LLMEngine, load: Load, describe: Callable[[LLMEngine, Load, list[TokenTimes]], dict[str, Any]]
) -> dict[str, Any]:
    from sagellm_benchmark.serving import run_load

    with progress_bar() as progress:
        task = progress.add_task("loading", total=None)
        async with engine:
            progress.update(task, description="measuring", total=load.warmup + load.runs)
            runs = await run_load(engine, load, on_run=lambda: progress.advance(task))
            return describe(engine, load, runs)


def bench_kernels(
    shape: str,
    ops: list[str] | None,
    formats: list[str] | None,
    rows: list[int] | None,
    num_threads: int | None,
    seconds: float,
    file: Path | None,
    *,
    reference: bool,
) -> None:
    """Every op of the op table on this machine, beside the machine's limits and the torch reference."""
    from sagellm_benchmark.kernels import measure_kernels, plan_kernels

    check_writable(file)
    plan = plan_kernels(shape, ops=ops, formats=formats, rows=rows, num_threads=num_threads)
    with progress_bar() as progress:
        task = progress.add_task("measuring", total=len(plan.cases))

        def on_case(label: str) -> None:
            progress.update(task, advance=1, description=label)

        report = measure_kernels(plan, seconds=seconds, reference=reference, on_case=on_case)
    write_results(report.to_json(), file)
    console = Console(highlight=False)
    console.print(kernels_table(report))
    limits = report.limits
    console.print(
        f"limits of this machine, {report.num_threads} threads: reads {limits.read_bytes_per_second / 1e9:.1f} GB/s; "
        + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in limits.flops_per_second.items())
    )


# ---- tables -------------------------------------------------------------------------------------------


def latency_table(result: dict[str, Any]) -> Table:
    """One line a latency, and the rates below."""
    load = result["load"]
    columns = ("mean", "p50", "p90", "p99", "max")
    table = figures_table("ms", *columns, text=("ms",))
    table.title = f"{load['requests']} at a time, {load['input_len']} → {load['output_len']} tokens, {_runs(load)}"
    for name, label in (
        ("ttft_ms", "time to first token"),
        ("tpot_ms", "time per output token"),
        ("itl_ms", "between two tokens"),
        ("latency_ms", "whole request"),
    ):
        if (summary := result[name]) is not None:
            table.add_row(label, *(f"{summary[column]:.2f}" for column in columns))
    table.add_section()
    _add_rates(
        table,
        result,
        {"prefill_tokens_per_second": "prompt tokens/s", "decode_tokens_per_second": "decode only, tokens/s"},
    )
    return table


def throughput_table(result: dict[str, Any]) -> Table:
    """One line a rate."""
    load = result["load"]
    table = figures_table("rate", "a second", text=("rate",))
    table.title = (
        f"{load['requests']} requests, {load['concurrency']} at a time, "
        f"{load['input_len']} → {load['output_len']} tokens, median of {_runs(load)}"
    )
    _add_rates(
        table,
        result,
        {
            "requests_per_second": "requests",
            "output_tokens_per_second": "output tokens, end to end",
            "decode_tokens_per_second": "output tokens, decode only",
            "total_tokens_per_second": "prompt and output tokens",
        },
    )
    return table


def _runs(load: dict[str, Any]) -> str:
    return "1 run" if load["runs"] == 1 else f"{load['runs']} runs"


def _add_rates(table: Table, result: dict[str, Any], names: dict[str, str]) -> None:
    for name, label in names.items():
        if result[name] is not None:
            table.add_row(label, f"{result[name]:.2f}")


def kernels_table(report: KernelReport) -> Table:
    """One line a case, under the name of its op and its implementation."""
    table = figures_table("case", "time", "GB/s", "of limit", "GFLOP/s", "of limit", "× ref.", text=("case",))
    op = None
    for result in report.results:
        case = result.case
        if op != case.op:
            op = case.op
            table.add_section()
            table.add_row(f"{op}, {result.source}", style="bold")
        has_flops = case.flops > 0
        table.add_row(
            case.label,
            _time(result.seconds),
            f"{result.bytes_per_second / 1e9:.1f}",
            f"{result.bytes_per_second / report.limits.read_bytes_per_second:.0%}",
            f"{result.flops_per_second / 1e9:.1f}" if has_flops else "",
            f"{result.flops_per_second / report.limits.peak(case.arithmetic):.0%}" if has_flops else "",
            "" if result.speedup is None else f"{result.speedup:.1f}",
        )
    return table


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


# ---- files --------------------------------------------------------------------------------------------


def check_writable(file: Path | None) -> None:
    """Say at once, not after minutes of measuring, that the folder is not there."""
    if file is not None and not file.parent.is_dir():
        raise InvalidArgumentError(f"cannot write {file}: there is no folder {file.parent}", field="json")


def write_results(result: dict[str, Any], file: Path | None) -> None:
    """The results as JSON, where a file is wanted; raises `InvalidArgumentError` where it cannot be written."""
    if file is None:
        return
    try:
        file.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError(f"cannot write {file}: {error.strerror}; choose another", field="json") from error
    print_quietly(f"results: {file}")
