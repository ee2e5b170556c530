"""The command tree of `sage-llm`. Commands import their machinery inside, so that `--help` is instant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sagellm.cli.bench_commands import bench
from sagellm.cli.keys import key
from sagellm.cli.options import Json, RemoteFlags, SamplingFlags, System, complete_server
from sagellm.cli.plan import PlanFlags, plan_command
from sagellm.cli.simulate import (
    SimulatedEngineFlags,
    SimulatedLoadFlags,
    SimulatedPolicyFlags,
    simulate_command,
)
from sagellm_core.command import run_app
from sagellm_core.options import EngineFlags, complete_model, with_flags
from sagellm_gateway.options import ControlPlaneFlags, EnginesFlags, ServerFlags

# Plain help texts: Rich alone would cost half of the time that `--help` may take.
app = typer.Typer(
    name="sage-llm",
    help="Run and serve large language models on this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


# ---- answers ------------------------------------------------------------------------------------------


@app.command()
@with_flags
def run(
    engine: EngineFlags,
    sampling: SamplingFlags,
    remote: RemoteFlags,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Read from standard input if left out.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    system: System = None,
    json: Json = False,
) -> None:
    """Answer one prompt, streaming."""
    if remote.is_wanted:
        from sagellm.cli.remote import run_on_server

        run_on_server(prompt, remote, engine, sampling, raw=raw, system=system, as_json=json)
    else:
        from sagellm.cli.run import run_prompt

        run_prompt(prompt, engine, sampling, raw=raw, system=system, as_json=json)


@app.command()
@with_flags
def chat(engine: EngineFlags, sampling: SamplingFlags, remote: RemoteFlags, system: System = None) -> None:
    """Talk with a model.

    Here, or with `--url` on a server. Ctrl-C ends an answer, Ctrl-D the conversation.
    """
    if remote.is_wanted:
        from sagellm.cli.remote import chat_with_server

        chat_with_server(remote, engine, sampling, system=system)
    else:
        from sagellm.cli.chat import chat_loop

        chat_loop(engine, sampling, system=system)


# ---- servers ------------------------------------------------------------------------------------------


@app.command()
@with_flags
def serve(
    engine: EngineFlags,
    control: ControlPlaneFlags,
    server: ServerFlags,
    engine_only: Annotated[bool, typer.Option("--engine-only", help="One engine without the gateway.")] = False,
) -> None:
    """Serve a model over the OpenAI API."""
    from sagellm.cli.serve import serve_engine_only, serve_model

    (serve_engine_only if engine_only else serve_model)(engine, control, server)


@app.command()
@with_flags
def gateway(engines: EnginesFlags, control: ControlPlaneFlags, server: ServerFlags) -> None:
    """Serve one or many models.

    The engines of `--config FILE`, those of `--model`, or the one that `config.yaml` has.
    """
    from sagellm.cli.serve import serve_many

    serve_many(engines, control, server)


@app.command()
def ps(json: Json = False) -> None:
    """List your servers on this machine."""
    from sagellm.cli.servers import list_command

    list_command(as_json=json)


@app.command()
def top(
    server: Annotated[
        str | None,
        typer.Argument(help="Name, port or process id, as `ps` shows them.", autocompletion=complete_server),
    ] = None,
    url: Annotated[str | None, typer.Option(help="Of a server elsewhere.")] = None,
    api_key: Annotated[str | None, typer.Option(help="An admin key, if it wants one.", envvar="SAGELLM_ADMIN_KEY")] = (
        None
    ),
    interval: Annotated[float, typer.Option(help="Seconds between two pictures.", min=0.1)] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one picture and end.")] = False,
) -> None:
    """Watch a server: engines, queue, rates, latencies.

    Until Ctrl-C; without a terminal it prints one picture.
    """
    from sagellm.cli.top import top_command

    top_command(server, url, api_key, interval_s=interval, once=once)


@app.command()
def stop(
    server: Annotated[
        str | None,
        typer.Argument(help="Name, port or process id, as `ps` shows them.", autocompletion=complete_server),
    ] = None,
    all: Annotated[bool, typer.Option("--all", help="Stop all of them.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for answers in flight.", min=0)] = 60,
) -> None:
    """Stop a server.

    It takes no more requests, ends those in flight, and goes; a second `stop` cuts them off.
    """
    from sagellm.cli.servers import stop_command

    stop_command(server, stop_all=all, timeout_s=timeout)


# ---- the machine --------------------------------------------------------------------------------------


@app.command()
def info(json: Json = False) -> None:
    """Show what this machine has.

    Versions, devices, chosen kernels, models found, configuration and whether the configured server answers.
    """
    from sagellm.cli.info import show_info

    show_info(as_json=json)


@app.command()
@with_flags
def plan(
    model: Annotated[
        str,
        typer.Argument(help="Hub id, folder, or config.json; no weights are read.", autocompletion=complete_model),
    ],
    gpus: Annotated[str, typer.Option(help="Number and kind of the devices, as 8xH200.")],
    flags: PlanFlags,
    json: Json = False,
) -> None:
    """Choose how to spread a model over devices.

    By an analytic estimate: tensor, pipeline, data and expert parallel. Nothing is run or downloaded but config.json.
    """
    plan_command(model, gpus, flags, as_json=json)


@app.command()
@with_flags
def simulate(
    load: SimulatedLoadFlags, engine: SimulatedEngineFlags, policy: SimulatedPolicyFlags, json: Json = False
) -> None:
    """Compare routing and scheduling policies over simulated engines.

    The same requests for each, on virtual time, with the objects that serve. Nothing is loaded or sent.
    """
    simulate_command(load, engine, policy, as_json=json)


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
@with_flags
def demo(
    engine: EngineFlags,
    workload: Annotated[str, typer.Option(help="year1, short, long, stress, or a YAML file.")] = "year1",
    output: Annotated[Path, typer.Option(help="Where the metrics go.")] = Path("metrics.json"),
) -> None:
    """Run a workload and write its metrics."""
    from sagellm.cli.demo import run_demo

    run_demo(workload, output, engine)


app.add_typer(bench, name="bench")
app.add_typer(key, name="key")


def main() -> None:
    """The console script."""
    run_app(app)
