"""From the protocol's sampling parameters to `transformers`' `generate`, and from its tokens to text.

Holds what `hf_cuda` needs of transformers besides the engine itself: `generation_options` translates parameters,
`HFGenerator` runs one generation in the calling thread, `TextStream` turns tokens into chunks.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from sagellm_protocol import DecodingStrategy, FinishReason, SamplingParams, UnsupportedError

TokenSink = Callable[[list[int]], None]


class Generator(Protocol):
    """What produces tokens: a transformers model, or the mock."""

    def encode(self, prompt: str | Sequence[int] | list[dict[str, Any]], tools: list[Any] | None) -> list[int]:
        """Token ids of a text, of ready ids (returned as they are), or of chat messages."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids."""

    def generate(
        self, prompt_ids: list[int], params: SamplingParams, emit: TokenSink, cancelled: threading.Event
    ) -> FinishReason:
        """Give new tokens to `emit` as they come, until done or `cancelled`; runs in the calling thread."""


def check_supported(params: SamplingParams) -> None:
    """Refuse what `generate` can't do; raises UnsupportedError that names the field."""
    asked = {
        "n": params.n > 1,
        "logprobs": params.logprobs is not None,
        "prompt_logprobs": params.prompt_logprobs is not None,
        "logit_bias": bool(params.logit_bias),
        "presence_penalty": params.presence_penalty != 0,
        "frequency_penalty": params.frequency_penalty != 0,
        "strategy": params.strategy is DecodingStrategy.CONTRASTIVE,
    }
    for field, is_asked in asked.items():
        if is_asked:
            raise UnsupportedError(
                f"the transformers engine does not support {field} = {getattr(params, field)}; "
                "leave it out, or use LLMEngine for models it knows",
                field=field,
            )


def generation_options(params: SamplingParams, eos_token_ids: Sequence[int]) -> dict[str, Any]:
    """Arguments of `generate` that mean what `params` mean; nothing is left to the checkpoint's own defaults."""
    sampling = params.strategy is DecodingStrategy.SAMPLING and params.temperature > 0
    ends = [*params.stop_token_ids, *([] if params.ignore_eos else eos_token_ids)]
    options: dict[str, Any] = {
        "max_new_tokens": params.max_tokens,
        "min_new_tokens": params.min_tokens or None,
        "do_sample": sampling,
        "num_beams": params.num_beams,
        "repetition_penalty": params.repetition_penalty,
        "eos_token_id": ends or None,
        "temperature": params.temperature if sampling else None,
        "top_p": params.top_p if sampling else None,
        "top_k": params.top_k if sampling else None,
        "min_p": params.min_p or None if sampling else None,
    }
    if params.num_beams > 1:
        options |= {"length_penalty": params.length_penalty, "early_stopping": params.early_stopping}
    return options


