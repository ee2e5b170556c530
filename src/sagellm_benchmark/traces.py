"""Recorded loads: when requests came, how long they were, and which parts of their prompts they shared.

Three formats, told apart by what stands in the file:

- Mooncake (FAST '25), JSON lines: `timestamp` in ms, `input_length`, `output_length`, `hash_ids`, one for each 512
  tokens of the prompt, equal where the tokens and all before them are.
- Azure LLM inference traces, CSV: `TIMESTAMP`, `ContextTokens`, `GeneratedTokens`.
- Lengths alone, CSV: `input_chars`, `output_tokens` (ShareGPT; four characters count as a token), without times.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TextIO

import msgspec

from sagellm_protocol import InvalidArgumentError, NotFoundError

BLOCK_TOKENS = 512
_CHARS_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a recorded load; lengths in tokens."""

    at_s: float | None  # since the trace's first request
    input_len: int
    output_len: int
    block_ids: tuple[int, ...] = ()  # one for each `block_tokens` of the prompt that another may share
    block_tokens: int = BLOCK_TOKENS

    def scaled(self, factor: float) -> TraceRequest:
        """With all lengths times `factor`, at least a token each; shared blocks stay shared."""
        return replace(
            self,
            input_len=max(1, round(self.input_len * factor)),
            output_len=max(1, round(self.output_len * factor)),
            block_tokens=max(1, round(self.block_tokens * factor)),
        )


def read_trace(path: Path, limit: int | None = None) -> list[TraceRequest]:
    """The first `limit` requests of a trace, in the order of their times.

    Raises `NotFoundError` without the file, `InvalidArgumentError` that names the line where its form is none of ours.
    """
    if not path.is_file():
        raise NotFoundError(f"there is no trace {path}", field="trace")
    with path.open(encoding="utf-8-sig", newline="") as file:
        requests = list(islice(_read(file, path), limit))
    if not requests:
        raise InvalidArgumentError(f"{path} holds no request", field="trace")
    return requests


def _read(file: TextIO, path: Path) -> Iterator[TraceRequest]:
    first = file.readline()
    file.seek(0)
    if first.lstrip().startswith("{"):
        return _numbered(path, 1, _mooncake(file))
    columns = {name.strip() for name in first.split(",")}
    if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= columns:
        return _numbered(path, 2, _azure(csv.DictReader(file)))
    if {"input_chars", "output_tokens"} <= columns:
        return _numbered(path, 2, _lengths(csv.DictReader(file)))
    raise InvalidArgumentError(
        f"{path} is no trace that is known: JSON lines with timestamp, input_length and output_length (Mooncake), or "
        "CSV with TIMESTAMP, ContextTokens and GeneratedTokens (Azure) or input_chars and output_tokens",
        field="trace",
    )


def _numbered(path: Path, first: int, requests: Iterator[TraceRequest]) -> Iterator[TraceRequest]:
    """The same; what is wrong in it is said with the line."""
    number = first
    while True:
        try:
            request = next(requests, None)
        except (ValueError, KeyError, TypeError, msgspec.MsgspecError) as error:
            raise InvalidArgumentError(f"{path}, line {number}: {error}; correct it", field="trace") from error
        if request is None:
            return
        yield request
        number += 1


class _Mooncake(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def _mooncake(lines: Iterable[str]) -> Iterator[TraceRequest]:
    decoder = msgspec.json.Decoder(_Mooncake)
    begin: float | None = None
    for line in lines:
        if line.strip():
            entry = decoder.decode(line)
            begin = entry.timestamp if begin is None else begin
            at_s = (entry.timestamp - begin) / 1e3
            yield TraceRequest(at_s, max(1, entry.input_length), max(1, entry.output_length), entry.hash_ids)


def _azure(rows: Iterable[dict[str, str]]) -> Iterator[TraceRequest]:
    begin: datetime | None = None
    for row in rows:
        # Seven digits of a second; datetime takes six.
        moment = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26])
        begin = moment if begin is None else begin
        at_s = (moment - begin).total_seconds()
        yield TraceRequest(at_s, max(1, int(row["ContextTokens"])), max(1, int(row["GeneratedTokens"])))


def _lengths(rows: Iterable[dict[str, str]]) -> Iterator[TraceRequest]:
    for row in rows:
        input_len = max(1, int(row["input_chars"]) // _CHARS_PER_TOKEN)
        yield TraceRequest(None, input_len, max(1, int(row["output_tokens"])))
