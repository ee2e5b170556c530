"""What the engine needs of a grammar, whichever library is behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Grammar(ABC):
    """A compiled form. Immutable, and shared by all sequences that ask for the same; it stays in its process."""

    @abstractmethod
    def start(self, max_tokens: int, emitted: Sequence[int] = ()) -> GrammarMatcher:
        """A matcher for one sequence that may have `max_tokens` more tokens, having `emitted` these before.

        Raises:
            InvalidArgumentError: `emitted` is no beginning of a text of this form.
        """


class GrammarMatcher(ABC):
    """Where one sequence stands in its form. Belongs to the step loop's thread.

    What it decides is a function of the tokens taken in and of the tokens left alone, so a sequence gets the same
    tokens in any batch, after any preemption, and resubmitted as prompt + emitted tokens.
    """

    @property
    @abstractmethod
    def allowed(self) -> NDArray[np.int32]:
        """One bit a token id, lowest bit first: [ceil(vocabulary / 32)]; end tokens where the text may end."""

    @property
    @abstractmethod
    def fallback_token_id(self) -> int:
        """The token that stands in for a sampled one that `accept` must refuse."""

    @abstractmethod
    def accept(self, token_id: int, tokens_left: int) -> int:
        """Take in the sampled token, or the one that must stand in its place; returns the one taken in.

        `tokens_left` is the number of tokens that may follow it. A token is replaced where no completion that is known
        would fit behind it, or where the grammar does not allow it.

        Raises:
            InvalidArgumentError: the grammar turned out to be too complex to go on.
        """

    @property
    @abstractmethod
    def is_accepting(self) -> bool:
        """Whether the text so far is complete."""

    @property
    @abstractmethod
    def is_terminated(self) -> bool:
        """Whether the text is complete and nothing may follow."""
