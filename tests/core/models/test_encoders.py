"""Every family of encoders computes what `transformers` computes, and no text's rows depend on its company."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from encoder_zoo import ENCODERS, VOCAB_SIZE, build_encoder
from sagellm_backend import BackendProvider, get_provider
from sagellm_core.models import EncoderModel, EncoderSpec, load_model, read_model_config
from sagellm_protocol import InvalidArgumentError, UnsupportedError

TOLERANCE = 1e-4


def make_text(length: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(5, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed))


def load(folder: Path, provider: BackendProvider, **options: Any) -> EncoderModel:
    model = load_model(folder, provider=provider, **options)
    assert isinstance(model, EncoderModel)
    return model


def rows(model: EncoderModel, *texts: torch.Tensor) -> list[torch.Tensor]:
    """The hidden states of each text, computed in one step."""
    lengths = [len(text) for text in texts]
    positions = torch.cat([torch.arange(length) for length in lengths])
    with torch.inference_mode():
        hidden = model.forward(torch.cat(texts), positions, [0, *accumulate(lengths)])
    return list(hidden.split(lengths))


def expected_rows(reference: Any, text: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        hidden: torch.Tensor = reference(text[None]).last_hidden_state[0]
    return hidden


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("length", [1, 40, 64])
def test_rows_equal_transformers(name: str, length: int, tmp_path: Path, provider: BackendProvider) -> None:
    reference, text = build_encoder(name, tmp_path), make_text(length)
    (hidden,) = rows(load(tmp_path, provider), text)
    torch.testing.assert_close(hidden, expected_rows(reference, text), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("native", [True, False])
def test_rows_do_not_depend_on_the_batch(name: str, native: bool, tmp_path: Path) -> None:
    build_encoder(name, tmp_path)
    model = load(tmp_path, get_provider("cpu", native=native))
    texts = [make_text(length, seed=length) for length in (1, 37, 3, 64, 12, 1, 20)]
    alone = [rows(model, text)[0] for text in texts]
    for company in (texts, texts[::-1]):
        for text, hidden in zip(company, rows(model, *company), strict=True):
            index = next(i for i, other in enumerate(texts) if other is text)
            assert torch.equal(hidden, alone[index])


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_smaller_weights(quantization: str, tmp_path: Path, provider: BackendProvider) -> None:
    reference = build_encoder("bert", tmp_path, dtype=torch.bfloat16).float()
    model, text = load(tmp_path, provider, quantization=quantization), make_text(30)
    expected = expected_rows(reference, text)
    (hidden,) = rows(model, text)
    assert model.weight_dtype == torch.bfloat16
    assert (hidden - expected).norm() < 0.05 * expected.norm()


def test_first_checkpoints_call_norms_gamma_and_beta(tmp_path: Path, provider: BackendProvider) -> None:
    reference, text = build_encoder("bert", tmp_path), make_text(20)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    save_file({**old, "embeddings.position_ids": torch.arange(66)[None]}, tmp_path / "model.safetensors")
    torch.testing.assert_close(
        rows(load(tmp_path, provider), text)[0], expected_rows(reference, text), atol=TOLERANCE, rtol=0
    )


def test_nomics_own_configuration_fields(tmp_path: Path, provider: BackendProvider) -> None:
    reference, text = build_encoder("nomic_bert", tmp_path), make_text(40)
    config = {
        "architectures": ["NomicBertModel"],
        "model_type": "nomic_bert",
        "activation_function": "swiglu",
        "vocab_size": VOCAB_SIZE,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_inner": 96,
        "n_positions": 8192,
        "max_trained_positions": 2048,
        "rotary_emb_base": 1000,
        "rotary_emb_fraction": 1.0,
        "type_vocab_size": 2,
        "layer_norm_epsilon": 1e-12,
        "prenorm": False,
        "qkv_proj_bias": False,
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model_config(tmp_path).max_model_len == 2048
    torch.testing.assert_close(
        rows(load(tmp_path, provider), text)[0], expected_rows(reference, text), atol=TOLERANCE, rtol=0
    )


@pytest.mark.parametrize(("name", "length"), [("bert", 66), ("roberta", 64), ("xlm-roberta", 64)])
def test_how_far_positions_reach(name: str, length: int, tmp_path: Path) -> None:
    build_encoder(name, tmp_path)
    config = read_model_config(tmp_path)
    assert (config.max_model_len, config.is_embedding) == (length, True)
    assert config.pooling.pooling == "mean"
    assert config.pooling.normalize


@pytest.mark.parametrize("name", ENCODERS)
def test_the_size_is_counted(name: str, tmp_path: Path) -> None:
    reference = build_encoder(name, tmp_path)
    spec = read_model_config(tmp_path).spec
    assert isinstance(spec, EncoderSpec)
    matrices = sum(
        parameter.numel()
        for key, parameter in reference.named_parameters()
        if parameter.dim() == 2 and "pooler" not in key
    )
    assert spec.num_parameters == matrices


@pytest.mark.parametrize(
    ("name", "fields", "error", "problem"),
    [
        ("bert", {"position_embedding_type": "relative_key"}, UnsupportedError, "relative_key"),
        ("bert", {"is_decoder": True}, UnsupportedError, "is_decoder"),
        ("bert", {"hidden_act": "silu"}, InvalidArgumentError, "must be a GELU"),
        ("bert", {"num_attention_heads": 7}, InvalidArgumentError, "must divide hidden_size"),
        ("bert", {"intermediate_size": 95}, InvalidArgumentError, "config.json asks for"),
        ("bert", {"num_hidden_layers": 4}, InvalidArgumentError, "missing"),
        ("nomic_bert", {"prenorm": True}, UnsupportedError, "nomic-embed-text"),
    ],
)
def test_what_is_wrong_or_not_built_is_refused(
    name: str, fields: dict[str, Any], error: type[Exception], problem: str, tmp_path: Path, provider: BackendProvider
) -> None:
    build_encoder(name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(error, match=problem):
        load(tmp_path, provider)
