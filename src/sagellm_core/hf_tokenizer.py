"""Tokenizers that only `transformers` can read: folders without a `tokenizer.json`. The only module that imports it.

Most of them (SentencePiece and tiktoken models) are converted while loading, so that the rest runs on `tokenizers` as
everywhere else; those written in Python stay behind `SlowBackend`. Code from the folder is never run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sagellm_core.tokenizer import FastBackend, Tokenizer, TokenizerBackend, named_chat_templates
from sagellm_protocol.errors import InvalidArgumentError, NotFoundError, UnavailableError

__all__ = ["SlowBackend", "load_hf_tokenizer"]

_KNOWN_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json", "tokenizer_config.json")


class SlowBackend:
    """A tokenizer of `transformers` that is written in Python."""

    decoder_state: Mapping[str, Any] | None = {"type": "transformers"}  # no chain of `tokenizers` steps
    definition: str | None = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.special_token_ids = frozenset(int(token_id) for token_id in tokenizer.all_special_ids)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [int(token_id) for token_id in self._tokenizer.encode(text, add_special_tokens=add_special_tokens)]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        text = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return str(text)

    def id_to_token(self, token_id: int) -> str | None:
        if not 0 <= token_id < self.vocab_size:
            return None
        return str(self._tokenizer.convert_ids_to_tokens(token_id))

    def token_to_id(self, token: str) -> int | None:
        token_id = self._tokenizer.convert_tokens_to_ids(token)
        return None if token_id is None else int(token_id)


def load_hf_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a model folder through `transformers`.

    Raises `NotFoundError` if the folder holds no tokenizer, `UnavailableError` if `transformers` is not installed and
    `InvalidArgumentError` if it cannot read what is there.
    """
    if not any((folder / name).is_file() for name in _KNOWN_FILES):
        raise NotFoundError(
            f"{folder} holds no tokenizer (tokenizer.json or tokenizer.model); download the model's tokenizer files",
            path=str(folder),
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UnavailableError(
            f"{folder} has no tokenizer.json, and other tokenizers need transformers; run: pip install 'isagellm[hf]'",
            path=str(folder),
        ) from error
    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the tokenizer's own class raises
        raise InvalidArgumentError(
            f"transformers cannot read the tokenizer in {folder}: {error}; convert it to tokenizer.json "
            "(save_pretrained of a machine where it loads writes one)",
            path=str(folder),
        ) from error
    fast = getattr(loaded, "backend_tokenizer", None)
    backend: TokenizerBackend = SlowBackend(loaded) if fast is None else FastBackend(fast)
    return Tokenizer(
        backend,
        special_tokens={name: str(text) for name, text in loaded.special_tokens_map.items() if isinstance(text, str)},
        chat_templates=named_chat_templates(loaded.chat_template),
    )
