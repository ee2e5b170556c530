"""The engine: `LLMEngine` in front; scheduler, executor, worker and model runner behind it.

Names are imported when they are first used, so that importing this package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sagellm_backend  # noqa: F401 - first: it settles how threads wait, which torch reads when it is loaded
from sagellm_protocol.lazy import lazy_exports

if TYPE_CHECKING:
    from sagellm_core.config import BackendConfig, DemoConfig, EngineConfig, LLMEngineConfig, load_config
    from sagellm_core.engine_core.client import EngineCoreClient
    from sagellm_core.engine_core.engine_core import EngineCore
    from sagellm_core.engine_core.output import SchedulerOutput
    from sagellm_core.engine_core.scheduler import Scheduler
    from sagellm_core.engine_core.scheduler import Scheduler as ContinuousBatchingScheduler
    from sagellm_core.engine_server import engine_server_app
    from sagellm_core.executor.base import Executor
    from sagellm_core.factory import EngineFactory, create_backend
    from sagellm_core.llm_engine import LLMEngine
    from sagellm_core.version import __version__
    from sagellm_core.worker.model_runner import ModelRunner
    from sagellm_core.worker.worker import Worker
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            ".config": ("BackendConfig", "DemoConfig", "EngineConfig", "LLMEngineConfig", "load_config"),
            ".engine_core.client": ("EngineCoreClient",),
            ".engine_core.engine_core": ("EngineCore",),
            ".engine_core.output": ("SchedulerOutput",),
            ".engine_core.scheduler": ("Scheduler", "Scheduler as ContinuousBatchingScheduler"),
            ".engine_server": ("engine_server_app",),
            ".executor.base": ("Executor",),
            ".factory": ("EngineFactory", "create_backend"),
            ".llm_engine": ("LLMEngine",),
            ".version": ("__version__",),
            ".worker.model_runner": ("ModelRunner",),
            ".worker.worker": ("Worker",),
        },
    )

__all__ = [
    "BackendConfig",
    "ContinuousBatchingScheduler",
    "DemoConfig",
    "EngineConfig",
    "EngineCore",
    "EngineCoreClient",
    "EngineFactory",
    "Executor",
    "LLMEngine",
    "LLMEngineConfig",
    "ModelRunner",
    "Scheduler",
    "SchedulerOutput",
    "Worker",
    "__version__",
    "create_backend",
    "engine_server_app",
    "load_config",
]
