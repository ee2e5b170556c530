"""What is asked: random prompts, those of a recorded trace, or those of a file.

Prompts are lists of token ids where the endpoint takes them and the server has told its vocabulary (then lengths hold
exactly), else texts. The same seed gives the same prompts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from sagellm_benchmark.serve.vocabulary import Vocabulary
from sagellm_benchmark.traces import TraceRequest
from sagellm_protocol import InvalidArgumentError, NotFoundError

Prompt = str | list[int] | list[dict[str, Any]]
"""A text, token ids, or the messages of a conversation."""


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One request to send; lengths in tokens."""

    prompt: Prompt
    output_len: int
    input_len: int | None = None  # as wanted; the server counts what it is
    at_s: float | None = None  # when its source says that it came


@dataclass(frozen=True, slots=True)
class RandomLengths:
    """Lengths drawn evenly from `len * (1 - spread)` to `len * (1 + spread)`; all prompts share a prefix."""

    input_len: int = 128
    output_len: int = 64
    spread: float = 0.0
    prefix_len: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.spread < 1:
            raise InvalidArgumentError(f"spread must be from 0 to below 1, got {self.spread:g}", field="spread")
        if not 0 <= self.prefix_len <= self.input_len:
            raise InvalidArgumentError(
                f"the shared prefix of {self.prefix_len} tokens is a part of the input of {self.input_len}; shorten it",
                field="prefix_len",
            )

    def draw(self, generator: random.Random) -> tuple[int, int]:
        """Input and output length of one request."""
        spread = self.spread
        low, high = max(1, round(self.input_len * (1 - spread))), round(self.input_len * (1 + spread))
        input_len = max(generator.randint(low, high), self.prefix_len)
        low, high = max(1, round(self.output_len * (1 - spread))), round(self.output_len * (1 + spread))
        return input_len, generator.randint(low, high)


def random_requests(
    count: int, lengths: RandomLengths, vocabulary: Vocabulary, *, takes_tokens: bool, seed: int = 0
) -> list[LoadRequest]:
    """`count` requests that share nothing but the prefix."""
    make = _maker(vocabulary, takes_tokens)
    prefix = ("prefix", lengths.prefix_len)
    generator = random.Random(f"lengths {seed}")
    requests = []
    for number in range(count):
        input_len, output_len = lengths.draw(generator)
        parts = [prefix, (str(number), input_len - lengths.prefix_len)]
        requests.append(LoadRequest(make(parts, seed), output_len, input_len))
    return requests


def trace_requests(
    trace: Sequence[TraceRequest], vocabulary: Vocabulary, *, takes_tokens: bool, seed: int = 0
) -> list[LoadRequest]:
    """The requests of a trace, their prompts equal where the trace says that they are."""
    make = _maker(vocabulary, takes_tokens)
    requests = []
    for number, entry in enumerate(trace):
        parts, rest = [], entry.input_len
        for block_id in entry.block_ids:
            length = min(entry.block_tokens, rest)
            parts.append((f"block {block_id}", length))
            rest -= length
        parts.append((str(number), rest))
        requests.append(LoadRequest(make(parts, seed), entry.output_len, entry.input_len, entry.at_s))
    return requests


def _maker(vocabulary: Vocabulary, takes_tokens: bool) -> Callable[[Sequence[tuple[str, int]], int], Prompt]:
    """A function that puts a prompt together from named parts of so many tokens; equal names give equal beginnings."""
    if takes_tokens and vocabulary.is_exact:

        def make_tokens(parts: Sequence[tuple[str, int]], seed: int) -> Prompt:
            named = [(random.Random(f"{seed} {name}"), length) for name, length in parts if length > 0]
            return [token for generator, length in named for token in vocabulary.tokens(length, generator)]

        return make_tokens

    def make_text(parts: Sequence[tuple[str, int]], seed: int) -> Prompt:
        named = [(random.Random(f"{seed} {name}"), length) for name, length in parts if length > 0]
        return " ".join(word for generator, length in named for word in vocabulary.words(length, generator))

    return make_text


def fit_into(requests: Sequence[LoadRequest], max_model_len: int | None) -> tuple[list[LoadRequest], int]:
    """The requests with ends of prompts cut off where prompt and answer exceed the model's context; and how many.

    An answer gets at most half of the context. Prompts that are no token ids are left alone.
    """
    if max_model_len is None:
        return list(requests), 0
    fitting, num_cut = [], 0
    for request in requests:
        output_len = min(request.output_len, max(1, max_model_len // 2))
        prompt, input_len = request.prompt, request.input_len
        room = max_model_len - output_len
        if input_len is not None and input_len > room:
            share = room / input_len
            prompt, input_len = _cut(prompt, share), room
        num_cut += (output_len, input_len) != (request.output_len, request.input_len)
        fitting.append(replace(request, prompt=prompt, input_len=input_len, output_len=output_len))
    return fitting, num_cut


def _cut(prompt: Prompt, share: float) -> Prompt:
    """The first `share` of a prompt that was made here, which is of token ids or of words."""
    if isinstance(prompt, str):
        words = prompt.split(" ")
        return " ".join(words[: max(1, int(len(words) * share))])
    return prompt[: max(1, int(len(prompt) * share + 1e-6))]


# ---- files --------------------------------------------------------------------------------------------


class _Line(msgspec.Struct):
    prompt: str | list[int] | None = None
    turns: list[str] | None = None
    messages: list[dict[str, Any]] | None = None
    output_len: int | None = None
    output_tokens: int | None = None
    max_tokens: int | None = None
    at_s: float | None = None


def file_requests(path: Path, limit: int, output_len: int) -> list[LoadRequest]:
    """The first `limit` requests of a file of JSON lines, again from its beginning where it has fewer.

    A line holds `prompt` (text or token ids), `messages` or `turns` (the first is asked), and may hold `output_len`
    (`output_tokens`, `max_tokens`) and `at_s`, the second at which it came.

    Raises `NotFoundError` without the file, `InvalidArgumentError` that names the line.
    """
    if not path.is_file():
        raise NotFoundError(f"there is no file {path}", field="dataset")
    requests: list[LoadRequest] = []
    decoder = msgspec.json.Decoder(_Line)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if len(requests) == limit:
                break
            if line.strip():
                requests.append(_read_line(decoder, line, f"{path}, line {number}", output_len))
    if not requests:
        raise InvalidArgumentError(f"{path} holds no request", field="dataset")
    return [requests[number % len(requests)] for number in range(limit)]


def _read_line(decoder: msgspec.json.Decoder[_Line], line: bytes, where: str, output_len: int) -> LoadRequest:
    try:
        entry = decoder.decode(line)
    except msgspec.MsgspecError as error:
        raise InvalidArgumentError(f"{where}: {error}; correct it", field="dataset") from error
    prompt: Prompt | None = entry.prompt or entry.messages or (entry.turns[0] if entry.turns else None)
    if not prompt:
        raise InvalidArgumentError(f"{where} holds neither prompt, messages nor turns; give one", field="dataset")
    wanted = entry.output_len or entry.output_tokens or entry.max_tokens or output_len
    return LoadRequest(prompt, wanted, len(prompt) if isinstance(prompt, list) and entry.prompt else None, entry.at_s)
