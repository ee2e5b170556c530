"""The user's configuration: `~/.sage-llm/config.yaml`, overridden by environment variables, overridden by flags.

::

    backend: {kind: auto, device: null}
    engine: {kind: auto, model: builtin, options: {max_batch_size: 8}}
    control_plane: {endpoint: http://127.0.0.1:8000}

`SAGELLM_BACKEND`, `SAGELLM_DEVICE`, `SAGELLM_MODEL` and `SAGELLM_ENDPOINT` override single values; `SAGELLM_CONFIG`
names another file. `engine.kind` is the backend of the engine where it differs from `backend.kind`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from sagellm_core.config import BackendConfig, EngineConfig, LLMEngineConfig
from sagellm_protocol import EdgeModel, InvalidArgumentError, parse

_OVERRIDES = {
    "SAGELLM_BACKEND": ("backend", "kind"),
    "SAGELLM_DEVICE": ("backend", "device"),
    "SAGELLM_MODEL": ("engine", "model"),
    "SAGELLM_ENDPOINT": ("control_plane", "endpoint"),
}
# What a value that is overridden takes with it: it belonged to the old one.
_REPLACED_TOO = {
    "SAGELLM_BACKEND": (("backend", "device"), ("engine", "kind")),
    "SAGELLM_MODEL": (("engine", "model_path"),),
}


class ControlPlaneConfig(EdgeModel):
    """Where a server runs, for `sage-llm info`."""

    endpoint: str | None = None


class UserConfig(EdgeModel):
    """The whole file; what it leaves out has these defaults."""

    backend: BackendConfig = Field(default_factory=BackendConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    control_plane: ControlPlaneConfig = Field(default_factory=ControlPlaneConfig)

    def engine_config(self, *, model: str | None = None, backend: str | None = None, **options: Any) -> LLMEngineConfig:
        """The engine to run, with flags in front of what the configuration says; None leaves a value to it."""
        where, engine = self.backend_and_engine(model=model, backend=backend, **options)
        return engine.to_llm_engine_config(where)

    def backend_and_engine(
        self, *, model: str | None = None, backend: str | None = None, **options: Any
    ) -> tuple[BackendConfig, EngineConfig]:
        """The same as a control plane takes it."""
        where = self.backend if backend is None else BackendConfig(kind=backend)
        fields = self.engine.given()
        if backend is not None:
            fields["kind"] = backend
        if model is not None:
            fields = {**fields, "model": model, "model_path": None}
        given = {name: value for name, value in options.items() if value is not None}
        return where, EngineConfig(**{**fields, "options": {**self.engine.options, **given}})


def config_path(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the configuration lies, whether it exists or not."""
    return Path(environ.get("SAGELLM_CONFIG") or "~/.sage-llm/config.yaml").expanduser()


def load_user_config(environ: Mapping[str, str] = os.environ) -> UserConfig:
    """Read file and environment; a missing file means defaults, a bad one an `InvalidArgumentError` that names it."""
    path = config_path(environ)
    data = _read(path) if path.is_file() else {}
    if environ.get("SAGELLM_CONFIG") and not path.is_file():
        raise InvalidArgumentError(f"SAGELLM_CONFIG names {path}, which is no file; correct or unset it")
    for variable, (section, key) in _OVERRIDES.items():
        if environ.get(variable):
            for other_section, other_key in _REPLACED_TOO.get(variable, ()):
                data.get(other_section, {}).pop(other_key, None)
            data.setdefault(section, {})[key] = environ[variable]
    return parse(UserConfig, data, what=str(path))


def _read(path: Path) -> dict[str, Any]:
    """The file's sections; empty ones are left out, and each is a mapping."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InvalidArgumentError(f"{path} cannot be read as YAML: {reason}", path=str(path)) from error
    sections = data if isinstance(data, dict) else {"": None}
    wrong = [name for name, section in sections.items() if section is not None and not isinstance(section, dict)]
    if not isinstance(data, dict) or wrong:
        raise InvalidArgumentError(
            f"{path} must hold mappings named backend, engine and control_plane; see `sage-llm info`", path=str(path)
        )
    return {str(name): dict(section) for name, section in data.items() if section is not None}
