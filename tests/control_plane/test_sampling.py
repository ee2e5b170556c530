"""Sampling parameters of vLLM's class, and estimates of prompt lengths."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from sagellm_control_plane.admission import estimate_prompt_tokens
from sagellm_control_plane.sampling import as_sampling_params
from sagellm_protocol import DecodingStrategy, InvalidArgumentError, Request, SamplingParams, UnsupportedError


@dataclass
class ForeignSamplingParams:
    """The fields and defaults of vLLM's `SamplingParams`, as far as they matter here."""

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = field(default_factory=list)
    stop_token_ids: list[int] | None = field(default_factory=list)
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    bad_words: list[str] | None = None
    guided_decoding: Any = None
    logits_processors: Any = None


def test_our_own_parameters_pass_unchanged() -> None:
    own = SamplingParams(temperature=0.5)
    assert as_sampling_params(own) is own


def test_foreign_defaults_mean_what_they_mean_there() -> None:
    params = as_sampling_params(ForeignSamplingParams())
    assert params.strategy is DecodingStrategy.SAMPLING
    assert (params.temperature, params.max_tokens, params.top_k) == (1.0, 16, 0)
    model_defaults = SamplingParams(temperature=0.2, top_p=0.5, top_k=7)
    assert params.merged_over(model_defaults).top_p == 1.0


def test_foreign_greedy_stays_greedy_over_a_model_that_samples() -> None:
    params = as_sampling_params(ForeignSamplingParams(temperature=0.0, stop=["END"], seed=3))
    merged = params.merged_over(SamplingParams(temperature=0.7))
    assert merged.strategy is DecodingStrategy.GREEDY
    assert merged.stop == ("END",)
    assert merged.seed == 3


def test_what_we_do_not_have_is_refused_and_bad_values_too() -> None:
    with pytest.raises(UnsupportedError, match="bad_words is not supported"):
        as_sampling_params(ForeignSamplingParams(bad_words=["no"]))
    with pytest.raises(InvalidArgumentError, match="temperature must be >= 0"):
        as_sampling_params(ForeignSamplingParams(temperature=-1.0))


@pytest.mark.parametrize(
    ("fields", "num_tokens"),
    [
        ({"prompt": [1, 2, 3]}, 3),
        ({"prompt": "a" * 400}, 100),
        ({"prompt": "推理" * 100}, 150),
        ({"prompt": "a"}, 1),
        ({"messages": [{"role": "user", "content": "b" * 40}]}, 10),
    ],
)
def test_prompt_estimates(fields: dict[str, Any], num_tokens: int) -> None:
    assert estimate_prompt_tokens(Request(**fields)) == num_tokens
