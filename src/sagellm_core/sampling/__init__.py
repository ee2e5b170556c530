"""From logits to tokens: one vectorised sampler for the whole batch.

`Sampler` is what the model runner calls; `SamplingRow` and `SamplingMetadata` are its inputs; `TokenLogprobs` and
`gather_logprobs` report log-probabilities; `derive_seed` keys the random numbers of the n outputs of a request. Every
row's result is a function of that row alone, bit for bit (docs/sampling.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sagellm_protocol.lazy import lazy_exports

if TYPE_CHECKING:
    from sagellm_core.sampling.logprobs import TokenLogprobs, gather_logprobs
    from sagellm_core.sampling.metadata import SamplingMetadata, SamplingRow
    from sagellm_core.sampling.rng import derive_seed
    from sagellm_core.sampling.sampler import Sampler, SamplerOutput
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            ".logprobs": ("TokenLogprobs", "gather_logprobs"),
            ".metadata": ("SamplingMetadata", "SamplingRow"),
            ".rng": ("derive_seed",),
            ".sampler": ("Sampler", "SamplerOutput"),
        },
    )

__all__ = [
    "Sampler",
    "SamplerOutput",
    "SamplingMetadata",
    "SamplingRow",
    "TokenLogprobs",
    "derive_seed",
    "gather_logprobs",
]
