"""A model's tokenizer in the manager's process, for engines that run elsewhere: no hop to count a prompt's tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakValueDictionary

from sagellm_core.config import LLMEngineConfig
from sagellm_core.input_processor import InputProcessor
from sagellm_core.models import read_model_config, resolve_model
from sagellm_core.tokenizer import load_tokenizer
from sagellm_protocol import TokenizeRequest

# Longer texts are read beside the event loop: these take a millisecond.
_LONG_CHARS = 4096
_LONG_TOKENS = 4096

# Engines of one model share what is the same for them.
_loaded: WeakValueDictionary[Path, ModelTexts] = WeakValueDictionary()


class ModelTexts:
    """Splits texts and conversations into tokens and joins them again, as the engine itself does."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = load_tokenizer(path)
        model_config = read_model_config(path)
        self._input = InputProcessor(self._tokenizer, model_config, max_model_len=model_config.max_model_len)

    @classmethod
    async def of(cls, config: LLMEngineConfig) -> ModelTexts:
        """Those of an engine's model, whose files are here."""
        path = await asyncio.to_thread(resolve_model, config.model_path, revision=config.revision)
        texts = _loaded.get(path)
        if texts is None:
            texts = await asyncio.to_thread(cls, path)
            texts = _loaded.setdefault(path, texts)
        return texts

    async def tokenize(self, request: TokenizeRequest) -> list[int]:
        """The token ids of a text or a conversation."""
        num_chars = len(request.prompt or "") + sum(len(message.text) for message in request.messages or ())
        if num_chars > _LONG_CHARS:
            return await asyncio.to_thread(self._input.tokenize, request)
        return self._input.tokenize(request)

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of the tokens."""
        if len(token_ids) > _LONG_TOKENS:
            return await asyncio.to_thread(self._tokenizer.decode, token_ids, skip_special_tokens)
        return self._tokenizer.decode(token_ids, skip_special_tokens)

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token by itself."""
        return [self._tokenizer.token_text(token_id) for token_id in token_ids]
