"""The `sage-gateway` command."""

from __future__ import annotations

from typing import Annotated

import typer

from sagellm_control_plane import BackendConfig, ControlPlaneManager, EngineConfig
from sagellm_core.command import run_command
from sagellm_core.serving import run_server
from sagellm_gateway.app import create_app


def serve_gateway(
    model: Annotated[
        list[str] | None, typer.Option(help="Model id, folder, .gguf file or `builtin`; several give one engine each.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    backend: Annotated[str, typer.Option(help="auto, cpu, cuda, ascend, kunlun or haiguang.")] = "auto",
    scheduling_policy: Annotated[
        str, typer.Option(help="fifo, priority, slo_aware, cost_optimized or adaptive.")
    ] = "adaptive",
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the engines' log.")] = False,
) -> None:
    """Serve models over the OpenAI API."""
    names = model or ["builtin"]
    manager = ControlPlaneManager(
        backend_config=BackendConfig(kind=backend),
        engine_configs=[EngineConfig(model=name) for name in names],
        scheduling_policy=scheduling_policy,
    )

    def announce(url: str) -> None:
        typer.echo(f"Serving {', '.join(names)} at {url}/v1", err=True)

    run_server(create_app(manager, default_model=names[0]), host, port, start=manager.start, announce=announce)


def main() -> None:
    """The `sage-gateway` command."""
    run_command(serve_gateway)


if __name__ == "__main__":
    main()
