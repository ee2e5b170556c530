"""The file of `sage-llm gateway --config`: engines, how requests reach them, and the sections of `GatewaySettings`.

::

    engines:
      - {model: qwen, model_path: Qwen/Qwen3-1.7B, options: {quantization: int4}}
      - {model: builtin}
    default_model: qwen
    control_plane: {replicas: 2, scheduling_policy: adaptive}
    server: {host: 0.0.0.0, port: 8000}

What is wrong in it is said with the line, the field and the remedy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from sagellm_control_plane import ExecutionInstanceType
from sagellm_control_plane.autoscaler_config import AutoscalerConfig
from sagellm_control_plane.config import ControlPlaneConfig
from sagellm_control_plane.policies import get_policy
from sagellm_control_plane.routing import get_router
from sagellm_core.config import BackendConfig, EngineConfig
from sagellm_gateway.options import MAX_REPLICAS
from sagellm_gateway.placement import Placement
from sagellm_gateway.settings import GatewaySettings
from sagellm_protocol import InvalidArgumentError, NotFoundError, parse

MAX_FILE_BYTES = 2**20


Role = Literal["general", "prefill", "decode", "embedding"]
_TYPES = {
    "general": ExecutionInstanceType.GENERAL,
    "prefill": ExecutionInstanceType.PREFILLING,
    "decode": ExecutionInstanceType.DECODING,
    "embedding": ExecutionInstanceType.EMBEDDING,
}


class ServedEngine(EngineConfig):
    """An engine, and what the control plane should know of it."""

    role: Role = Field(default="general", description="What it is meant for; prefill and decode with control_plane.pd.")
    price_per_hour: float = Field(default=0.0, ge=0, description="In any one currency, for cost_optimized.")
    location: str = Field(default="", max_length=256, description="zone/rack/host, for the routing policy topology.")
    memory_bytes: int | None = Field(default=None, ge=1, description="That its model takes; None: by its files.")

    def instance_fields(self) -> dict[str, Any]:
        """What is given of these, as fields of an `ExecutionInstance`."""
        names = ("price_per_hour", "location", "memory_bytes")
        return {"instance_type": _TYPES[self.role], **{name: getattr(self, name) for name in names}}


class ControlPlaneSettings(ControlPlaneConfig):
    """How many engines there are and where they run; how requests wait for them, reach them and survive them."""

    scheduling_policy: str = Field(default="adaptive", description="Which waiting request gets the next free place.")
    replicas: int = Field(default=1, ge=1, le=MAX_REPLICAS, description="Engines for each of `engines`.")
    max_replicas: int | None = Field(
        default=None,
        ge=1,
        le=MAX_REPLICAS,
        description="Their number follows the load, up to this; see autoscaling.",
    )
    placement: Placement | None = Field(
        default=None,
        description="local: in this process; process: children. None: children where there may be several.",
    )
    state: Path | None = Field(
        default=None, description="A file that survives a crash: the next gateway with it takes over the children."
    )
    keep_engines: bool = Field(default=False, description="Leave the children to the next gateway with that file.")
    orphan_timeout_s: float = Field(default=60.0, gt=0, description="So long children without a gateway wait for one.")

    @model_validator(mode="after")
    def _check_replicas(self) -> ControlPlaneSettings:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) is below replicas ({self.replicas}); raise it")
        return self

    @model_validator(mode="after")
    def _check_kept(self) -> ControlPlaneSettings:
        if self.keep_engines and self.state is None:
            raise ValueError("keep_engines needs a state, by which the next gateway finds the engines; name a file")
        if self.keep_engines and self.placement == "local":
            raise ValueError("keep_engines needs engines in processes of their own; set placement to process")
        return self

    @model_validator(mode="after")
    def _check_names(self) -> ControlPlaneSettings:
        get_policy(self.scheduling_policy)
        if self.routing_policy is not None:
            get_router(self.routing_policy)
        return self

    @property
    def place(self) -> Placement:
        """Where engines run."""
        is_apart = self.replicas > 1 or self.max_replicas or self.autoscaling or self.keep_engines
        return self.placement or ("process" if is_apart else "local")

    def for_models(self, models: Iterable[str]) -> ControlPlaneSettings:
        """With `max_replicas` as autoscaling for those of the models that have none of their own."""
        if self.max_replicas is None:
            return self
        scaling = AutoscalerConfig(min_replicas=self.replicas, max_replicas=self.max_replicas)
        return self.model_copy(update={"autoscaling": {**dict.fromkeys(models, scaling), **self.autoscaling}})


class GatewayFile(GatewaySettings):
    """The whole file; see the module."""

    engines: list[ServedEngine] = Field(min_length=1, max_length=64, description="At least one; all load at the start.")
    backend: BackendConfig = Field(default_factory=BackendConfig, description="For engines that name none.")
    control_plane: ControlPlaneSettings = Field(default_factory=ControlPlaneSettings)
    default_model: str | None = Field(default=None, description="Answers calls that name no model; else the first.")

    @model_validator(mode="after")
    def _check_engines(self) -> GatewayFile:
        ids: set[str] = set()
        for number, engine in enumerate(self.engines):
            _check_options(f"engines[{number}]", engine, self.backend)
            if engine.engine_id is None:
                continue
            if engine.engine_id in ids:
                field = f"engines[{number}].engine_id"
                raise InvalidArgumentError(
                    f"{field} is {engine.engine_id!r} a second time; choose another", field=field
                )
            ids.add(engine.engine_id)
        models = {engine.model: None for engine in self.engines}
        if self.default_model is not None and self.default_model not in models:
            raise InvalidArgumentError(
                f"default_model is {self.default_model!r}, the engines have {', '.join(models)}; name one of those",
                field="default_model",
            )
        return self


def _check_options(where: str, engine: EngineConfig, backend: BackendConfig) -> None:
    try:
        engine.to_llm_engine_config(backend)
    except InvalidArgumentError as error:
        field = str(error.context.get("field") or "")
        is_option = field.split(".")[0].split("[")[0] in engine.options
        where = f"{where}.options" if is_option else where
        message = error.message.removeprefix("invalid engine configuration: ")
        raise InvalidArgumentError(f"{where}.{message}", field=f"{where}.{field}") from error


def read_gateway_file(path: Path) -> tuple[GatewayFile, dict[str, Any]]:
    """The file, and its sections of `GatewaySettings` as plain values, for `parse_settings`.

    Raises `NotFoundError` and `InvalidArgumentError`; the latter names the file, the line and the field.
    """
    data, tree = _read(path)
    try:
        file = parse(GatewayFile, data, what=str(path))
    except InvalidArgumentError as error:
        field = error.context.get("field")
        message = error.message.removeprefix(f"invalid {path}: ")
        line = _line_of(tree, field or "")
        raise InvalidArgumentError(f"{path}, line {line}: {message}", field=field) from error
    return file, {name: section for name, section in data.items() if name in GatewaySettings.model_fields}


# ---- YAML ---------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict[str, Any], yaml.Node]:
    """The file's mapping without its empty sections, and the tree that knows the lines."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidArgumentError(f"{path} is larger than {MAX_FILE_BYTES} bytes; is it the right file?")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise NotFoundError(f"no file {path}; an example is examples/gateway.yaml", field="config") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"{path} cannot be read: {error}; correct the path", field="config") from error
    loader = yaml.SafeLoader(text)
    try:
        tree = loader.get_single_node()
        if tree is None or not isinstance(tree, yaml.MappingNode):
            raise InvalidArgumentError(f"{path} must hold a mapping with `engines`; see examples/gateway.yaml")
        _check_unique(path, tree)
        data: Mapping[Any, Any] = loader.construct_document(tree)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark is not None else str(path)
        problem = getattr(error, "problem", None) or error
        raise InvalidArgumentError(f"{where} is not YAML: {problem}; check indentation and quotes") from error
    finally:
        loader.dispose()
    return {str(name): section for name, section in data.items() if section is not None}, tree


def _check_unique(path: Path, node: yaml.Node) -> None:
    """YAML would take the last of several values of the same name and forget the others."""
    if isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for key, value in node.value:
            if key.value in names:
                line = key.start_mark.line + 1
                raise InvalidArgumentError(f"{path}, line {line}: {key.value} stands there twice; remove one")
            if isinstance(key.value, str):
                names.add(key.value)
            _check_unique(path, value)
    elif isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            _check_unique(path, entry)


def _line_of(node: yaml.Node, field: str) -> int:
    """The line of a field such as `auth.keys[0].hash`, or of the innermost part of it that the file has."""
    line = node.start_mark.line
    for name, index in re.findall(r"([^.\[\]]+)|\[([^\]]*)\]", field):
        if isinstance(node, yaml.SequenceNode) and index.isdigit() and int(index) < len(node.value):
            node = node.value[int(index)]
            line = node.start_mark.line
            continue
        wanted = name or index.strip("'\"")
        entries = node.value if isinstance(node, yaml.MappingNode) else []
        found = next(((key, value) for key, value in entries if key.value == wanted), None)
        if found is None:
            break
        line, node = found[0].start_mark.line, found[1]
    return line + 1
