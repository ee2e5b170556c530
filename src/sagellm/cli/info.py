"""`sage-llm info`: what this machine has and what the engine would use of it."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sagellm.cli.models import describe, models_table
from sagellm.config import config_path, load_user_config
from sagellm_protocol import SageLLMError

_KINDS = ("cpu", "cuda", "ascend", "kunlun", "haiguang")
_PACKAGES = ("isagellm", "torch", "numpy", "tokenizers", "safetensors", "huggingface_hub", "transformers")
_SERVER_TIMEOUT_S = 2.0


def show_info(*, as_json: bool) -> None:
    """Print versions, devices, kernels, models found, configuration and the server."""
    data = collect()
    if as_json:
        print(json.dumps(data, indent=2, ensure_ascii=False))
        return
    console = Console(highlight=False)
    for table in (_versions(data), _devices(data), _kernels(data), models_table(data["models"])):
        console.print(table)
    config = data["config"]
    backend = data["configured_backend"]
    lines = [
        f"configuration: {config['path']}{'' if config['exists'] else ' (not there: defaults)'}",
        f"model: {config['engine']['model_path'] or config['engine']['model']}",
        f"backend: {backend['kind']} ({backend['problem'] or data['chosen_backend']})",
    ]
    if data["server"] is not None:
        lines.append(f"server: {data['server']['endpoint']} ({data['server']['status']})")
    console.print(Text("\n".join(lines)))


def collect() -> dict[str, Any]:
    """All that `info` shows, as plain JSON values."""
    from sagellm_backend import get_provider
    from sagellm_core.models import list_local_models

    path = config_path()
    user = load_user_config()
    kind = user.engine_config().backend_type
    problem = None
    try:
        chosen = get_provider(kind)
    except SageLLMError as error:
        chosen, problem = get_provider("auto"), error.message
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "devices": {kind: _device(kind) for kind in _KINDS},
        "configured_backend": {"kind": kind, "problem": problem},
        "chosen_backend": chosen.kind,
        "kernels": chosen.ops.explain(),
        "models": [describe(model) for model in list_local_models()],
        "config": {"path": str(path), "exists": path.is_file(), **user.model_dump(mode="json")},
        "server": None if user.control_plane.endpoint is None else _server(user.control_plane.endpoint),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device(kind: str) -> dict[str, Any]:
    from sagellm_backend import get_provider

    try:
        capability = get_provider(kind).capability()
    except SageLLMError as error:
        return {"available": False, "reason": error.message}
    return {"available": True, **capability.model_dump(mode="json")}


def _server(endpoint: str) -> dict[str, Any]:
    """Whether the configured server answers."""
    import httpx

    try:
        answer = httpx.get(f"{endpoint.rstrip('/')}/health", timeout=_SERVER_TIMEOUT_S)
        status = "ok" if answer.status_code == httpx.codes.OK else f"answers with status {answer.status_code}"
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        status = f"not reachable: {error}"
    return {"endpoint": endpoint, "status": status}


def _versions(data: dict[str, Any]) -> Table:
    table = Table(title="Versions", title_justify="left", show_header=False)
    for name, number in data["versions"].items():
        table.add_row(name, number or _dim("not installed"))
    return table


def _devices(data: dict[str, Any]) -> Table:
    table = Table("backend", "device", "memory", "dtypes", title="Devices", title_justify="left")
    for kind, device in data["devices"].items():
        name = f"{kind} ←" if kind == data["chosen_backend"] else kind
        if device["available"]:
            free, total = device["available_memory_bytes"] / 2**30, device["total_memory_bytes"] / 2**30
            table.add_row(
                name, device["device_name"], f"{free:.1f} of {total:.1f} GiB free", " ".join(device["supported_dtypes"])
            )
        else:
            table.add_row(name, _dim(device["reason"]), "", "")
    return table


def _kernels(data: dict[str, Any]) -> Table:
    table = Table("op", "implementation", title=f"Kernels on {data['chosen_backend']}", title_justify="left")
    for op, source in data["kernels"].items():
        table.add_row(op, Text(source))
    return table


def _dim(text: str) -> Text:
    """Text as it stands: brackets in it are no markup."""
    return Text(text, style="dim")
