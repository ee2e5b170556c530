"""Our requests in LMDeploy's words."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from sagellm_protocol import DecodingStrategy, Request, SamplingParams, StructuredOutput, UnsupportedError

MAX_SEED = 2**32
"""LMDeploy's sampler takes no more bits."""

_MAX_TEMPERATURE = 2.0
_METACHARACTERS = re.compile(r"([\\^$.|?*+()\[\]{}])")

# What LMDeploy has no like of, and the value at which a request doesn't ask for it.
_UNKNOWN: dict[str, Any] = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": None,
    "prompt_logprobs": None,
}


def to_lmdeploy(
    request: Request, sampling: SamplingParams, seed: int, end_token_ids: Collection[int], *, shares_prefixes: bool
) -> Any:
    """LMDeploy's `GenerationConfig` for a request with these resolved parameters.

    `end_token_ids` are the model's own. Stop strings are not among it: LMDeploy knows only such as are one token, so
    they are found in the text here. Raises `UnsupportedError` for what LMDeploy doesn't do.
    """
    from lmdeploy.messages import GenerationConfig

    _refuse(request, sampling, shares_prefixes)
    is_greedy = sampling.strategy is DecodingStrategy.GREEDY or sampling.temperature == 0
    fields: dict[str, Any] = {
        "max_new_tokens": sampling.max_tokens,
        "min_new_tokens": sampling.min_tokens or None,
        # With `do_sample` off it would forget the penalty; the best of one is the same choice.
        "do_sample": not is_greedy or sampling.repetition_penalty != 1,
        "top_k": 1 if is_greedy else sampling.top_k,
        "temperature": 1.0 if is_greedy else sampling.temperature,
        "repetition_penalty": sampling.repetition_penalty,
        "random_seed": seed,
        "ignore_eos": sampling.ignore_eos,
        "stop_token_ids": sorted({*sampling.stop_token_ids, *end_token_ids}) or None,
        "skip_special_tokens": sampling.skip_special_tokens,
        "include_stop_str_in_output": True,  # or the token that ends an answer would be kept from us
    }
    if not is_greedy:
        fields |= {"top_p": sampling.top_p, "min_p": sampling.min_p}
    if sampling.logprobs is not None:
        fields["logprobs"] = max(1, sampling.logprobs)  # of none it would tell nothing of the chosen token either
    if request.structured_output is not None:
        fields["response_format"] = _form(request.structured_output)
    return GenerationConfig(**fields)


def _refuse(request: Request, sampling: SamplingParams, shares_prefixes: bool) -> None:
    for name, neutral in _UNKNOWN.items():
        if getattr(sampling, name) != neutral:
            raise UnsupportedError(f"LMDeploy has no {name}; leave it out, or use another engine", field=name)
    if sampling.temperature > _MAX_TEMPERATURE:
        raise UnsupportedError(
            f"LMDeploy takes temperatures up to {_MAX_TEMPERATURE:g}, got {sampling.temperature:g}; lower it",
            field="temperature",
        )
    if sampling.ignore_eos and sampling.stop_token_ids:
        raise UnsupportedError(
            "LMDeploy's ignore_eos ignores stop_token_ids too; give one of them", field="stop_token_ids"
        )
    if request.cache_salt is not None and shares_prefixes:
        raise UnsupportedError(
            "LMDeploy shares cached prefixes whatever cache_salt says; set enable_prefix_caching to false, or leave "
            "cache_salt out",
            field="cache_salt",
        )


def _form(wanted: StructuredOutput) -> dict[str, Any]:
    if wanted.json_object:
        return {"type": "json_object"}
    if wanted.json_schema is not None:
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted.json_schema}}
    if wanted.regex is not None:
        return {"type": "regex_schema", "regex_schema": wanted.regex}
    if wanted.choice is not None:
        choices = "|".join(_METACHARACTERS.sub(r"\\\1", text) for text in wanted.choice)
        return {"type": "regex_schema", "regex_schema": f"({choices})"}
    raise UnsupportedError(
        "LMDeploy takes no grammar; give a regex or json_schema instead", field="structured_output.grammar"
    )
