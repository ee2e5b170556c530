"""`sage-llm serve` and `sage-llm gateway`: models behind the OpenAI API."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import fields

from sagellm.cli.session import engine_of, make_engine
from sagellm.config import load_user_config
from sagellm_core.command import kept_from_collector, print_quietly
from sagellm_core.options import EngineFlags
from sagellm_gateway.options import ControlPlaneFlags, EnginesFlags, ServerFlags
from sagellm_protocol import InvalidArgumentError

_ENGINE_ONLY = ("host", "port", "name", "tls_cert", "tls_key", "allow_no_key")


def serve_model(flags: EngineFlags, control: ControlPlaneFlags, server: ServerFlags) -> None:
    """Load one model and serve it until Ctrl-C or SIGTERM."""
    config = load_user_config()
    backend, engine = config.backend_and_engine(model=flags.model, backend=flags.backend, **flags.options())
    with kept_from_collector():
        from sagellm_gateway.launch import launch, make_plan

    launch(make_plan(EnginesFlags(), control, server, backend=backend, engine=engine), make_engine=engine_of)


def serve_many(engines: EnginesFlags, control: ControlPlaneFlags, server: ServerFlags) -> None:
    """Load the models of a file or of flags, or the configured one, and serve them."""
    backend, engine = load_user_config().backend_and_engine(backend=engines.backend)
    with kept_from_collector():
        from sagellm_gateway.launch import launch, make_plan

    launch(make_plan(engines, control, server, backend=backend, engine=engine), make_engine=engine_of)


def serve_engine_only(flags: EngineFlags, control: ControlPlaneFlags, server: ServerFlags) -> None:
    """Serve one engine's own API: no keys, no limits, no other API."""
    given = [
        field.name
        for group in (control, server)
        for field in fields(group)
        if getattr(group, field.name) != field.default
    ]
    if refused := [name for name in given if name not in _ENGINE_ONLY]:
        flag = f"--{refused[0].replace('_', '-')}"
        raise InvalidArgumentError(f"{flag} is for the gateway, which --engine-only leaves out; drop one of them")
    engine = make_engine(flags)
    from sagellm_core.addresses import refuse_exposed
    from sagellm_core.engine_server import ENGINE_REMEDY, create_engine_app
    from sagellm_core.server_panel import ServerPanel, engine_rows, url_to_call
    from sagellm_core.server_registry import registered
    from sagellm_core.serving import ServerOptions, run_server

    host, model = "127.0.0.1" if server.host is None else server.host, engine.config.model_path
    if not server.allow_no_key:
        refuse_exposed(host, ENGINE_REMEDY, field="host")
    with ExitStack() as stack:

        def announce(url: str) -> None:
            call = url_to_call(url)
            name = stack.enter_context(registered(kind="engine", url=call, models=[model], name=server.name))
            stop = ("stop", "Ctrl-C" if name is None else f"Ctrl-C, or sage-llm stop {name}")
            example = f"""curl {call}/v1/completions -d '{{"model": "default", "prompt": "Hello"}}'"""
            ServerPanel([model], call, [*engine_rows([engine.get_info()]), stop], example).show()

        print_quietly(f"Loading {model} …")
        run_server(
            create_engine_app(lambda: engine),
            host,
            8000 if server.port is None else server.port,
            start=engine.start,
            announce=announce,
            options=ServerOptions(tls_cert=server.tls_cert, tls_key=server.tls_key),
        )
    print_quietly("Stopped.")
