"""A vocabulary with the families' marks, and a writer who writes anything that a grammar allows."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from tokenizers import AddedToken

from sagellm_core.structured.compiler import CompiledGrammar, CompileLimits
from sagellm_core.structured.vocabulary import Vocabulary
from sagellm_core.tokenizer import FastBackend, Tokenizer
from sagellm_gateway.reasoning import FORMATS as REASONING
from sagellm_gateway.tool_formats import FORMATS
from sagellm_protocol import StructuredOutput
from small_tokenizers import byte_level_backend

Writer = Callable[[StructuredOutput, int], str]


MARKS = sorted({mark for form in (*FORMATS, *REASONING) for mark in form.marks})


@pytest.fixture(scope="session", params=["tokens", "spelled"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """That of a model with a token for each mark, and that of one which must spell them."""
    backend = byte_level_backend()
    if request.param == "tokens":
        backend.add_tokens([AddedToken(mark, special=mark.startswith("["), normalized=False) for mark in MARKS])
    return Tokenizer(FastBackend(backend), special_tokens={"eos_token": "<|im_end|>"})


@pytest.fixture(scope="session")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)


@pytest.fixture(scope="session")
def token_ids(tokenizer: Tokenizer) -> Mapping[str, int]:
    """The marks that are tokens."""
    return {mark: token_id for mark in MARKS if (token_id := tokenizer.token_to_id(mark)) is not None}


@pytest.fixture(scope="session")
def write(tokenizer: Tokenizer, vocabulary: Vocabulary) -> Writer:
    """Text of a form, each token drawn by chance from all that are allowed; `seed` makes it the same again."""

    def write(form: StructuredOutput, seed: int, max_tokens: int = 300) -> str:
        matcher = CompiledGrammar(vocabulary, form, CompileLimits()).start(max_tokens)
        chance, token_ids = random.Random(seed), list[int]()
        while len(token_ids) < max_tokens and not matcher.is_terminated:
            allowed = np.flatnonzero(np.unpackbits(matcher.allowed.view(np.uint8), bitorder="little"))
            token_ids.append(matcher.accept(int(chance.choice(allowed)), max_tokens - len(token_ids) - 1))
        assert matcher.is_accepting
        return tokenizer.decode([i for i in token_ids if i not in tokenizer.eos_token_ids], skip_special_tokens=False)

    return write
