"""Which symbols a search tries where many may come next, and in which order."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

# So many bytes or fewer are all tried; of more, a few of each kind that is there as a whole.
_FEW_BYTES = 20
_BLANKS = frozenset(b" \n\t\r")
_LETTERS_AND_DIGITS = (range(48, 58), range(97, 123), range(65, 91))
_MARKS = frozenset(byte for byte in range(33, 127) if not chr(byte).isalnum())
# Where nearly all marks may come, a text runs, and these may end it.
_ENDING_MARKS = frozenset(b"\"'`>)]}/;")

# Smaller goes first: what closes, then letters of a text and literals, separators, short values, what opens, and blanks
# last. Where a text runs, only a quote is likely to close.
_RANKS = {ord('"'): 0, **dict.fromkeys(b"]})>", 1), ord(","): 4, **dict.fromkeys(b"0123456789", 5)}
_RANKS |= dict.fromkeys(b"{[(", 8)
_TEXT_RANK, _LITERAL_RANK, _OTHER_RANK, _BLANK_RANK = 2, 3, 6, 9


class Choice(NamedTuple):
    """Symbols to try; those with a smaller rank seem to lead to the end sooner."""

    symbols: str
    rank: int


def has_symbol(mask: bytes, symbol: int) -> bool:
    """Whether the bit of `symbol` is set, lowest bit first."""
    return bool(mask[symbol >> 3] >> (symbol & 7) & 1)


def is_text(mask: bytes) -> bool:
    """Whether so many symbols may come next that they are not told apart one by one."""
    return int.from_bytes(mask, "little").bit_count() > _FEW_BYTES


def choices_among(mask: bytes, literals: Sequence[str], never: Collection[int]) -> list[Choice]:
    """What to try of the symbols in `mask` but those in `never`, by rank: single symbols, and literals in a text.

    Bytes beyond ASCII are tried only where nothing else may come.
    """
    allowed = [i for i in range(8 * len(mask)) if has_symbol(mask, i) and i not in never]
    plain = [symbol for symbol in allowed if 32 < symbol < 127]
    tried = [symbol for symbol in allowed if symbol in _BLANKS][-1:]
    if plain:
        tried += _of_each_kind(plain) if is_text(mask) else plain
    elif not tried:
        tried = [symbol for symbol in allowed if symbol < 256][:_FEW_BYTES]
    tried += [symbol for symbol in allowed if symbol >= 256]
    found = [Choice(chr(symbol), _rank(symbol, in_text=is_text(mask))) for symbol in tried]
    if is_text(mask):
        found += [Choice(text, _LITERAL_RANK) for text in literals if has_symbol(mask, ord(text[0]))]
    return sorted(found, key=lambda choice: choice.rank)


def _of_each_kind(plain: Sequence[int]) -> list[int]:
    marks = [symbol for symbol in plain if symbol in _MARKS]
    if len(marks) >= len(_MARKS) - 4:
        marks = [symbol for symbol in marks if symbol in _ENDING_MARKS]
    tried = []
    for kind in _LETTERS_AND_DIGITS:
        members = [symbol for symbol in plain if symbol in kind]
        tried += members[:2] if len(members) == len(kind) else members
    return marks + tried


def _rank(symbol: int, *, in_text: bool) -> int:
    if symbol in _BLANKS:
        return _BLANK_RANK
    if in_text and symbol != ord('"'):
        return _TEXT_RANK if chr(symbol).isalpha() else _OTHER_RANK
    return _RANKS.get(symbol, _OTHER_RANK)
