"""Token ids to text, piece by piece, while they are generated.

Holds `IncrementalDetokenizer` and `token_text`. The detokenizer promises: the concatenation of all `add` results and of
`flush` equals `tokenizer.decode(all ids)` exactly, whatever the ids and however they are split; no chunk ever ends
inside a character; and a token costs constant time on average.

A `tokenizers` decoder is a chain of small steps over token strings (byte-level map, byte fallback, replace, strip).
Each common step is rebuilt here as an incremental one, which releases a piece once nothing that follows can change it.
That makes the result exact where decoding a sliding window of ids, as most servers do, is not: a window forgets that a
leading space is only stripped once, and invalid UTF-8 looks different from where it starts. Chains with any other step
fall back to such a window, made exact at `flush` whenever the text already sent allows it.

Byte-fallback vocabularies (Llama 2 and its kin) decode a run of byte tokens as a whole: one invalid byte turns all of
it into U+FFFD. So such a run is released when it ends, in real text a few tokens later at most.
"""

from __future__ import annotations

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sagellm_core.tokenizer import Tokenizer

__all__ = ["IncrementalDetokenizer", "token_text"]

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x(?:([0-9A-Fa-f]{2})|\+([0-9A-Fa-f]))>")


class IncrementalDetokenizer:
    """Turns the token ids of one text into chunks of whole characters; one object a text, not thread-safe.

    `flush` ends the text: it returns what is still held back, an incomplete character as U+FFFD just as `decode` does.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        steps = _build_steps(tokenizer.decoder_state)
        hidden = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
        self._stream: _Stream
        if steps is None:
            self._stream = _WindowStream(lambda ids: tokenizer.decode(ids, skip_special_tokens=False), hidden)
        else:
            self._stream = _StepStream(steps, tokenizer.id_to_token, hidden)

    def add(self, token_ids: Iterable[int]) -> str:
        """The text that became certain by these ids; often empty, never half a character."""
        return self._stream.add(token_ids)

    def flush(self) -> str:
        """The rest of the text. Nothing may be added afterwards."""
        return self._stream.flush()


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """What one token reads like in the middle of a text: with its leading space, an incomplete character as U+FFFD."""
    steps = _build_steps(tokenizer.decoder_state, mid_text=True)
    if steps is None:
        return tokenizer.decode([token_id], skip_special_tokens=False)
    stream = _StepStream(steps, tokenizer.id_to_token, frozenset())
    return stream.add((token_id,)) + stream.flush()


class _Stream(ABC):
    """Ids in, text out."""

    @abstractmethod
    def add(self, token_ids: Iterable[int]) -> str: ...

    @abstractmethod
    def flush(self) -> str: ...


class _StepStream(_Stream):
    """Exact: every id's token string runs through the incremental steps."""

    def __init__(self, steps: list[_Step], id_to_token: Callable[[int], str | None], hidden: frozenset[int]) -> None:
        self._steps = steps
        self._id_to_token = id_to_token
        self._hidden = hidden

    def add(self, token_ids: Iterable[int]) -> str:
        pieces = [
            token
            for token_id in token_ids
            if token_id not in self._hidden and (token := self._id_to_token(token_id)) is not None
        ]
        if not pieces:
            return ""
        for step in self._steps:
            pieces = step.feed(pieces)
        return "".join(pieces)

    def flush(self) -> str:
        pieces: list[str] = []
        for step in self._steps:
            pieces = step.feed(pieces) + step.finish()
        return "".join(pieces)


