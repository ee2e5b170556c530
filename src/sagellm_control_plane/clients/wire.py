"""The messages between a manager and an engine in another process.

A frame is one msgpack list of messages, each a fixed struct whose first element is its tag; nothing else is
understood, and nothing is ever unpickled. What the protocol has as a model travels inside as that model's JSON, so that
it is checked where it arrives as everywhere else. The one message that is sent for every token, `Delta`, is plain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import msgspec

from sagellm_core.kv_format import PrefixBlocks
from sagellm_core.report_codec import CacheEvents, PackedReport

VERSION = 1
"""Raised with every change of a message: a manager and an engine of different versions refuse each other."""

Question: TypeAlias = Literal["ping", "health", "stats", "reset_prefix_cache", "cache_snapshot", "drain", "resume"]


class _Message(msgspec.Struct, array_like=True, gc=False):
    """A list: the tag, then the fields."""


class _OfCall(_Message):
    """Of a call of the manager's; its numbers are unique within its connection."""

    call: int


class _Refusal(_Message):
    """Why not: JSON of an `Error`."""

    error: bytes


# ---- to the engine ------------------------------------------------------------------------------------


class Hello(_Message, tag=1):
    """The first message of a manager: from now on the engine is its own, and its predecessor's requests end."""

    version: int
    token: str


class Submit(_OfCall, tag=2):
    """Answer `request` (JSON of a `Request`): with events if `is_streamed`, else with one `Answer`."""

    request: bytes
    is_streamed: bool


class Abort(_OfCall, tag=3):
    """End a request; the events up to its end are still wanted."""


class Cancel(_OfCall, tag=4):
    """Nobody waits for this call any more."""


class Ask(_OfCall, tag=5):
    """Something other than a request; a `Reply` follows."""

    question: Question


class Export(_OfCall, tag=8):
    """Send the cached blocks of a prefix; `Exported` follows."""

    token_ids: Sequence[int]
    cache_salt: str | None
    lora_id: str | None


class Import(_OfCall, tag=9):
    """Take these blocks into the cache; the `Reply` says how many tokens that makes."""

    blocks: PrefixBlocks


class Watch(_Message, tag=6):
    """Send reports at least so often; None: no more."""

    interval_s: float | None


class Stop(_Message, tag=7):
    """End all requests with `abort`, then the process."""


ToEngine: TypeAlias = Hello | Submit | Abort | Cancel | Ask | Export | Import | Watch | Stop

# ---- to the manager -----------------------------------------------------------------------------------


class Welcome(_Message, tag=21):
    """The answer to `Hello`: who is there."""

    version: int
    engine_id: str
    epoch: str
    pid: int


class Refused(_Refusal, tag=22):
    """The other answer to `Hello`."""


class Ready(_Message, tag=23):
    """The model is loaded; JSON of what `get_info`, `describe_model` and `config` say."""

    info: bytes
    description: bytes
    config: bytes


class Failed(_Refusal, tag=24):
    """The engine could not start; its process ends."""


class Delta(_OfCall, tag=25):
    """A `StreamEventDelta` without log-probabilities."""

    index: int
    chunk: str
    chunk_tokens: list[int]


class Event(_OfCall, tag=26):
    """Any other stream event, as JSON."""

    event: bytes


class Answer(_OfCall, tag=27):
    """The JSON of a `Response`."""

    response: bytes


class Raised(_OfCall, tag=28):
    """The call raised this (JSON of an `Error`)."""

    error: bytes


class Reply(_OfCall, tag=29):
    """What was asked for, as msgpack: see `Question`."""

    value: bytes


class Exported(_OfCall, tag=31):
    """The cached blocks of a prefix; None: there are none."""

    blocks: PrefixBlocks | None


class Report(_Message, tag=30):
    """What `watch` tells."""

    report: PackedReport


Outcome: TypeAlias = Delta | Event | Answer | Raised | Reply | Exported
"""What comes back for a call."""

FromEngine: TypeAlias = Outcome | Welcome | Refused | Ready | Failed | Report

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(list[ToEngine]).decode
decode_from_engine = msgspec.msgpack.Decoder(list[FromEngine]).decode
decode_cache_events = msgspec.msgpack.Decoder(CacheEvents).decode
