"""The command tree of `sage-llm`. Commands import their machinery inside, so that `--help` is instant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sagellm_core.command import run_app

# Plain help texts: Rich alone would cost half of the time that `--help` may take.
app = typer.Typer(
    name="sage-llm",
    help="Run and serve large language models on this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="`builtin`, a folder, a .gguf file or a hub id. Default: the configuration's."),
]
Backend = Annotated[str | None, typer.Option(help="auto, cpu, cuda, ascend, kunlun or haiguang.")]
Quantization = Annotated[
    str | None, typer.Option(help="Weights in whole numbers: int8, int4, int4-g64, int4-g128 or int4-asym.")
]
MaxModelLen = Annotated[int | None, typer.Option(help="Prompt + output tokens of one request.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", "-n", help="Most tokens to generate.")]
System = Annotated[str | None, typer.Option(help="System message for chat models.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.")]
TopP = Annotated[float | None, typer.Option(help="Nucleus: the smallest set of tokens of this probability.")]
TopK = Annotated[int | None, typer.Option(help="Only the k most probable tokens; 0 is off.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling reproducible.")]
Preset = Annotated[str | None, typer.Option(help="deterministic, precise, balanced or creative.")]
Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every network.")]
Port = Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from sagellm_core.version import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the engine's log.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options of every command; `run_app` and the callback act on them."""


