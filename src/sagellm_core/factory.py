"""Builds the parts of an engine from its configuration: backend, executor, engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sagellm_backend import BackendProvider, get_provider
from sagellm_core.config import BackendConfig, EngineConfig, LLMEngineConfig
from sagellm_core.executor.base import Executor
from sagellm_core.executor.uniproc import UniprocExecutor
from sagellm_core.models import LoadProgress, ModelConfig
from sagellm_core.worker.worker import Worker

if TYPE_CHECKING:
    from sagellm_core.llm_engine import LLMEngine


def create_backend(config: BackendConfig) -> BackendProvider:
    """The provider that a `BackendConfig` names."""
    options = {} if config.device is None else {"device": config.device}
    return get_provider(config.kind, **options)


def build_executor(
    config: LLMEngineConfig, model_config: ModelConfig, on_progress: LoadProgress | None = None
) -> Executor:
    """An executor with its worker on the configured device; nothing is loaded yet."""
    provider = create_backend(BackendConfig(kind=config.backend_type, device=config.device))
    return UniprocExecutor(Worker(config, model_config, provider, on_progress=on_progress))


class EngineFactory:
    """Makes engines by the kind of their backend."""

    def create(self, kind: str = "auto", model: str = "builtin", **options: object) -> LLMEngine:
        """An `LLMEngine`, not yet started; `options` are fields of `LLMEngineConfig`."""
        from sagellm_core.llm_engine import LLMEngine

        config: LLMEngineConfig = EngineConfig(kind=kind, model=model, options=dict(options)).to_llm_engine_config()
        return LLMEngine(config)
