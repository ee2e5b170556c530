"""Bounds on the structure of a JSON document, so that a small body cannot become a large load.

8 MiB of `{"":0},` are a million objects: seconds of a frozen event loop and hundreds of megabytes, before any field is
looked at. What a document holds is counted in its bytes, before it is parsed, in a few passes at the speed of memory.
"""

from __future__ import annotations

from typing import Any

from sagellm_protocol import InvalidArgumentError

# A conversation of 4,096 messages with tool calls, a prompt of a million token ids: both stay below.
MAX_CONTAINERS = 32_768  # objects and lists
MAX_MEMBERS = 65_536  # of all objects together
MAX_ITEMS = 1_048_576  # of all objects and lists together
MAX_STRINGS = 131_072

_LIMITS = ((b"{[", MAX_CONTAINERS, "objects and lists"), (b":", MAX_MEMBERS, "members"), (b",", MAX_ITEMS, "entries"))


def check_structure(body: bytes) -> None:
    """Raise `InvalidArgumentError` for a document that holds more values than any request needs."""
    for _, limit, _ in _LIMITS:
        if len(body) > limit:
            break
    else:
        return  # it holds more of nothing than it has bytes
    if _excess(body) is None and body.count(b'"') <= 2 * MAX_STRINGS:
        return
    # The characters may stand in texts, which may hold anything: count again without these.
    bare = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if bare.count(b'"') > 2 * MAX_STRINGS:
        raise _too_much(MAX_STRINGS, "strings")
    excess = _excess(b"".join(bare.split(b'"')[::2]))
    if excess is not None:
        raise excess


def _excess(body: bytes) -> InvalidArgumentError | None:
    for characters, limit, name in _LIMITS:
        if len(body) > limit and sum(body.count(character) for character in characters) > limit:
            return _too_much(limit, name)
    return None


def _too_much(limit: int, name: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"the body holds more than {limit} {name}; send less")


def check_depth(data: Any, body: bytes, max_depth: int) -> None:
    """Raise `InvalidArgumentError` if `data`, which `body` holds, nests more than `max_depth` objects and lists."""
    if _has_at_most(body, max_depth):
        return  # most bodies: there are not as many objects and lists at all
    level = [data]
    for _ in range(max_depth):
        children = (value.values() if type(value) is dict else value for value in level)
        level = [child for values in children for child in values if type(child) in (dict, list)]
        if not level:
            return
    raise InvalidArgumentError(f"the body's objects and lists are nested deeper than {max_depth}; flatten it")


def _has_at_most(body: bytes, limit: int) -> bool:
    """Whether so many objects and lists begin in it. `replace` jumps to the next one, `count` looks at each byte."""
    more = limit + 1
    return 2 * len(body) - len(body.replace(b"{", b"", more)) - len(body.replace(b"[", b"", more)) <= limit
