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


def main() -> None:
    """The console script."""
    run_app(app)
