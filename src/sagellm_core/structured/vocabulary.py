"""A model's tokens as the grammar library sees them, and the same text as single bytes.

A *symbol* is a byte, or a token that a grammar may name as such: a special token, or one that was added to the model's
vocabulary (a mark of a tool call). Texts of symbols are Python strings: characters below 256 are bytes, those from 256
on tokens. Completions are searched for symbol by symbol, in a vocabulary of some hundred entries, and then written with
as few of the model's tokens as will do.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Sequence
from typing import Any

import msgspec
from llguidance import LLTokenizer, TokenizerWrapper

from sagellm_core.tokenizer import Tokenizer
from sagellm_protocol import UnsupportedError

NUM_BYTES = 256
# Longer tokens (runs of blanks, mostly) would cost more to look for than they save.
_LONGEST_TOKEN = 24
_UNWRITABLE = 1 << 30
_TOKEN_RANGE = re.compile(r"<\[([^\]]*)\]>")


class Vocabulary:
    """Built once for a model, which takes about a second for 150,000 tokens; read-only afterwards.

    Raises:
        UnsupportedError: the model's tokenizer is not one of the library `tokenizers`, or not made of bytes.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        definition = tokenizer.definition
        if definition is None:
            raise UnsupportedError(
                "structured output needs a tokenizer.json; convert the tokenizer (save_pretrained writes one)"
            )
        self.eos_token_ids = frozenset(eos_token_ids)
        known = max(tokenizer.vocab_size, vocab_size)
        try:
            self.tokens = LLTokenizer(definition, n_vocab=known, eos_token=sorted(eos_token_ids) or None)
        except ValueError as error:
            raise UnsupportedError(f"structured output cannot use this model's tokenizer: {error}") from error
        added = [token_id for token_id in _added_token_ids(definition) if token_id < known]
        named = sorted(
            {*added, *self.eos_token_ids, *filter(self.tokens.is_special_token, range(tokenizer.vocab_size))}
        )
        self._named = {token_id: chr(NUM_BYTES + i) for i, token_id in enumerate(named)}
        #: Added tokens that are text where a grammar does not name them, as symbols for where it does.
        self.marks = {
            token_id: symbol
            for token_id, symbol in self._named.items()
            if token_id not in self.eos_token_ids and not self.tokens.is_special_token(token_id)
        }
        self._token_ids = self._read_tokens(min(tokenizer.vocab_size, vocab_size))
        self._symbols: dict[int, str] = {}
        self.symbols = _symbol_tokenizer(self.tokens, named, self.eos_token_ids)
        self.eos_symbols = frozenset(self.symbols.eos_tokens)
        self.eos_symbol = min(self.eos_symbols)
        self.longest_token = min(_LONGEST_TOKEN, max(map(len, self._token_ids), default=1))

    def _read_tokens(self, num_tokens: int) -> dict[str, int]:
        """Symbols -> the lowest id of a token that writes them."""
        token_ids: dict[str, int] = {}
        for token_id in range(num_tokens):
            text = self._named.get(token_id) or self.tokens.decode_bytes([token_id]).decode("latin-1")
            if text:
                token_ids.setdefault(text, token_id)
            if token_id % 256 == 0:
                time.sleep(0)  # other threads' turn: this one is not urgent
        return token_ids

    def symbols_of(self, token_id: int) -> str:
        """What a token writes where no grammar names it; nothing for an id that no token has."""
        symbols = self._symbols.get(token_id)
        if symbols is None:
            symbols = None if token_id in self.marks else self._named.get(token_id)
            if symbols is None:
                symbols = self.tokens.decode_bytes([token_id]).decode("latin-1")
            self._symbols[token_id] = symbols
        return symbols

    def token_of(self, symbols: str) -> int:
        """The token that writes exactly `symbols`, which `prepend` found to exist."""
        return self._token_ids[symbols]

    def prepend(
        self, symbols: str, costs: Sequence[int], lengths: Sequence[int], num_new: int
    ) -> tuple[list[int], list[int]]:
        """The fewest tokens that write each end of `symbols`, whose ends behind the first `num_new` are known.

        `costs[i]` tokens write `symbols[num_new + i:]`, the first of them `lengths[i]` symbols. Returns both for all of
        `symbols`. Equally short ways: the one with the longest first token.
        """
        costs, lengths = [0] * num_new + [*costs], [0] * num_new + [*lengths]
        token_ids, size = self._token_ids, len(symbols)
        for start in range(num_new - 1, -1, -1):
            best, best_length = _UNWRITABLE, 1
            for end in range(start + 1, min(start + self.longest_token, size) + 1):
                if costs[end] < best and symbols[start:end] in token_ids:
                    best, best_length = costs[end], end - start
                elif costs[end] == best and best < _UNWRITABLE and symbols[start:end] in token_ids:
                    best_length = end - start
            costs[start], lengths[start] = min(best + 1, _UNWRITABLE), best_length
        return costs, lengths

    def translate(self, grammar: str) -> str | None:
        """A grammar that names tokens by number, for the symbols; None where it names one that is not a symbol."""
        try:
            return _TOKEN_RANGE.sub(lambda match: f"<[{self._translate_range(match[1])}]>", grammar)
        except (KeyError, ValueError):
            return None

    def _translate_range(self, text: str) -> str:
        first_last = [part.split("-", 1) for part in text.split(",")]
        token_ids = (i for part in first_last for i in range(int(part[0]), int(part[-1]) + 1))
        return ",".join(str(ord(self._named[token_id])) for token_id in token_ids)


class _Symbols:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], eos: int) -> None:
        self.tokens = tokens
        self.eos_token_id = eos
        self.special_token_ids = list(range(NUM_BYTES, len(tokens)))

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


class _Added(msgspec.Struct):
    id: int


class _Definition(msgspec.Struct):
    """What is read of a `tokenizer.json`."""

    added_tokens: list[_Added] = []


def _added_token_ids(definition: str) -> list[int]:
    return [token.id for token in msgspec.json.decode(definition, type=_Definition).added_tokens]


def _symbol_tokenizer(tokens: Any, named: Sequence[int], eos_token_ids: frozenset[int]) -> Any:
    texts = [bytes([byte]) for byte in range(NUM_BYTES)]
    texts += [b"\xff" + tokens.decode_bytes([token_id]) for token_id in named]
    eos = [NUM_BYTES + i for i, token_id in enumerate(named) if token_id in eos_token_ids]
    if not eos:
        eos = [len(texts)]
        texts.append(b"\xff<|no end token|>")
    return LLTokenizer(TokenizerWrapper(_Symbols(texts, eos[0])), eos_token=eos)