class _WindowStream(_Stream):
    """Fallback: decode the last few ids with and without the new ones; the difference is the new text.

    The method of text-generation-inference and vLLM. Hidden ids never enter the window, so that it always starts with a
    visible token and both decodings treat the start alike.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], hidden: frozenset[int]) -> None:
        self._decode = decode
        self._hidden = hidden
        self._ids: list[int] = []
        self._prefix = 0  # the window starts here
        self._read = 0  # ids before this have been released
        self._released: list[str] = []

    def add(self, token_ids: Iterable[int]) -> str:
        self._ids.extend(token_id for token_id in token_ids if token_id not in self._hidden)
        known = self._decode(self._ids[self._prefix : self._read])
        text = self._decode(self._ids[self._prefix :])
        if len(text) <= len(known) or text.endswith(_REPLACEMENT) or not text.startswith(known):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        self._released.append(text[len(known) :])
        return self._released[-1]

    def flush(self) -> str:
        text, released = self._decode(self._ids), "".join(self._released)
        if text.startswith(released):
            return text[len(released) :]
        known = self._decode(self._ids[self._prefix : self._read])
        return self._decode(self._ids[self._prefix :])[len(known) :]


class _Step(ABC):
    """One step of a decoder chain: pieces in, pieces out, in order, empty ones kept (they count as tokens)."""

    @abstractmethod
    def feed(self, pieces: list[str]) -> list[str]: ...

    def finish(self) -> list[str]:
        """What was held back, at the end of the text."""
        return []


class _Replace(_Step):
    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new

    def feed(self, pieces: list[str]) -> list[str]:
        return [piece.replace(self._old, self._new) for piece in pieces]


class _StripStart(_Step):
    """Removes up to `count` leading `char`s: of every piece, or of the text as a whole where the chain has fused it."""

    def __init__(self, char: str, count: int, *, whole_text: bool) -> None:
        self._char, self._count, self._whole_text = char, count, whole_text

    def feed(self, pieces: list[str]) -> list[str]:
        if not self._whole_text:
            return [self._strip(piece)[0] for piece in pieces]
        text = "".join(pieces)
        if self._count and text:
            text, self._count = self._strip(text)
        return [text]

    def _strip(self, text: str) -> tuple[str, int]:
        """The stripped text and how many more characters may still go."""
        stripped = 0
        while stripped < min(self._count, len(text)) and text[stripped] == self._char:
            stripped += 1
        return text[stripped:], self._count - stripped if stripped == len(text) else 0


class _ByteFallback(_Step):
    """`<0xE4>` tokens are bytes. A run of them is one piece if it is valid UTF-8, else one U+FFFD a byte."""

    def __init__(self) -> None:
        self._run = bytearray()

    def feed(self, pieces: list[str]) -> list[str]:
        released: list[str] = []
        for piece in pieces:
            match = _BYTE_TOKEN.fullmatch(piece)
            if match is not None:
                self._run.append(int(match[1] or match[2], 16))
                continue
            if self._run:
                released.extend(self.finish())
            released.append(piece)
        return released

    def finish(self) -> list[str]:
        run = bytes(self._run)
        self._run.clear()
        try:
            return [run.decode("utf-8")] if run else []
        except UnicodeDecodeError:
            return [_REPLACEMENT] * len(run)


class _ByteLevel(_Step):
    """GPT-2's printable stand-ins back to bytes, and those to text; an incomplete character waits for its rest."""

    def __init__(self) -> None:
        self._bytes = _byte_of_char()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, pieces: list[str]) -> list[str]:
        return [self._decoder.decode(b"".join(map(self._to_bytes, pieces)))]

    def finish(self) -> list[str]:
        return [self._decoder.decode(b"", final=True)]

    def _to_bytes(self, piece: str) -> bytes:
        table = self._bytes
        try:
            return bytes([table[char] for char in piece])
        except KeyError:  # an added token, which is stored as it is
            return piece.encode("utf-8")


class _Metaspace(_Step):
    """`▁` is a space; none at the very start where the encoder put one there."""

    def __init__(self, mark: str, *, drop_first: bool) -> None:
        self._mark, self._drop_first = mark, drop_first

    def feed(self, pieces: list[str]) -> list[str]:
        if self._drop_first and pieces:
            self._drop_first = False
            return [pieces[0].replace(self._mark, ""), *(piece.replace(self._mark, " ") for piece in pieces[1:])]
        return [piece.replace(self._mark, " ") for piece in pieces]


class _JoinBySpace(_Step):
    """What `tokenizers` does for a tokenizer without a decoder."""

    def __init__(self) -> None:
        self._started = False

    def feed(self, pieces: list[str]) -> list[str]:
        if not pieces:
            return []
        text = " ".join(pieces)
        text = f" {text}" if self._started else text
        self._started = True
        return [text]


def _build_steps(state: Mapping[str, Any] | None, *, mid_text: bool = False) -> list[_Step] | None:
    """Fresh incremental steps for a decoder (its JSON state), or None if a part of it has no incremental form.

    With `mid_text` they leave out what happens at the start of a text only.
    """
    if state is None:
        return [] if mid_text else [_JoinBySpace()]
    steps: list[_Step] = []
    fused = False  # whether the pieces that follow are one: per-piece steps then see the text as a whole
    for part in _flat(state):
        kind = part.get("type")
        if kind == "Fuse":
            fused = True
            continue
        step = _build_step(part, fused, mid_text)
        if step is None:
            return None
        steps.append(step)
        fused = fused or kind == "ByteLevel"
    return steps


def _build_step(part: Mapping[str, Any], fused: bool, mid_text: bool) -> _Step | None:
    match part:
        case {"type": "ByteLevel"} if not fused:
            return _ByteLevel()
        case {"type": "ByteFallback"} if not fused:
            return _ByteFallback()
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old and not fused:
            return _Replace(old, new)
        case {"type": "Strip", "content": str(char), "start": int(start), "stop": 0}:
            return _StripStart(char, 0 if mid_text and fused else start, whole_text=fused)
        case {"type": "Metaspace", "replacement": str(mark)} if not fused:
            return _Metaspace(mark, drop_first=not mid_text and part.get("prepend_scheme", "always") != "never")
        case _:
            return None


def _flat(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The chain as a list: sequences may be nested."""
    if state.get("type") != "Sequence":
        return [state]
    return [part for child in state["decoders"] for part in _flat(child)]


@lru_cache(maxsize=1)
def _byte_of_char() -> Mapping[str, int]:
    """GPT-2's table: every byte has a printable character; those that are printable anyway stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table
