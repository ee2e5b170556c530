"""Models: specifications, families, loading. Exports are lazy; reading a configuration imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sagellm_protocol.lazy import lazy_exports

if TYPE_CHECKING:
    from .config import ModelConfig, read_model_config
    from .decoder import CausalLM
    from .encoder import EncoderModel
    from .encoder_spec import EncoderSpec
    from .hub import LocalModel, list_local_models, resolve_model
    from .loader import LoadProgress, load_model
    from .registry import MODELS
    from .spec import DecoderSpec
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            ".config": ("ModelConfig", "read_model_config"),
            ".decoder": ("CausalLM",),
            ".encoder": ("EncoderModel",),
            ".encoder_spec": ("EncoderSpec",),
            ".hub": ("LocalModel", "list_local_models", "resolve_model"),
            ".loader": ("LoadProgress", "load_model"),
            ".registry": ("MODELS",),
            ".spec": ("DecoderSpec",),
        },
    )

__all__ = [
    "MODELS",
    "CausalLM",
    "DecoderSpec",
    "EncoderModel",
    "EncoderSpec",
    "LoadProgress",
    "LocalModel",
    "ModelConfig",
    "list_local_models",
    "load_model",
    "read_model_config",
    "resolve_model",
]
