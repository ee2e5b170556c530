"""The built-in model's vocabulary, and a way to write under a grammar without a model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from sagellm_core.models import read_model_config, resolve_model
from sagellm_core.structured.compiler import CompiledGrammar, CompileLimits
from sagellm_core.structured.vocabulary import Vocabulary
from sagellm_core.tokenizer import Tokenizer, load_tokenizer
from sagellm_protocol import StructuredOutput

Logits = Callable[[list[int]], NDArray[np.float64]]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer(resolve_model("builtin"))


@pytest.fixture(scope="session")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    config = read_model_config(resolve_model("builtin"))
    return Vocabulary(tokenizer, config.spec.vocab_size, tokenizer.eos_token_ids)


@pytest.fixture(scope="session")
def build(vocabulary: Vocabulary) -> Callable[..., CompiledGrammar]:
    def build(**form: object) -> CompiledGrammar:
        return CompiledGrammar(vocabulary, StructuredOutput.model_validate(form), CompileLimits())

    return build


@pytest.fixture(scope="session")
def write(vocabulary: Vocabulary) -> Callable[..., tuple[list[int], bool]]:
    """Write `max_tokens` greedily by `logits` (of the tokens so far): the tokens, and whether they are complete."""

    def write(grammar: CompiledGrammar, max_tokens: int, logits: Logits) -> tuple[list[int], bool]:
        matcher = grammar.start(max_tokens)
        token_ids: list[int] = []
        while len(token_ids) < max_tokens and not matcher.is_terminated:
            bits = np.unpackbits(matcher.allowed.view(np.uint8), bitorder="little")[: vocabulary.tokens.vocab_size]
            sampled = int(np.where(bits, logits(token_ids), -np.inf).argmax())
            token_ids.append(matcher.accept(sampled, max_tokens - len(token_ids) - 1))
        return token_ids, matcher.is_accepting

    return write


@pytest.fixture(scope="session")
def text_of(vocabulary: Vocabulary) -> Callable[[list[int]], str]:
    def text_of(token_ids: list[int]) -> str:
        symbols = [vocabulary.symbols_of(i) for i in token_ids if i not in vocabulary.eos_token_ids]
        return "".join(symbols).encode("latin-1").decode()

    return text_of
