"""Our requests in vLLM's words."""

from __future__ import annotations

from typing import Any

from sagellm_protocol import DecodingStrategy, Request, SamplingParams, StructuredOutput, UnsupportedError

# Fields that vLLM has under the same names and with the same meaning.
_SAME = (
    "n",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "max_tokens",
    "min_tokens",
    "seed",
    "ignore_eos",
    "logprobs",
    "prompt_logprobs",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "logit_bias",
)
_SAMPLING_ONLY = ("temperature", "top_p", "top_k", "min_p")


def to_vllm(request: Request, sampling: SamplingParams) -> Any:
    """vLLM's `SamplingParams` for a request with these resolved parameters; tokens come as they are made.

    Raises `UnsupportedError` for adapters. An answer that another engine began is refused before (`ForeignEngine`),
    because vLLM's sampler starts from its seed, wherever the answer stands.
    """
    from vllm.sampling_params import RequestOutputKind
    from vllm.sampling_params import SamplingParams as Params

    if request.lora is not None:
        raise UnsupportedError("lora is not supported on vLLM here; load the merged model instead", field="lora")
    fields: dict[str, Any] = {name: getattr(sampling, name) for name in _SAME}
    if sampling.strategy is DecodingStrategy.GREEDY:
        fields["temperature"] = 0.0
    else:
        fields |= {name: getattr(sampling, name) for name in _SAMPLING_ONLY}
    fields["stop"] = list(sampling.stop)
    fields["stop_token_ids"] = list(sampling.stop_token_ids)
    if request.structured_output is not None:
        fields["structured_outputs"] = _form(request.structured_output)
    return Params(output_kind=RequestOutputKind.DELTA, **fields)


def as_deltas(params: Any) -> Any:
    """vLLM's own parameters, with tokens as they are made."""
    from vllm.sampling_params import RequestOutputKind

    copy = params.clone()
    copy.output_kind = RequestOutputKind.DELTA
    return copy


def _form(wanted: StructuredOutput) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    return StructuredOutputsParams(
        json=wanted.json_schema,
        regex=wanted.regex,
        choice=wanted.choice,
        grammar=wanted.grammar,
        json_object=wanted.json_object or None,
    )
