"""Sampling parameters of other engines' users, read as ours."""

from __future__ import annotations

from typing import Any

from sagellm_protocol import SamplingParams, UnsupportedError

# Fields of vLLM's class that change an answer and that we do not have.
_NOT_BUILT = ("allowed_token_ids", "bad_words", "guided_decoding", "logits_processors", "structured_outputs")


def as_sampling_params(params: Any) -> SamplingParams:
    """Our `SamplingParams` as it is; from any other object (vLLM's class) the fields of the same name.

    All of them count as given, defaults too: vLLM's temperature of 1 and 16 tokens mean what they mean there. A field
    that asks for what we do not have raises `UnsupportedError`, a value that we refuse `InvalidArgumentError`.
    """
    if isinstance(params, SamplingParams):
        return params
    for name in _NOT_BUILT:
        if getattr(params, name, None):
            raise UnsupportedError(f"sampling_params.{name} is not supported; leave it out", field=name)
    fields = {name: getattr(params, name, None) for name in SamplingParams.model_fields}
    return SamplingParams(**{name: value for name, value in fields.items() if value is not None})
