"""Field types with their bounds, defined once and shared by SamplingParams, Request and the OpenAI requests.

Each is an ``Annotated`` type: the bound validates and appears in the JSON Schema, the description documents, the
remedy completes the error message. A bound stands before a ``BeforeValidator`` that widens what is accepted, so that
the schema shows the wider input and not both.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from sagellm_protocol.model import Remedy

MAX_INT32 = 2**31 - 1
MAX_SEED = 2**63 - 1
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_OUTPUTS = 64


def _as_tuple(value: Any) -> Any:
    """Read "nothing", one entry and many entries alike as a tuple."""
    if value is None:
        return ()
    if isinstance(value, (str, int)):
        return (value,)
    return tuple(value) if isinstance(value, (list, set, frozenset)) else value


def _limit_logit_bias(value: Any) -> Any:
    """Refuse a mapping that is too large before each of its entries is looked at."""
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"logit_bias must have at most {MAX_LOGIT_BIAS} entries, got {len(value)}")
    return value


def _drop_top_k_off(value: Any) -> Any:
    """Read -1, which some APIs use for "off", as 0."""
    return 0 if isinstance(value, int) and value == -1 else value


Identifier = Annotated[
    str,
    Field(pattern=r"^[^\x00-\x1f\x7f]{1,256}$"),
    Remedy("use 1 to 256 characters without control characters"),
]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT32)]
# A long list of the wrong type must not cost an error object an entry.
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]

Temperature = Annotated[
    float,
    Field(ge=0, description="Divides the logits; 0 is greedy decoding."),
    Remedy("use 0 for greedy decoding"),
]
TopP = Annotated[
    float,
    Field(gt=0, le=1, description="Keep the smallest set of tokens with this total probability; 1 is off."),
    Remedy("use 1 to switch it off"),
]
TopK = Annotated[
    int,
    Field(ge=0, le=MAX_INT32),
    BeforeValidator(_drop_top_k_off, json_schema_input_type=Annotated[int, Field(ge=-1, le=MAX_INT32)]),
    Field(description="Keep the k most probable tokens; 0 (or -1) is off."),
    Remedy("use 0 to switch it off"),
]
MinP = Annotated[
    float,
    Field(ge=0, le=1, description="Drop tokens less probable than this share of the most probable one; 0 is off."),
    Remedy("use 0 to switch it off"),
]
RepetitionPenalty = Annotated[
    float,
    Field(gt=0, description="Divides (positive) or multiplies (negative) logits of tokens seen so far; 1 is off."),
    Remedy("use 1 to switch it off"),
]
AdditivePenalty = Annotated[
    float,
    Field(ge=-2, le=2, description="Subtracted from logits of generated tokens, once or per occurrence; 0 is off."),
    Remedy("use 0 to switch it off"),
]
LengthPenalty = Annotated[
    float,
    Field(ge=-10, le=10, description="Beam search: exponent of the length that divides a beam's score."),
]
NumBeams = Annotated[
    int,
    Field(ge=1, le=64, description="Beam search: beams kept; more than 1 chooses beam search."),
    Remedy("use 1 to switch beam search off"),
]
PenaltyAlpha = Annotated[
    float,
    Field(ge=0, le=1, description="Contrastive search: weight of the degeneration penalty."),
]
MaxTokens = Annotated[
    int,
    Field(ge=1, le=MAX_INT32, description="Tokens to generate at most."),
    Remedy("leave it out for the default"),
]
MinTokens = Annotated[
    int,
    Field(ge=0, le=MAX_INT32, description="Tokens before which no stop condition is looked at."),
]
NumOutputs = Annotated[
    int,
    Field(ge=1, le=MAX_OUTPUTS, description="How many outputs to generate for the prompt."),
]
NumLogprobs = Annotated[
    int,
    Field(ge=0, le=MAX_LOGPROBS, description="Most probable tokens to report with each token, besides itself."),
    Remedy("leave it out for no logprobs"),
]
Seed = Annotated[
    int,
    Field(ge=0, le=MAX_SEED, description="Makes sampling reproducible, in any company."),
    Remedy("leave it out for a random one"),
]
_StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
StopStrings = Annotated[
    tuple[_StopString, ...],
    Field(max_length=MAX_STOP_STRINGS, fail_fast=True),
    BeforeValidator(
        _as_tuple,
        json_schema_input_type=_StopString | Annotated[list[_StopString], Field(max_length=MAX_STOP_STRINGS)] | None,
    ),
    Field(description="Texts that end the output when they appear."),
    Remedy("leave stop out for none"),
]
StopTokenIds = Annotated[
    tuple[TokenId, ...],
    Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True),
    BeforeValidator(
        _as_tuple,
        json_schema_input_type=TokenId | Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS)] | None,
    ),
    Field(description="Tokens that end the output, besides the model's own."),
]
LogitBias = Annotated[
    dict[TokenId, Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_LOGIT_BIAS),
    BeforeValidator(_limit_logit_bias),
    Field(description="Added to the logits of these tokens, by token id."),
    Remedy("map token ids to values from -100 to 100"),
]
