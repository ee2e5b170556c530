"""A gateway from its command line: a plan of flags and file, engines that load, the panel, the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from sagellm_control_plane import ControlPlaneManager, EngineState
from sagellm_control_plane.manager import local_engine
from sagellm_core.addresses import is_loopback
from sagellm_core.command import print_quietly
from sagellm_core.config import BackendConfig, EngineConfig
from sagellm_core.server_panel import ServerPanel, engine_rows, url_to_call
from sagellm_core.server_registry import registered
from sagellm_gateway.app import Gateway
from sagellm_gateway.config_file import ControlPlaneSettings, ServedEngine, read_gateway_file
from sagellm_gateway.options import ControlPlaneFlags, EnginesFlags, ServerFlags
from sagellm_gateway.placement import MakeEngine, engine_maker, replicated, shared_out
from sagellm_gateway.serving import run_gateway
from sagellm_gateway.settings import GatewaySettings, parse_settings
from sagellm_protocol import InvalidArgumentError, parse


@dataclass(frozen=True)
class Plan:
    """What a gateway is to run; its first engine's model answers calls that name none, unless it says otherwise."""

    settings: GatewaySettings
    engines: Sequence[EngineConfig]
    backend: BackendConfig
    control_plane: ControlPlaneSettings
    default_model: str | None = None
    name: str | None = None  # for `sage-llm stop`


def make_plan(
    engines: EnginesFlags,
    control: ControlPlaneFlags,
    server: ServerFlags,
    *,
    backend: BackendConfig,
    engine: EngineConfig,
) -> Plan:
    """The plan of a command line; `engine` on `backend` is served where it names neither a file nor a model.

    Raises `InvalidArgumentError` that names flag or file, line and field.
    """
    if engines.config is None:
        models = [EngineConfig(model=model) for model in engines.model or []]
        return Plan(
            settings=parse_settings(server.over({}), what="command line"),
            engines=models or [engine],
            backend=backend if engines.backend is None else BackendConfig(kind=engines.backend),
            control_plane=parse(ControlPlaneSettings, control.over({}), what="command line"),
            name=server.name,
        )
    if engines.model or engines.backend:
        flag = "model" if engines.model else "backend"
        raise InvalidArgumentError(f"--{flag} and --config exclude each other; write it into {engines.config}")
    file, sections = read_gateway_file(engines.config)
    return Plan(
        settings=parse_settings(server.over(sections), what=str(engines.config)),
        engines=file.engines,
        backend=file.backend,
        control_plane=parse(
            ControlPlaneSettings, control.over(file.control_plane.model_dump(exclude_unset=True)), what="command line"
        ),
        default_model=file.default_model,
        name=server.name,
    )


def launch(plan: Plan, *, make_engine: MakeEngine = local_engine) -> None:
    """Load the plan's engines and serve them until Ctrl-C or SIGTERM; `make_engine` makes those of this process."""
    models = list(dict.fromkeys(engine.model for engine in plan.engines))
    control = plan.control_plane.for_models(models)
    with ExitStack() as stack:
        manager = ControlPlaneManager(
            backend_config=plan.backend,
            config=control,
            make_engine=stack.enter_context(
                engine_maker(control.place, make_engine, control.state, orphan_timeout_s=control.orphan_timeout_s)
            ),
            state=control.state,
        )
        most = {model: scaling.max_replicas for model, scaling in control.autoscaling.items()}
        for engine in shared_out(replicated(plan.engines, control.replicas), control.place, most):
            manager.register_config(engine, **(engine.instance_fields() if isinstance(engine, ServedEngine) else {}))
        gateway = Gateway(
            manager,
            default_model=plan.default_model or models[0],
            settings=plan.settings,
            keeps_engines=control.keep_engines,
        )

        def announce(url: str) -> None:
            call = url_to_call(url)
            name = stack.enter_context(registered(kind="gateway", url=call, models=models, name=plan.name))
            panel(gateway, models, call, name).show()

        times = f", {control.replicas} engines each" if control.replicas > 1 else ""
        print_quietly(f"Loading {', '.join(models)}{times} …")
        run_gateway(gateway, announce=announce)
    print_quietly(_farewell(control))


def _farewell(control: ControlPlaneSettings) -> str:
    if not control.keep_engines:
        return "Stopped."
    wait = f"{control.orphan_timeout_s:g} s"
    return (
        f"Stopped. The engines stay loaded for {wait}: the next start with the state {control.state} takes them over."
    )


def panel(gateway: Gateway, models: Sequence[str], url: str, name: str | None) -> ServerPanel:
    """What to say of a gateway that is ready; `name` is how `sage-llm stop` calls it."""
    settings, manager = gateway.settings, gateway.manager
    ready = [info.engine_id for info in manager.list_engines() if info.state is EngineState.READY]
    failed = [(info.model, f"not loaded: {info.error}") for info in manager.list_engines() if info.error is not None]
    engines = _described(manager, ready)
    path, body = "chat/completions", '{"messages": [{"role": "user", "content": "Hello"}]}'
    if engines and all(engine.get("is_embedding") for engine in engines):
        path, body = "embeddings", '{"input": "Hello"}'
    key = ' -H "Authorization: Bearer $SAGELLM_API_KEY"' if settings.auth.keys else ""
    insecure = " -k" if settings.server.tls_cert is not None else ""
    return ServerPanel(
        models=models,
        url=f"{url}/v1",
        rows=[
            *engine_rows(engines),
            *failed,
            *(
                ("engines", f"{scaling.min_replicas} to {scaling.max_replicas} of {model}, as the load asks")
                for model, scaling in manager.config.autoscaling.items()
            ),
            ("keys", _key_state(settings)),
            ("stop", "Ctrl-C" if name is None else f"Ctrl-C, or sage-llm stop {name}"),
        ],
        example=f"curl{insecure} {url}/v1/{path}{key} -d '{body}'",
    )


def _described(manager: ControlPlaneManager, engine_ids: Sequence[str]) -> list[dict[str, Any]]:
    """What the first engine of each model says of itself, with the name that clients ask for and how many there are."""
    counts = Counter(manager.model_of(engine_id) for engine_id in engine_ids)
    first = {manager.model_of(engine_id): engine_id for engine_id in reversed(engine_ids)}
    return [
        {
            **manager.get_engine_details(first[model]),
            "model": model if count == 1 else f"{model}, {count} engines",
        }
        for model, count in counts.items()
    ]


def _key_state(settings: GatewaySettings) -> str:
    keys, host = settings.auth.keys, settings.server.host
    if keys:
        return f"{len(keys)} {'key' if len(keys) == 1 else 'keys'}; calls need one"
    return "none needed; only this machine can call" if is_loopback(host) else "none needed; everybody can call"
