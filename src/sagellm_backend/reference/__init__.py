"""The reference ops: the contract of every op, in plain torch, on any device torch knows.

This is the definition that faster implementations are tested against, and the fallback where there is none.
Conventions: T tokens, H heads, KH KV heads, D head size; activations have the backend's compute dtype.

Every op computes each row (token) in one fixed order that depends neither on the other rows nor on their
number, so that a request's tokens are the same in any company; `sagellm_backend.invariance` keeps that promise
for matrix products.
"""

from sagellm_backend.reference.attention import copy_blocks, paged_attention, reshape_and_cache
from sagellm_backend.reference.bidirectional import encoder_attention
from sagellm_backend.reference.elementwise import (
    add_rms_norm,
    embedding,
    gelu,
    gelu_and_mul,
    layer_norm,
    rms_norm,
    rotary,
    silu_and_mul,
    soft_cap,
)
from sagellm_backend.reference.matmul import ReferencePackedLinear, linear, moe_experts, pack_linear, quantize_linear
from sagellm_backend.reference.sampling import sample_tokens

__all__ = [
    "ReferencePackedLinear",
    "add_rms_norm",
    "copy_blocks",
    "embedding",
    "encoder_attention",
    "gelu",
    "gelu_and_mul",
    "layer_norm",
    "linear",
    "moe_experts",
    "pack_linear",
    "paged_attention",
    "quantize_linear",
    "reshape_and_cache",
    "rms_norm",
    "rotary",
    "sample_tokens",
    "silu_and_mul",
    "soft_cap",
]
