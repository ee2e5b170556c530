"""Where an interrupted request goes on: holds `ResumePoint`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sagellm_protocol.fields import MAX_OUTPUTS, Seed, TokenId
from sagellm_protocol.model import EdgeModel


class ResumePoint(EdgeModel):
    """What the caller of a request has received already, from an engine that is gone.

    An engine that is given one behaves as if it had made these tokens itself: the stream holds only what follows them,
    its end and the response hold the whole answer, and every limit, penalty, stop string and form counts them as
    output. Log-probabilities are those of the tokens that follow; the earlier ones belong to who received them.
    """

    output_token_ids: list[Annotated[list[TokenId], Field(fail_fast=True)]] = Field(
        default_factory=list,
        max_length=MAX_OUTPUTS,
        description="The tokens received so far, one list an output; no list at all: nothing yet.",
    )
    seed: Seed = Field(description="The seed that the request runs with, whether it named one or not.")
