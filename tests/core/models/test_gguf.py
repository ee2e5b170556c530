"""GGUF files give the same models as the folders they were made from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter

from gguf_zoo import GGUF_FAMILIES, write_gguf
from model_driver import prompt_logits
from model_zoo import VOCAB_SIZE, make_config, make_model
from sagellm_backend import BackendProvider
from sagellm_core.models import load_model, read_model_config
from sagellm_protocol.dtypes import DType
from sagellm_protocol.errors import InvalidArgumentError, UnsupportedError

PROMPT = torch.randint(3, VOCAB_SIZE, (40,), generator=torch.Generator().manual_seed(3)).tolist()

# GGUF leaves these to the reader, which must assume what the published models have.
ASSUMED: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": False},
    "gemma2": {"query_pre_attn_scalar": 24},
    "gemma3": {"query_pre_attn_scalar": 24, "sliding_window_pattern": 6, "num_hidden_layers": 7},
}


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A zoo model of a family with what GGUF readers assume."""
    import model_zoo

    def build(family: str, **changes: Any) -> Any:
        variants = {"assumed": (family, {**ASSUMED.get(family, {}), **changes})}
        monkeypatch.setattr(model_zoo, "_VARIANTS", variants)
        return make_model("assumed")

    return build


def assert_same_logits(model: Any, file: Path, provider: BackendProvider, **options: Any) -> None:
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0]
    loaded = load_model(file, provider=provider, max_model_len=40, **options)
    torch.testing.assert_close(prompt_logits(loaded, provider, PROMPT), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", GGUF_FAMILIES)
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_logits_equal_transformers(
    family: str, kind: str, tmp_path: Path, make: Callable[..., Any], provider: BackendProvider
) -> None:
    model, file = make(family), tmp_path / "model.gguf"
    write_gguf(model, file, matrices=GGMLQuantizationType[kind])
    assert_same_logits(model, file, provider, dtype=torch.float32)


def test_bfloat16_is_kept(tmp_path: Path, make: Callable[..., Any], provider: BackendProvider) -> None:
    model, file = make("llama"), tmp_path / "model.gguf"
    write_gguf(model, file, matrices=GGMLQuantizationType.BF16)
    assert read_model_config(file).dtype == DType.BF16
    assert load_model(file, provider=provider, max_model_len=40).weight_dtype == torch.bfloat16
    assert_same_logits(model, file, provider, dtype=torch.float32)


def test_quantized_weights_are_held_in_half_precision(
    tmp_path: Path, make: Callable[..., Any], provider: BackendProvider
) -> None:
    model, file = make("qwen2"), tmp_path / "model.gguf"
    write_gguf(model, file, matrices=GGMLQuantizationType.Q8_0)
    assert load_model(file, provider=provider, max_model_len=40).weight_dtype == torch.float16


def test_frequency_divisors_of_llama3(tmp_path: Path, make: Callable[..., Any], provider: BackendProvider) -> None:
    model, file = make("llama", rope_parameters=make_config("llama-llama3").rope_parameters), tmp_path / "m.gguf"
    rotary = model.model.rotary_emb
    plain, _ = rotary.compute_default_rope_parameters(model.config)
    write_gguf(model, file, rope_freqs=(plain / rotary.inv_freq).tolist())
    assert_same_logits(model, file, provider)


def test_metadata(tmp_path: Path, make: Callable[..., Any]) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(make("qwen3"), file)
    config = read_model_config(file)
    assert (config.architecture, config.dtype, config.max_model_len) == ("Qwen3ForCausalLM", DType.FP32, 256)
    assert config.eos_token_ids == (2, 5)
    assert config.spec.tie_word_embeddings
    assert config.spec.head_dim == 24


def test_unsupported_architecture(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match=r"'mamba' is not supported; supported: gemma2, .*qwen3"):
        read_model_config(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [({"llama.expert_count": 8}, "mixtures of experts"), ({"split.count": 2}, "gguf-split")],
)
def test_what_is_not_read(metadata: dict[str, int], message: str, tmp_path: Path, make: Callable[..., Any]) -> None:
    write_gguf(make("llama"), tmp_path / "model.gguf", **metadata)
    with pytest.raises(UnsupportedError, match=message):
        read_model_config(tmp_path / "model.gguf")


@pytest.mark.parametrize("keep", [0, 3, 40, 700, -1000])
def test_broken_file(keep: int, tmp_path: Path, make: Callable[..., Any], provider: BackendProvider) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(make("llama"), file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InvalidArgumentError, match=r"model\.gguf.*download"):
        load_model(file, provider=provider)


def test_other_file(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InvalidArgumentError, match=r"not a GGUF file"):
        read_model_config(tmp_path / "notes.txt")
