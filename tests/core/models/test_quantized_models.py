"""Models in whole numbers: what `quantization` does to a checkpoint, and what a quantized GGUF file keeps of itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from tests.support.model_driver import prompt_logits
from tests.support.model_zoo import build

from sagellm_backend import CPUBackendProvider, QuantizedTensor
from sagellm_compression import get_quant_method
from sagellm_core.models import CausalLM, load_model
from sagellm_core.models.gguf_blocks import BLOCK_TYPES, read_blocks
from sagellm_core.models.loader import ParameterReader
from sagellm_core.tokenizer import load_tokenizer

SHARED = Path(os.environ.get("SAGELLM_SHARED", Path(__file__).parents[4] / "shared"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen2")
    build("qwen2", path)
    return path


def fake_quantized(path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> CausalLM:
    """The model with its weights quantized and dequantized, computed in float32: what the format allows at best."""
    method = get_quant_method(name)
    read: Callable[[ParameterReader, str], torch.Tensor | QuantizedTensor] = ParameterReader.weight

    def weight(reader: ParameterReader, key: str) -> torch.Tensor:
        stored = read(reader, key)
        assert isinstance(stored, torch.Tensor)
        return method.quantize(stored).dequantize()

    with monkeypatch.context() as patch:
        patch.setattr(ParameterReader, "weight", weight)
        return load_model(path, provider=CPUBackendProvider())


@pytest.mark.parametrize("name", ["int8", "int4", "int4-asym"])
def test_activations_in_bytes_add_little_to_the_error_of_the_weights(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = CPUBackendProvider()
    ids = torch.arange(3, 43)
    exact = prompt_logits(load_model(folder, provider=provider), provider, ids.tolist())
    best = prompt_logits(fake_quantized(folder, name, monkeypatch), provider, ids.tolist())
    ours = prompt_logits(load_model(folder, provider=provider, quantization=name), provider, ids.tolist())
    spread = exact.std()
    # Every layer rounds its activations to 1/127 of the row's peak: about one percent of noise a layer.
    assert (ours - best).std() < 0.1 * spread
    if name == "int8":
        assert (ours - exact).std() < 0.12 * spread


@pytest.mark.parametrize("native", [True, False])
def test_reference_and_native_ops_agree(folder: Path, native: bool) -> None:
    providers = CPUBackendProvider(native=native), CPUBackendProvider(native=False)
    ids = list(range(3, 30))
    ours, reference = (
        prompt_logits(load_model(folder, provider=provider, quantization="int4"), provider, ids)
        for provider in providers
    )
    # A float32 rounding may move an activation to the next byte: a step of 1/127 of a row, in a few places.
    assert (ours - reference).std() < 0.02 * reference.std()


def test_what_is_quantized_and_what_is_not(folder: Path) -> None:
    model = load_model(folder, provider=CPUBackendProvider(), quantization="int4")
    assert model.weight_formats == {"int4/g32": 3 * 4 + 1}  # qkv, o, gate_up, down of three layers; LM head
    plain = load_model(folder, provider=CPUBackendProvider())
    assert model.weight_bytes < 0.45 * plain.weight_bytes  # the untied embedding stays as it is


@pytest.mark.parametrize("type_name", BLOCK_TYPES)
def test_blocks_of_gguf_mean_what_the_gguf_package_says(type_name: str) -> None:
    generator = np.random.default_rng(0)
    shape = (6, 512)
    kind = GGMLQuantizationType[type_name]
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (shape[0] * shape[1] // per_block, block_bytes), dtype=np.uint8)
    halves = {"Q6_K": [208], "Q4_1": [0, 2], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2]}.get(type_name, [0])
    for offset in halves:
        values = (generator.random(len(blocks)) * 0.01 + 0.001).astype(np.float16)
        blocks[:, offset : offset + 2] = values.view(np.uint8).reshape(-1, 2)
    wanted = dequantize(blocks.reshape(-1), kind).reshape(shape)
    got = read_blocks(type_name, torch.from_numpy(blocks.reshape(-1).copy()), shape).dequantize().numpy()
    # K-quants multiply two scales, and the product is kept in float16.
    tolerance = 2**-10 * np.abs(wanted).max() if type_name.endswith("_K") else 0.0
    assert np.abs(got - wanted).max() <= tolerance


@pytest.mark.slow
@pytest.mark.parametrize("model_name", ["stories260K", "llama2xs"])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_perplexity_is_that_of_the_rounded_weights(model_name: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = SHARED / "models" / model_name
    if not path.is_dir():
        pytest.skip(f"{path} is absent: the real models lie beside the repository")
    text = (SHARED / "texts" / "tinystories" / "tinystories_val_794KB.txt").read_text(encoding="utf-8")
    tokenizer = load_tokenizer(path)
    provider = CPUBackendProvider()
    best_model = fake_quantized(path, name, monkeypatch)
    our_model = load_model(path, provider=provider, quantization=name)
    losses: dict[str, list[float]] = {"best": [], "ours": []}
    for start in range(0, 30_000, 1000):
        ids = tokenizer.encode(text[start : start + 1000])[: min(our_model.max_model_len, 256)]
        targets = torch.tensor(ids[1:])
        for key, model in (("best", best_model), ("ours", our_model)):
            logits = prompt_logits(model, provider, ids, blocks_per_request=16)[:-1]
            losses[key].append(torch.nn.functional.cross_entropy(logits, targets).item())
    best, ours = (float(np.exp(np.mean(losses[key]))) for key in ("best", "ours"))
    print(f"{model_name} {name}: perplexity {ours:.4f}, of the rounded weights in float arithmetic {best:.4f}")
    assert ours < best * 1.01
