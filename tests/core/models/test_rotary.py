"""Rotary tables equal transformers' to the last bit; length-dependent scalings are settled by the admitted length."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model_zoo import make_config, make_model
from sagellm_core.layers.rotary import inverse_frequencies
from sagellm_core.models.hf_config import HFConfig
from sagellm_core.models.registry import get_family
from sagellm_core.models.spec import DecoderSpec, RopeScaling, RopeSpec

NAMES = ("llama", "llama-linear", "llama-llama3", "llama-yarn", "llama-yarn-mscale", "phi3", "gpt_neox")


def spec_of(name: str) -> DecoderSpec:
    config: dict[str, Any] = make_config(name).to_dict()
    classes = {"llama": "LlamaForCausalLM", "phi3": "Phi3ForCausalLM", "gpt_neox": "GPTNeoXForCausalLM"}
    return get_family(classes[name.split("-")[0]]).spec(HFConfig(config, "config.json"))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_frequencies_equal_transformers(name: str) -> None:
    rope = spec_of(name).layers[0].rope
    assert rope is not None
    model = make_model(name)
    rotary = (model.gpt_neox if name == "gpt_neox" else model.model).rotary_emb
    assert torch.equal(inverse_frequencies(rope, 40), rotary.inv_freq)
    factor = rope.scaling.attention_factor if rope.scaling else 1.0
    assert factor == pytest.approx(rotary.attention_scaling, abs=0, rel=1e-15)


def test_longrope_uses_long_factors_where_longer_sequences_are_admitted() -> None:
    scaling = RopeScaling("longrope", 4.0, 64, short_factors=(1.0, 2.0), long_factors=(3.0, 4.0))
    rope = RopeSpec(10000.0, 4, scaling)
    plain = inverse_frequencies(RopeSpec(10000.0, 4), 64)
    assert torch.allclose(inverse_frequencies(rope, 64), plain / torch.tensor([1.0, 2.0]))
    assert torch.allclose(inverse_frequencies(rope, 65), plain / torch.tensor([3.0, 4.0]))


def test_dynamic_scaling_stretches_with_the_admitted_length_only() -> None:
    rope = RopeSpec(10000.0, 8, RopeScaling("dynamic", 2.0, 64))
    plain = inverse_frequencies(RopeSpec(10000.0, 8), 64)
    assert torch.equal(inverse_frequencies(rope, 32), plain)
    assert torch.equal(inverse_frequencies(rope, 64), plain)
    assert (inverse_frequencies(rope, 128)[1:] < plain[1:]).all()
