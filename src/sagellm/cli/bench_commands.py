"""The command tree of `sage-llm bench`; what runs stands in `bench.py`."""

from __future__ import annotations

from typing import Annotated

import typer

from sagellm.cli.options import JsonFile, LoadFlags, Runs, ServeLoadFlags
from sagellm_core.options import EngineFlags, NumThreads, with_flags

bench = typer.Typer(
    help="Measure the engine, its kernels, or a server.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@bench.command()
@with_flags
def latency(
    engine: EngineFlags,
    load: LoadFlags,
    batch_size: Annotated[int, typer.Option(help="Requests at the same time.", min=1)] = 1,
    runs: Runs = 5,
    json: JsonFile = None,
) -> None:
    """Time to the first token and between tokens.

    Batches of equal requests run one after another, each with prompts of its own.
    """
    from sagellm.cli.bench import bench_latency

    bench_latency(engine, load.load(batch_size, batch_size, runs), json)


@bench.command()
@with_flags
def throughput(
    engine: EngineFlags,
    load: LoadFlags,
    requests: Annotated[int | None, typer.Option(help="Of one batch. Default: as many as at a time.", min=1)] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at the same time.", min=1)] = 32,
    runs: Runs = 3,
    json: JsonFile = None,
) -> None:
    """Requests and tokens a second, with many requests at a time."""
    from sagellm.cli.bench import bench_throughput

    bench_throughput(engine, load.load(requests or concurrency, concurrency, runs), json)


@bench.command()
@with_flags
def serve(
    load: ServeLoadFlags,
    detailed: Annotated[
        bool, typer.Option("--detailed", help="Write each request's times into the file, too.")
    ] = False,
    json: JsonFile = None,
) -> None:
    """Load on a running server, as its clients see it.

    Throughput, latencies, goodput under objectives, errors by kind. Any server with OpenAI's API will do.
    """
    from sagellm.cli.bench_serve import bench_serve

    bench_serve(load, json, detailed=detailed)


@bench.command()
def kernels(
    shape: Annotated[str, typer.Option(help="0.5b, 1.7b, 8b, or a model whose shapes to take.")] = "0.5b",
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be given several times.")] = None,
    format: Annotated[
        list[str] | None, typer.Option(help="Weights in this format, such as bf16, int8, int4, q5_k; several times.")
    ] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Rows of activations; several times.")] = None,
    num_threads: NumThreads = None,
    seconds: Annotated[float, typer.Option(help="For each line and implementation.", min=0.0)] = 0.3,
    reference: Annotated[bool, typer.Option(help="Measure the torch reference beside it.")] = True,
    json: JsonFile = None,
) -> None:
    """Each op on a model's shapes: GB/s and GFLOP/s.

    Beside this machine's limits and the torch reference, in turns.
    """
    from sagellm.cli.bench import bench_kernels

    bench_kernels(shape, op, format, rows, num_threads, seconds, json, reference=reference)
