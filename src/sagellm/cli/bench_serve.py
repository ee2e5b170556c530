"""`sage-llm bench serve`: a server under load, as a table and as JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sagellm.cli.bench import check_writable, write_results
from sagellm.cli.display import figures_table, progress_bar
from sagellm_benchmark.serve.benchmark import ServeLoad, run_serve_benchmark

if TYPE_CHECKING:
    from sagellm.cli.options import ServeLoadFlags
    from sagellm_benchmark.serve.drive import Outcome


def bench_serve(flags: ServeLoadFlags, file: Path | None, *, detailed: bool) -> None:
    """Load on a server; see `sage-llm bench serve --help`."""
    check_writable(file)
    result = _run(_measure(flags.load(), detailed))
    write_results(result, file)
    console = Console(highlight=False)
    load = result["load"]["endpoint"]
    console.print(f"{result['num_requests']} requests to {result['model']} at {result['url']}, {load}", soft_wrap=True)
    console.print(rates_table(result))
    console.print(latencies_table(result))
    if result["errors"]:
        console.print(errors_table(result))


def _run(measuring: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """On uvloop where there is one: the load generator shares the machine with the server, more often than not."""
    try:
        import uvloop
    except ImportError:  # not made for every platform
        return asyncio.run(measuring)
    result: dict[str, Any] = uvloop.run(measuring)
    return result


async def _measure(load: ServeLoad, detailed: bool) -> dict[str, Any]:
    with progress_bar() as progress:
        task = progress.add_task(f"asking {load.url}", total=None)
        num_failed = 0

        def on_plan(num_requests: int) -> None:
            progress.update(task, description="requests", total=num_requests)

        def on_end(outcome: Outcome) -> None:
            nonlocal num_failed
            num_failed += outcome.error is not None
            failed = f", {num_failed} failed" if num_failed else ""
            progress.update(task, advance=1, description=f"requests{failed}")

        return await run_serve_benchmark(load, on_plan=on_plan, on_end=on_end, detailed=detailed)


# ---- tables -------------------------------------------------------------------------------------------


def rates_table(result: dict[str, Any]) -> Table:
    """Requests and tokens, of all and a second."""
    load, seconds = result["load"], result["duration_s"]
    table = figures_table("", "all", "a second", text=("",))
    num_good = result["num_requests"] - result["num_failed"]
    table.add_row("requests answered", str(num_good), f"{result['requests_per_second']:.2f}")
    if (goodput := result["goodput"]) is not None:
        wishes = {"ttft_ms": "first token", "tpot_ms": "each further", "latency_ms": "whole"}
        kept = ", ".join(
            f"{label} ≤ {goodput['objectives'][name]:g} ms"
            for name, label in wishes.items()
            if goodput["objectives"][name] is not None
        )
        table.add_row(
            f"in time ({kept})", f"{goodput['attainment']:.1%}", f"{goodput['requests_per_second']:.2f}", style="bold"
        )
    table.add_row("output tokens", str(result["num_output_tokens"]), f"{result['output_tokens_per_second']:.1f}")
    total = result["num_prompt_tokens"] + result["num_output_tokens"]
    table.add_row("prompt and output tokens", str(total), f"{result['total_tokens_per_second']:.1f}")
    table.add_row("requests failed", str(result["num_failed"]), "", style="red" if result["num_failed"] else None)
    table.add_section()
    table.add_row("seconds", f"{seconds:.2f}", "")
    table.add_row("at a time, at most", str(result["peak_concurrency"]), "")
    table.add_row("sent late, p99", f"{result['late_ms_p99']:.1f} ms", "")
    if load["num_cut_to_context"]:
        table.add_row("cut to the model's context", str(load["num_cut_to_context"]), "")
    return table


def latencies_table(result: dict[str, Any]) -> Table:
    """One line a latency, in milliseconds."""
    columns = {"mean": "mean", "p50": "median", "p90": "p90", "p99": "p99", "max": "max"}
    table = figures_table("ms", *columns.values(), text=("ms",))
    for name, label in (
        ("ttft_ms", "time to first token"),
        ("tpot_ms", "time per output token"),
        ("itl_ms", "between two messages"),
        ("latency_ms", "whole answer"),
    ):
        if (summary := result[name]) is not None:
            table.add_row(label, *(f"{summary[column]:.2f}" for column in columns))
    return table


def errors_table(result: dict[str, Any]) -> Table:
    """The kinds of failures, with the first message of each."""
    table = Table("failed", "kind", "in the server's words", box=SIMPLE_HEAD, pad_edge=False)
    for error in result["errors"]:
        table.add_row(str(error["count"]), error["kind"], Text(error["messages"][0]))
    return table
