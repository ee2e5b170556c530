"""Fixtures of the text side: tokenizers trained here, those of the shared folder, a model configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sagellm_core.tokenizer import FastBackend, Tokenizer
from small_tokenizers import byte_level_backend, sentencepiece_backend


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return Tokenizer(
        FastBackend(byte_level_backend()),
        special_tokens={"bos_token": "<|bos|>", "eos_token": "<|im_end|>"},
        chat_templates={
            "default": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        },
    )


@pytest.fixture(scope="session")
def sentencepiece() -> Tokenizer:
    return Tokenizer(FastBackend(sentencepiece_backend()), special_tokens={"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture(scope="session")
def tokenizers_by_name(
    byte_level: Tokenizer, sentencepiece: Tokenizer, request: pytest.FixtureRequest
) -> Callable[[str], Tokenizer]:
    """A tokenizer by name: trained here, or a path below the shared folder (skips where that is absent)."""
    loaded: dict[str, Tokenizer] = {"byte_level": byte_level, "sentencepiece": sentencepiece}

    def get(name: str) -> Tokenizer:
        if name not in loaded:
            from sagellm_core.tokenizer import load_tokenizer

            loaded[name] = load_tokenizer(Path(request.getfixturevalue("shared")) / name)
        return loaded[name]

    return get


@pytest.fixture
def model_config() -> Callable[..., Any]:
    """What the input processor reads of a `ModelConfig`."""

    def make(vocab_size: int, **fields: Any) -> Any:
        values = {"max_model_len": 512, "eos_token_ids": (2,), "generation_config": {}, **fields}
        spec = SimpleNamespace(vocab_size=vocab_size, hidden_size=64)
        return SimpleNamespace(spec=spec, pooling=SimpleNamespace(pooling="last"), is_embedding=False, **values)

    return make
