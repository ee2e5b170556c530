"""The files of the built-in model: complete, small, and in agreement with each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

FOLDER = Path(__file__).resolve().parents[2] / "src" / "sagellm_core" / "models" / "builtin"
FILES = (
    "MODEL_CARD.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def test_all_files_are_there_and_small() -> None:
    assert sorted(path.name for path in FOLDER.iterdir() if not path.name.startswith((".", "__"))) == sorted(FILES)
    assert sum((FOLDER / name).stat().st_size for name in FILES) <= 14_000_000


def test_weights_match_the_configuration(config: dict[str, Any]) -> None:
    with safe_open(str(FOLDER / "model.safetensors"), framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        dtypes = {str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118
    hidden = config["hidden_size"]
    assert dtypes == {"BF16"}
    assert config["torch_dtype"] == "bfloat16"
    assert shapes["model.embed_tokens.weight"] == (config["vocab_size"], hidden)
    assert shapes["model.norm.weight"] == (hidden,)
    assert len(shapes) == 2 + 9 * config["num_hidden_layers"]
    key_width = config["num_key_value_heads"] * config["head_dim"]
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (key_width, hidden)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (hidden, config["intermediate_size"])


def test_special_tokens_agree(config: dict[str, Any], tokenizer: Tokenizer) -> None:
    ends = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    generation = json.loads((FOLDER / "generation_config.json").read_text(encoding="utf-8"))
    assert config["eos_token_id"] == ends
    assert generation["eos_token_id"] == ends
    assert tokenizer.get_vocab_size() == config["vocab_size"]


@pytest.mark.parametrize(
    "text", ["What is LLM inference?", "什么是大模型推理？", "a\n\n  b\tc é 🙂", "`sage-llm run -p`"]
)
def test_tokenizer_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_chat_template_writes_chatml(tokenizer: Tokenizer) -> None:
    source = json.loads((FOLDER / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = jinja2.Template(source).render(messages=messages, add_generation_prompt=True)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode(text).tokens.count("<|im_start|>") == 3
    closed = jinja2.Template(source).render(messages=messages, add_generation_prompt=False)
    assert closed == text.removesuffix("<|im_start|>assistant\n")


def test_model_card_names_its_sources() -> None:
    card = (FOLDER / "MODEL_CARD.md").read_text(encoding="utf-8")
    for word in ("CDLA-Sharing-1.0", "CC BY 4.0", "BSD-3-Clause", "Apache", "seed", "perplexity", "held-out"):
        assert word.lower() in card.lower(), word
    assert "/tmp/" not in card
    assert "/work/" not in card
