"""One sequence under a grammar, steered so that it can always be completed within its tokens.

Beside the library's matcher over tokens stands one over symbols, and a *completion*: symbols that complete the text and
fit the tokens left. A sampled token is followed only if a completion that fits is known behind it; else the first token
of the completion takes its place. So the completion always fits, down to the last token. It moves along with the text:
mostly it is still a completion (inside a string), or what is left of it is; only what a token newly opens is searched.

A search has a bound, counted in states and never in time, so that its outcome does not depend on the machine's load.
Where it finds nothing and tokens are plenty, the sampled token is followed all the same and the search repeated later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sagellm_core.structured.base import GrammarMatcher
from sagellm_core.structured.completion import Completion, CompletionSearch, completes
from sagellm_core.structured.source import cannot_compile
from sagellm_core.structured.vocabulary import Vocabulary
from sagellm_protocol import InvalidArgumentError

# States that a search within a step may look at, which takes some milliseconds at most; and that one may look at before
# the completion is given up, which is rare.
_MAX_STATES, _LAST_STATES = 128, 1024
# With so many times its length and so many tokens more left, a lost completion is no reason to interfere.
_PLENTY_FACTOR, _PLENTY_TOKENS = 2, 64


class SteeredMatcher(GrammarMatcher):
    """A matcher of llguidance over the model's tokens, and, if `symbols` is given, one over symbols to steer by."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        tokens: Any,
        symbols: Any | None,
        completion: Completion | None,
        search: CompletionSearch,
        max_tokens: int,
    ) -> None:
        self._vocabulary, self._search = vocabulary, search
        fits = completion is None or completion.num_tokens <= max_tokens
        self._tokens, self._symbols = tokens, symbols if fits else None
        self._completion = completion if fits else None
        # While none is known: the last one, which may fit again, and when to look for it.
        self._lost: Completion | None = None
        self._wait = self._tokens_until_search = 1
        self._ended = False
        self._allowed = np.zeros(-(-tokens_size(vocabulary) // 32), dtype=np.int32)
        self._fill()

    # ---- what the engine asks -------------------------------------------------------------------------

    @property
    def allowed(self) -> NDArray[np.int32]:
        return self._allowed

    @property
    def completion(self) -> Completion | None:
        """What would complete the text within the tokens left; None where that is not known."""
        return self._completion

    @property
    def is_accepting(self) -> bool:
        return self._ended or bool(self._tokens.is_accepting())

    @property
    def is_terminated(self) -> bool:
        return self._ended or bool(self._tokens.is_stopped())

    @property
    def fallback_token_id(self) -> int:
        completion = self._completion
        if completion is not None and completion.symbols:
            return self._vocabulary.token_of(completion.first_token)
        if completion is not None and self._vocabulary.eos_token_ids:
            return min(self._vocabulary.eos_token_ids)
        bits = np.unpackbits(self._allowed.view(np.uint8), bitorder="little")
        return int(bits.argmax())

    def accept(self, token_id: int, tokens_left: int) -> int:
        if not self._allows(token_id) or not self._follow(token_id, tokens_left):
            token_id = self.fallback_token_id
            self._take(token_id)
        self._advance(token_id)
        self._fill()
        return token_id

    def replay(self, emitted: Sequence[int], max_tokens: int) -> None:
        """Take in tokens that were emitted before, as they are; `max_tokens` may follow the last."""
        for count, token_id in enumerate(emitted, start=1):
            if self.is_terminated or not self._allows(token_id):
                raise InvalidArgumentError(
                    f"structured_output does not allow the emitted token {token_id} (number {count}); resubmit the "
                    "tokens that the same request produced",
                    field="structured_output",
                )
            if not self._follow(token_id, max_tokens + len(emitted) - count):
                self._lose()
                self._take(token_id)
            self._advance(token_id)
        self._fill()

    # ---- the library's matcher ------------------------------------------------------------------------

    def _allows(self, token_id: int) -> bool:
        return bool(self._tokens.validate_tokens([token_id]) == 1)

    def _advance(self, token_id: int) -> None:
        if token_id in self._vocabulary.eos_token_ids:
            self._ended = True
        else:
            self._tokens.consume_token(token_id)

    def _fill(self) -> None:
        if not self._ended:
            self._tokens.unsafe_compute_mask_ptr(self._allowed.ctypes.data, self._allowed.nbytes)
        if self._tokens.is_error():
            raise cannot_compile(self._tokens.get_error())

    # ---- the completion -------------------------------------------------------------------------------

    def _follow(self, token_id: int, tokens_left: int) -> bool:
        """Move the completion over a token; False, with all as it was, if none that fits is known behind it."""
        if self._symbols is None or token_id in self._vocabulary.eos_token_ids:
            return True
        written = self._written(token_id)
        known = self._completion
        if known is not None and known.symbols.startswith(written):
            rest = known.after(len(written))
            if rest.num_tokens <= tokens_left:
                self._take(token_id)
                return True
            known = rest
        if not self._write(written):
            return True  # not steered from here on
        if known is None:
            self._completion = self._search_again(tokens_left)
            return True
        has_plenty = tokens_left >= _PLENTY_FACTOR * known.num_tokens + _PLENTY_TOKENS
        found = self._renew(known, tokens_left, has_plenty=has_plenty)
        if found is not None and found.num_tokens <= tokens_left:
            self._completion = found
            return True
        if found is None and has_plenty:
            self._lose()
            return True
        self._symbols.rollback(len(written))
        return False

    def _take(self, token_id: int) -> None:
        """Write a token that the completion begins with, or that must be taken whatever comes of it."""
        if self._symbols is None or token_id in self._vocabulary.eos_token_ids:
            return
        written = self._written(token_id)
        if not self._write(written):
            return
        if self._completion is not None and self._completion.symbols.startswith(written):
            self._completion = self._completion.after(len(written))
        else:
            self._lose()

    def _written(self, token_id: int) -> str:
        """What a token writes here: itself where the grammar names it, else its text."""
        mark = self._vocabulary.marks.get(token_id)
        if mark is not None and self._symbols is not None and self._symbols.validate_tokens([ord(mark)]) == 1:
            return mark
        return self._vocabulary.symbols_of(token_id)

    def _write(self, written: str) -> bool:
        """Move the matcher over symbols; one that disagrees with that over tokens cannot be steered by."""
        assert self._symbols is not None
        if self._symbols.try_consume_tokens([*map(ord, written)]) == len(written):
            return True
        self._symbols = self._completion = None
        return False

    def _renew(self, known: Completion, tokens_left: int, *, has_plenty: bool) -> Completion | None:
        if known.num_tokens <= tokens_left and completes(self._symbols, known.symbols, self._vocabulary):
            return known
        found = self._search.find(self._symbols, known, fits=tokens_left, max_states=_MAX_STATES)
        if found is None and has_plenty:
            found = self._search.find(self._symbols, known, fits=tokens_left, max_states=_LAST_STATES)
        return found

    def _lose(self) -> None:
        self._lost, self._completion = self._completion or self._lost, None
        self._wait = self._tokens_until_search = 1

    def _search_again(self, tokens_left: int) -> Completion | None:
        """Look for a completion after 1, 2, 4, ... tokens; more often would slow down forms that never fit."""
        self._tokens_until_search -= 1
        if self._tokens_until_search > 0:
            return None
        self._wait = self._tokens_until_search = 2 * self._wait
        found = self._search.find(self._symbols, self._lost, fits=tokens_left, max_states=_MAX_STATES)
        return found if found is not None and found.num_tokens <= tokens_left else None


def tokens_size(vocabulary: Vocabulary) -> int:
    """The number of token ids that a mask speaks of."""
    return int(vocabulary.tokens.vocab_size)
