"""What `sage-llm serve`, `sage-llm gateway` and `sage-gateway` can be told about serving."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from sagellm_core.options import Backend, complete_model

MAX_REPLICAS = 64


def complete_scheduling_policy(incomplete: str) -> list[str]:
    """The names of the control plane's scheduling policies."""
    from sagellm_control_plane.policies import list_policies

    return [name for name in list_policies() if name.startswith(incomplete)]


def complete_routing_policy(incomplete: str) -> list[str]:
    """The names of the control plane's routing policies."""
    from sagellm_control_plane.routing import list_routers

    return [name for name in list_routers() if name.startswith(incomplete)]


def complete_placement(incomplete: str) -> list[str]:
    """Where engines may run."""
    return [name for name in ("local", "process") if name.startswith(incomplete)]


@dataclass(frozen=True)
class ServerFlags:
    """Flags over the settings of a file or the defaults; None leaves a value to those."""

    host: Annotated[
        str | None, typer.Option(help="Address to listen on; 0.0.0.0 is every network. Default: 127.0.0.1.")
    ] = None
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; 0 takes a free one. Default: 8000.", min=0, max=65535)
    ] = None
    name: Annotated[str | None, typer.Option(help="For `sage-llm stop NAME`. Default: the model's.")] = None
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="A key that clients must send; several times. SAGELLM_API_KEY keeps it out of `ps`."),
    ] = None
    allow_no_key: Annotated[
        bool, typer.Option("--allow-no-key", help="Listen beyond this machine although nobody needs a key.")
    ] = False
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain in PEM, to serve HTTPS.")] = None
    tls_key: Annotated[Path | None, typer.Option(help="Its private key in PEM.")] = None
    requests_per_minute: Annotated[int | None, typer.Option(help="Of each key.", min=1)] = None
    tokens_per_minute: Annotated[int | None, typer.Option(help="Of each key: prompts and answers.", min=1)] = None
    max_concurrent: Annotated[
        int | None, typer.Option(help="Requests of all callers in work at the same time.", min=1)
    ] = None
    request_timeout: Annotated[float | None, typer.Option(help="Seconds that one request may take.")] = None
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Let web pages of this origin call (CORS); several times.")
    ] = None
    access_log: Annotated[str | None, typer.Option(help="One line a request: off, text or json.")] = None

    def over(self, data: dict[str, Any]) -> dict[str, Any]:
        """`data`, the sections of `GatewaySettings`, with the flags over it."""
        values: dict[tuple[str, ...], Any] = {
            ("server", "host"): self.host,
            ("server", "port"): self.port,
            ("server", "tls_cert"): self.tls_cert,
            ("server", "tls_key"): self.tls_key,
            ("auth", "allow_no_key"): self.allow_no_key or None,
            ("limits", "per_key", "requests_per_minute"): self.requests_per_minute,
            ("limits", "per_key", "tokens_per_minute"): self.tokens_per_minute,
            ("limits", "total", "max_concurrent"): self.max_concurrent,
            ("limits", "request_timeout_s"): self.request_timeout,
            ("cors", "allow_origins"): self.allow_origin or None,
            ("log", "access"): self.access_log,
        }
        for path, value in values.items():
            if value is not None:
                data = _with(data, path, value)
        if self.api_key:
            keys = (data.get("auth") or {}).get("keys") or []
            data = _with(data, ("auth", "keys"), [*keys, *self._keys()])
        return data

    def _keys(self) -> list[dict[str, Any]]:
        from sagellm_gateway.keys import key_of

        keys = enumerate(self.api_key or [], 1)
        return [key_of(key, name=f"command-line-{n}", what="--api-key").model_dump() for n, key in keys]


def _with(data: Any, path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy of nested mappings with one value set; what is no mapping on the way is replaced."""
    name, *rest = path
    copy = dict(data) if isinstance(data, dict) else {}
    copy[name] = _with(copy.get(name), tuple(rest), value) if rest else value
    return copy


@dataclass(frozen=True)
class EnginesFlags:
    """Which engines stand behind a gateway: those of a file, or one for each model."""

    config: Annotated[
        Path | None, typer.Option(help="Engines, keys and limits from a YAML file; see examples/gateway.yaml.")
    ] = None
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="`builtin`, a folder, a .gguf file or a hub id; several give one engine each.",
            autocompletion=complete_model,
        ),
    ] = None
    backend: Backend = None


@dataclass(frozen=True)
class ControlPlaneFlags:
    """How many engines there are, where they run, and how requests reach them; None leaves a value to the file."""

    replicas: Annotated[
        int | None, typer.Option(help="Engines of each model. Default: 1.", min=1, max=MAX_REPLICAS)
    ] = None
    max_replicas: Annotated[
        int | None,
        typer.Option(help="Let their number follow the load, from --replicas up to this.", min=1, max=MAX_REPLICAS),
    ] = None
    placement: Annotated[
        str | None,
        typer.Option(
            help="Where engines run: local, in this process, or process, each in a child of its own. "
            "Default: process where there are replicas.",
            autocompletion=complete_placement,
        ),
    ] = None
    scheduling_policy: Annotated[
        str | None,
        typer.Option(
            help="Who gets the next free place: fifo, priority, slo_aware, cost_optimized, fair or adaptive (default).",
            autocompletion=complete_scheduling_policy,
        ),
    ] = None
    routing_policy: Annotated[
        str | None,
        typer.Option(
            help="Which engine takes a request: adaptive (default), prefix_aware, least_loaded, session and others.",
            autocompletion=complete_routing_policy,
        ),
    ] = None
    state: Annotated[
        Path | None,
        typer.Option(help="A file that survives a crash: the next start with it takes over the children that run."),
    ] = None
    keep_engines: Annotated[
        bool | None,
        typer.Option(
            "--keep-engines",
            help="At the end, leave the children running for the next start with the same --state, for a minute.",
        ),
    ] = None
    failover: Annotated[
        bool | None, typer.Option(help="Let requests of an engine that dies go on elsewhere. Default: yes.")
    ] = None

    def over(self, data: dict[str, Any]) -> dict[str, Any]:
        """`data`, the section `control_plane` of a file, with the flags over it."""
        sizes = ("replicas", "max_replicas", "placement")
        names = (*sizes, "scheduling_policy", "routing_policy", "state", "keep_engines")
        for name in names:
            if (value := getattr(self, name)) is not None:
                data = _with(data, (name,), value)
        return data if self.failover is None else _with(data, ("failover", "enabled"), self.failover)