class HFGenerator:
    """A transformers model and tokenizer on a device. Threads may generate at once; a seed is for one at a time.

    transformers draws random numbers from torch's global generator, so a seeded request is reproducible only while
    no other request samples.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model = model
        self._tokenizer = tokenizer

    def encode(self, prompt: str | Sequence[int] | list[dict[str, Any]], tools: list[Any] | None) -> list[int]:
        """Token ids of a text, of ready ids (returned as they are), or of chat messages."""
        if isinstance(prompt, str):
            return list(self._tokenizer(prompt)["input_ids"])
        if prompt and isinstance(prompt[0], dict):
            text = self._tokenizer.apply_chat_template(prompt, tools=tools, add_generation_prompt=True, tokenize=False)
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        return [int(token) for token in prompt]  # type: ignore[arg-type]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def generate(
        self, prompt_ids: list[int], params: SamplingParams, emit: TokenSink, cancelled: threading.Event
    ) -> FinishReason:
        """Run `generate`; with beams all tokens come at the end, because no beam is certain before."""
        ends = self._eos_token_ids()
        options = generation_options(params, ends)
        input_ids = torch.tensor([prompt_ids], device=self._model.device)
        if params.seed is not None:
            torch.manual_seed(params.seed)
        streams = params.num_beams == 1
        produced: list[int] = []

        def record(tokens: list[int]) -> None:
            produced.extend(tokens)
            emit(tokens)

        sequences = self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            pad_token_id=ends[0] if ends else 0,
            streamer=_Streamer(record) if streams else None,
            stopping_criteria=[lambda ids, scores, **_: torch.full((len(ids),), cancelled.is_set(), device=ids.device)],
            generation_config=self._generation_config(options),
        )
        if not streams:
            record(sequences[0, len(prompt_ids) :].tolist())
        if cancelled.is_set():
            return FinishReason.ABORT
        stopped = bool(produced) and produced[-1] in (options["eos_token_id"] or ())
        return FinishReason.STOP if stopped else FinishReason.LENGTH

    def _eos_token_ids(self) -> list[int]:
        eos = self._model.generation_config.eos_token_id
        if eos is None:
            eos = self._tokenizer.eos_token_id
        return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)

    def _generation_config(self, options: dict[str, Any]) -> Any:
        from transformers import GenerationConfig

        # Starts from transformers' own defaults: the checkpoint's sampling defaults must not come in unasked.
        return GenerationConfig(**{name: value for name, value in options.items() if value is not None})


class EchoGenerator:
    """Answers with the prompt again, one character a token, for tests of everything around a model."""

    def encode(self, prompt: str | Sequence[int] | list[dict[str, Any]], tools: list[Any] | None) -> list[int]:
        """Code points of the text, or of the last message."""
        del tools
        if isinstance(prompt, str):
            return [ord(char) for char in prompt]
        if prompt and isinstance(prompt[-1], dict):
            return [ord(char) for char in str(prompt[-1].get("content", ""))]
        return [int(token) for token in prompt]  # type: ignore[arg-type]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """One character a token."""
        del skip_special_tokens
        return "".join(chr(token) for token in token_ids)

    def generate(
        self, prompt_ids: list[int], params: SamplingParams, emit: TokenSink, cancelled: threading.Event
    ) -> FinishReason:
        """The prompt's tokens over and over, up to `max_tokens`."""
        for token in itertools.islice(itertools.cycle(prompt_ids), params.max_tokens):
            if cancelled.is_set():
                return FinishReason.ABORT
            emit([token])
        return FinishReason.LENGTH


class _Streamer:
    """What `generate` calls a streamer: it gets the prompt first, then each new token."""

    def __init__(self, emit: TokenSink) -> None:
        self._emit = emit
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._emit(value.flatten().tolist())
        self._prompt_seen = True

    def end(self) -> None:
        return


class TextStream:
    """Tokens to chunks of whole characters, held back while they may be the start of a stop string."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str], *, keep_stop: bool) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._keep_stop = keep_stop
        self._hold = max((len(text) for text in stop), default=1) - 1
        self._token_ids: list[int] = []
        self._context = 0  # first token of the window that is decoded anew
        self._known = 0  # tokens whose text has been taken
        self._pending = ""  # text not yet released
        self.matched: str | None = None

    def add(self, token_ids: Sequence[int]) -> str:
        """Text that is certain now; once `matched` is set the text is over."""
        self._token_ids.extend(token_ids)
        before = self._decode(self._token_ids[self._context : self._known])
        after = self._decode(self._token_ids[self._context :])
        if len(after) > len(before) and not after.endswith("\ufffd"):  # a part of a character decodes to U+FFFD
            self._pending += after[len(before) :]
            # The last tokens stay as context: decoders treat the first token of a text in their own way.
            self._context, self._known = self._known, len(self._token_ids)
        return self._release(self._hold)

    def flush(self) -> str:
        """The rest, at the end of the tokens."""
        before = self._decode(self._token_ids[self._context : self._known])
        self._pending += self._decode(self._token_ids[self._context :])[len(before) :]
        self._known = self._context = len(self._token_ids)
        return self._release(0)

    def _release(self, hold: int) -> str:
        if self.matched is not None:
            return ""
        found = [(self._pending.find(text), text) for text in self._stop if text in self._pending]
        if found:
            position, self.matched = min(found)
            end = position + (len(self.matched) if self._keep_stop else 0)
            return self._pending[:end]
        end = max(0, len(self._pending) - hold)
        released, self._pending = self._pending[:end], self._pending[end:]
        return released
