"""`sage-llm serve` and `sage-llm gateway`: a model behind the OpenAI API."""

from __future__ import annotations

from typing import Any

from sagellm.cli.session import make_engine, print_quietly


def serve_model(
    model: str | None,
    backend: str | None,
    options: dict[str, Any],
    *,
    host: str,
    port: int,
    engine_only: bool,
) -> None:
    """Load the model and serve it until Ctrl-C or SIGTERM."""
    engine = make_engine(model, backend, **options)
    name = engine.config.model_path
    from sagellm_control_plane import ControlPlaneManager
    from sagellm_core.engine_server import create_engine_app
    from sagellm_core.serving import run_server
    from sagellm_gateway import create_app

    manager = ControlPlaneManager(scheduling_policy="adaptive")
    manager.register_engine(engine)
    app = create_engine_app(lambda: engine) if engine_only else create_app(manager, default_model=name)
    start = engine.start if engine_only else manager.start

    def announce(url: str) -> None:
        print_quietly(f"Serving {name} at {url}{'' if engine_only else '/v1'} (Ctrl-C stops)")

    print_quietly(f"Loading {name} …")
    run_server(app, host, port, start=start, announce=announce)
    print_quietly("Stopped.")
