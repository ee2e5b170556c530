"""The `sage-gateway` command: `sage-llm gateway` without the user's configuration."""

from __future__ import annotations

from sagellm_core.command import kept_from_collector, run_command
from sagellm_core.options import Debug, with_flags
from sagellm_gateway.options import ControlPlaneFlags, EnginesFlags, ServerFlags


@with_flags
def serve_gateway(engines: EnginesFlags, control: ControlPlaneFlags, server: ServerFlags, debug: Debug = False) -> None:
    """Serve one or many models over the OpenAI API: those of a file, those of --model, or the built-in one."""
    with kept_from_collector():
        from sagellm_core.config import BackendConfig, EngineConfig
        from sagellm_gateway.launch import launch, make_plan

    launch(make_plan(engines, control, server, backend=BackendConfig(), engine=EngineConfig()))


def main() -> None:
    """The `sage-gateway` command."""
    run_command(serve_gateway)


if __name__ == "__main__":
    main()
