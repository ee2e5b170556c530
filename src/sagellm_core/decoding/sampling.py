"""Greedy decoding and sampling: the engine's own step chooses the token, for all requests of a batch at once."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace

from sagellm_core.decoding.base import BaseDecodingStrategy, behind_resumed
from sagellm_core.engine_core.types import CoreClient, EngineCoreOutput, EngineCoreRequest
from sagellm_protocol.sampling import DecodingStrategy

_GREEDY = {"strategy": DecodingStrategy.GREEDY, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


class GreedyDecoding(BaseDecodingStrategy):
    """The most probable token each time, the lowest id among equals; penalties and bias count, temperature doesn't."""

    strategy = DecodingStrategy.GREEDY

    def __call__(self, client: CoreClient, request: EngineCoreRequest) -> AsyncGenerator[EngineCoreOutput, None]:
        """See the base class; a request that asks for another strategy is decoded greedily all the same."""
        if request.sampling.strategy is not self.strategy:
            request = replace(request, sampling=request.sampling.model_copy(update={**_GREEDY, "num_beams": 1}))
        return _submit(client, request)


class SamplingDecoding(BaseDecodingStrategy):
    """A token drawn from the filtered distribution; the random number is a function of (seed, position)."""

    strategy = DecodingStrategy.SAMPLING

    def __call__(self, client: CoreClient, request: EngineCoreRequest) -> AsyncGenerator[EngineCoreOutput, None]:
        """See the base class; a request of another strategy is sampled, at temperature 1 if it names none."""
        sampling = request.sampling
        if sampling.strategy is not self.strategy:
            temperature = sampling.temperature if "temperature" in sampling.model_fields_set else 1.0
            changes = {"strategy": self.strategy, "temperature": temperature, "num_beams": 1}
            request = replace(request, sampling=sampling.model_copy(update=changes))
        return _submit(client, request)


def _submit(client: CoreClient, request: EngineCoreRequest) -> AsyncGenerator[EngineCoreOutput, None]:
    outputs = client.submit(request)
    return behind_resumed(outputs, request) if request.resumed_token_ids else outputs