@app.command()
def run(
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Read from standard input if left out.")] = None,
    model: Model = None,
    max_tokens: MaxTokens = None,
    preset: Preset = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: Annotated[float | None, typer.Option(help="Only tokens this probable relative to the best.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages what was said.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="Above 0 discourages what was said.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="Above 0: the more often it was said.")] = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this text; may be given several times.")] = None,
    strategy: Annotated[str | None, typer.Option(help="greedy, sampling, beam_search or contrastive.")] = None,
    num_beams: Annotated[int | None, typer.Option(help="More than 1 is beam search.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    system: System = None,
    backend: Backend = None,
    quantization: Quantization = None,
    max_model_len: MaxModelLen = None,
    json: Json = False,
) -> None:
    """Answer one prompt, streaming."""
    from sagellm.cli.run import run_prompt

    given = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "seed": seed,
        "stop": stop or None,
        "strategy": strategy,
        "num_beams": num_beams,
    }
    options = {"quantization": quantization, "max_model_len": max_model_len}
    run_prompt(prompt, model, backend, options, preset, given, raw=raw, system=system, as_json=json)


@app.command()
def chat(
    model: Model = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    preset: Preset = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    backend: Backend = None,
    quantization: Quantization = None,
    max_model_len: MaxModelLen = None,
) -> None:
    """Talk with a model.

    Ctrl-C ends an answer, Ctrl-D the conversation.
    """
    from sagellm.cli.chat import chat_loop

    given = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    options = {"quantization": quantization, "max_model_len": max_model_len}
    chat_loop(model, backend, options, preset, given, system=system)


@app.command()
def serve(
    model: Model = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    engine_only: Annotated[bool, typer.Option("--engine-only", help="One engine without the gateway.")] = False,
    backend: Backend = None,
    quantization: Quantization = None,
    max_model_len: MaxModelLen = None,
    max_batch_size: Annotated[int | None, typer.Option(help="Requests that run at the same time.")] = None,
) -> None:
    """Serve a model over the OpenAI API."""
    from sagellm.cli.serve import serve_model

    options = {"quantization": quantization, "max_model_len": max_model_len, "max_batch_size": max_batch_size}
    serve_model(model, backend, options, host=host, port=port, engine_only=engine_only)


@app.command()
def gateway(host: Host = "127.0.0.1", port: Port = 8000) -> None:
    """Serve the configured model.

    The gateway with one engine behind it, both as `config.yaml` has them; `serve` takes more flags.
    """
    from sagellm.cli.serve import serve_model

    serve_model(None, None, {}, host=host, port=port, engine_only=False)


@app.command()
def info(json: Json = False) -> None:
    """Show what this machine has.

    Versions, devices, chosen kernels, models found, configuration and whether the configured server answers.
    """
    from sagellm.cli.info import show_info

    show_info(as_json=json)


@app.command("list")
def list_models(json: Json = False) -> None:
    """List the models on this machine."""
    from sagellm.cli.models import list_command

    list_command(as_json=json)


@app.command()
def pull(
    model: Annotated[str, typer.Argument(help="Hub id, such as Qwen/Qwen2.5-0.5B-Instruct.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    source: Annotated[str, typer.Option(help="huggingface or modelscope.")] = "huggingface",
) -> None:
    """Download a model."""
    from sagellm.cli.models import pull_command

    pull_command(model, revision, source)


@app.command()
def install(
    target: Annotated[str, typer.Argument(help="cuda, ascend, kunlun, haiguang or cpu.")],
    github: Annotated[bool, typer.Option("--github", help="Install sageLLM from its repository.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Run without asking.")] = False,
) -> None:
    """Install the torch build of a device.

    Shows the pip command first and runs it when confirmed.
    """
    from sagellm.cli.install import install_command

    install_command(target, from_github=github, confirmed=yes)


@app.command()
def demo(
    workload: Annotated[str, typer.Option(help="year1, short, long, stress, or a YAML file.")] = "year1",
    output: Annotated[Path, typer.Option(help="Where the metrics go.")] = Path("metrics.json"),
    model: Model = None,
    backend: Backend = None,
) -> None:
    """Run a workload and write its metrics."""
    from sagellm.cli.demo import run_demo

    run_demo(workload, output, model, backend)


# ---- bench --------------------------------------------------------------------------------------------

bench = typer.Typer(
    help="Measure the engine and its kernels on this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(bench, name="bench")

Dtype = Annotated[str | None, typer.Option(help="Of the weights: auto, fp32, fp16 or bf16.")]
NumThreads = Annotated[int | None, typer.Option(help="Compute threads. Default: the cores we may use.", min=1)]
InputLen = Annotated[int, typer.Option(help="Tokens of each prompt, random ones.", min=1)]
OutputLen = Annotated[int, typer.Option(help="Tokens of each answer, exactly.", min=1)]
Runs = Annotated[int, typer.Option(help="Batches that count.", min=1)]
Warmup = Annotated[int, typer.Option(help="Batches before those.", min=0)]
BenchSeed = Annotated[int, typer.Option("--seed", help="Of the random prompts.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the results into this file.")]


@bench.command()
def latency(
    model: Model = None,
    batch_size: Annotated[int, typer.Option(help="Requests at the same time.", min=1)] = 1,
    input_len: InputLen = 128,
    output_len: OutputLen = 64,
    runs: Runs = 5,
    warmup: Warmup = 1,
    seed: BenchSeed = 0,
    backend: Backend = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    num_threads: NumThreads = None,
    json: JsonFile = None,
) -> None:
    """Time to the first token and between tokens.

    Batches of equal requests run one after another, each with prompts of its own.
    """
    from sagellm.cli.bench import bench_latency
    from sagellm_benchmark import Load

    options = {"dtype": dtype, "quantization": quantization, "num_threads": num_threads}
    load = Load(input_len, output_len, batch_size, batch_size, runs, warmup, seed)
    bench_latency(model, backend, options, load, json)


@bench.command()
def throughput(
    model: Model = None,
    requests: Annotated[int | None, typer.Option(help="Of one batch. Default: as many as at a time.", min=1)] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at the same time.", min=1)] = 32,
    input_len: InputLen = 128,
    output_len: OutputLen = 64,
    runs: Runs = 3,
    warmup: Warmup = 1,
    seed: BenchSeed = 0,
    backend: Backend = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    num_threads: NumThreads = None,
    json: JsonFile = None,
) -> None:
    """Requests and tokens a second, with many requests at a time."""
    from sagellm.cli.bench import bench_throughput
    from sagellm_benchmark import Load

    options = {"dtype": dtype, "quantization": quantization, "num_threads": num_threads}
    load = Load(input_len, output_len, requests or concurrency, concurrency, runs, warmup, seed)
    bench_throughput(model, backend, options, load, json)


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


def main() -> None:
    """The console script."""
    run_app(app)
