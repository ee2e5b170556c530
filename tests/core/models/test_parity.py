"""Every family computes what `transformers` computes, and a request's rows never depend on its company."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_driver import ModelDriver, prompt_logits
from model_zoo import FAMILIES, VARIANTS, VOCAB_SIZE, build
from sagellm_backend import BackendProvider
from sagellm_core.models import CausalLM, load_model

TOLERANCE = 1e-4
PROMPT_LENGTH = 40


def make_prompt(length: int = PROMPT_LENGTH, seed: int = 3) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
    return ids


def expected_logits(model: Any, prompt: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([prompt])).logits[0]
    return logits


def load(folder: Path, provider: BackendProvider, **options: Any) -> CausalLM:
    return load_model(folder, provider=provider, max_model_len=PROMPT_LENGTH, **options)


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
def test_logits_equal_transformers(family: str, tmp_path: Path, provider: BackendProvider) -> None:
    reference = build(family, tmp_path)
    prompt = make_prompt()
    logits = prompt_logits(load(tmp_path, provider), provider, prompt)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected_logits(reference, prompt), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_do_not_depend_on_batch_and_chunks(family: str, tmp_path: Path, provider: BackendProvider) -> None:
    build(family, tmp_path)
    model = load(tmp_path, provider)
    prompts = [make_prompt(23, seed=1), make_prompt(PROMPT_LENGTH, seed=2), make_prompt(11, seed=4)]
    alone = [prompt_logits(model, provider, prompt) for prompt in prompts]
    driver = ModelDriver(model, provider, num_requests=3, block_size=32)
    first, second, third = prompts
    # Decodes of one request beside chunks of the others, in steps of different shapes.
    steps = [
        [(0, first[:22]), (1, second[:7])],
        [(0, first[22:]), (2, third[:10]), (1, second[7:20])],
        [(2, third[10:]), (1, second[20:])],
    ]
    rows: list[list[torch.Tensor]] = [[], [], []]
    for step in steps:
        logits = driver.logits(step)
        for (request, _), part in zip(step, logits.split([len(tokens) for _, tokens in step]), strict=True):
            rows[request].append(part)
    for request, parts in enumerate(rows):
        assert torch.equal(torch.cat(parts), alone[request])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.04), (torch.float16, 0.005)])
def test_half_precision_checkpoints(
    family: str, dtype: torch.dtype, tolerance: float, tmp_path: Path, provider: BackendProvider
) -> None:
    reference = build(family, tmp_path, dtype=dtype).float()  # rounded weights, exact arithmetic
    prompt = make_prompt()
    expected = expected_logits(reference, prompt)
    exact = prompt_logits(load(tmp_path, provider, dtype=torch.float32), provider, prompt)
    torch.testing.assert_close(exact, expected, atol=TOLERANCE, rtol=0)
    model = load(tmp_path, provider)
    assert model.weight_dtype == dtype
    logits = prompt_logits(model, provider, prompt)
    # Kernels may round a product's inputs to the dtype of the weights.
    assert (logits - expected).norm() < tolerance * expected.norm()


def test_dtype_argument_overrides_the_checkpoint(tmp_path: Path, provider: BackendProvider) -> None:
    build("llama", tmp_path)
    wide, narrow = load(tmp_path, provider), load(tmp_path, provider, dtype=torch.bfloat16)
    assert narrow.weight_dtype == torch.bfloat16
    assert narrow.weight_bytes < 0.6 * wide.weight_bytes


@pytest.mark.parametrize("family", ["gemma3", "llama", "mixtral", "phi3"])
def test_sharded_checkpoint(family: str, tmp_path: Path, provider: BackendProvider) -> None:
    reference = build(family, tmp_path / "whole")
    reference.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    prompt = make_prompt()
    logits = prompt_logits(load(tmp_path, provider), provider, prompt)
    torch.testing.assert_close(logits, expected_logits(reference, prompt), atol=TOLERANCE, rtol=0)


# As transformers 4 wrote them: flat rope fields, torch_dtype, patterns instead of layer types.
OLD_FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (
        "gemma3",
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 3, "torch_dtype": "float32"},
    ),
    "gemma3-linear": (
        "gemma3-linear",
        {
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window_pattern": 3,
        },
    ),
    "gpt_neox": ("gpt_neox", {"rotary_emb_base": 10000, "rotary_pct": 0.25, "torch_dtype": "float32"}),
    "llama3": (
        "llama-llama3",
        {
            "rope_theta": 10000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "mistral": ("mistral", {"rope_theta": 10000.0, "torch_dtype": "float32"}),
    "phi3": (
        "phi3",
        {
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "rope_scaling": {
                "type": "su",
                "short_factor": [1.0, 1.05, 1.1, 1.3],
                "long_factor": [1.2, 2.0, 4.5, 9.0],
            },
        },
    ),
    "qwen2": ("qwen2", {"rope_theta": 10000.0, "torch_dtype": "float32"}),
    "smollm3": ("smollm3", {"rope_theta": 2000000.0}),
    "yarn": (
        "llama-yarn",
        {
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
    ),
}


@pytest.mark.parametrize("name", OLD_FORMS)
def test_older_configurations_mean_the_same(name: str, tmp_path: Path, provider: BackendProvider) -> None:
    family, fields = OLD_FORMS[name]
    reference = build(family, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("rope_parameters", "dtype", "layer_types", "no_rope_layers"):
        config.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps({**config, **fields}))
    prompt = make_prompt()
    logits = prompt_logits(load(tmp_path, provider), provider, prompt)
    torch.testing.assert_close(logits, expected_logits(reference, prompt), atol=TOLERANCE, rtol=0)


def rewrite_weights(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def test_first_gpt2_checkpoints_have_no_prefix_and_hold_masks(tmp_path: Path, provider: BackendProvider) -> None:
    reference = build("gpt2", tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items() if "lm_head" not in name}
        return {**old, "h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.1.attn.masked_bias": torch.tensor(-1e4)}

    rewrite_weights(tmp_path, change)
    prompt = make_prompt()
    logits = prompt_logits(load(tmp_path, provider), provider, prompt)
    torch.testing.assert_close(logits, expected_logits(reference, prompt), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["embed_out.weight", "lm_head.weight"])
def test_both_names_of_the_gpt_neox_output_projection(name: str, tmp_path: Path, provider: BackendProvider) -> None:
    reference = build("gpt_neox", tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        (stored,) = {"embed_out.weight", "lm_head.weight"} & set(tensors)
        tensors[name] = tensors.pop(stored)
        return {**tensors, "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2)}

    rewrite_weights(tmp_path, change)
    prompt = make_prompt()
    logits = prompt_logits(load(tmp_path, provider), provider, prompt)
    torch.testing.assert_close(logits, expected_logits(reference, prompt), atol=TOLERANCE, rtol=0)


def test_stored_copy_of_a_tied_embedding_is_ignored(tmp_path: Path, provider: BackendProvider) -> None:
    reference = build("qwen3", tmp_path)
    rewrite_weights(
        tmp_path, lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    )
    prompt = make_prompt()
    logits = prompt_logits(load(tmp_path, provider), provider, prompt)
    torch.testing.assert_close(logits, expected_logits(reference, prompt), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_text_part_of_multimodal_gemma3(prefix: str, tmp_path: Path, provider: BackendProvider) -> None:
    reference = build("gemma3", tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        text = {prefix + name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        return {**text, "vision_tower.x.weight": torch.ones(2), "multi_modal_projector.y": torch.ones(2)}

    rewrite_weights(tmp_path, change)
    text_config = json.loads((tmp_path / "config.json").read_text())
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text_config, "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    prompt = make_prompt()
    logits = prompt_logits(load(tmp_path, provider), provider, prompt)
    torch.testing.assert_close(logits, expected_logits(reference, prompt), atol=TOLERANCE, rtol=0)
