"""What crosses the boundary of the engine core: requests going in, outputs coming out, and the client between them.

Holds `EngineCoreRequest`, `EngineCoreOutput`, `RequestTimings` and the structural type `CoreClient`. The input
processor builds requests, decoding strategies rewrite them, the scheduler serves them, the output processor reads the
outputs. Promises: plain slotted dataclasses without behaviour, picklable, and an import that costs nothing (no torch,
no numpy).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from sagellm_core.models.pooling import Pooling
    from sagellm_core.sampling.logprobs import TokenLogprobs
    from sagellm_core.structured import Grammar
    from sagellm_protocol.errors import Error
    from sagellm_protocol.response import FinishReason
    from sagellm_protocol.sampling import SamplingParams

__all__ = ["CoreClient", "EngineCoreOutput", "EngineCoreRequest", "RequestTimings"]


@dataclass(frozen=True, slots=True)
class EngineCoreRequest:
    """One sequence to extend: validated, tokenised, with every default resolved.

    `sampling.n` is 1 here for whoever executes the request; several outputs are several requests (see
    `sagellm_core.decoding.child_request`). `sampling.max_tokens` counts new tokens. `eos_token_ids` are the model's own
    end tokens; they end the request unless `sampling.ignore_eos`, and never before `sampling.min_tokens` new tokens.

    Whoever resubmits prompt + emitted tokens (beam search, contrastive search) says in `sampled_prefix_len` how many
    trailing prompt ids are emitted ones: penalties and `min_tokens` count them as output. `max_tokens` does not.

    `resumed_token_ids` are output of this very request that another engine made: all limits count them, the request
    goes on behind them as after a preemption, and it ends at once if they ended it. The core's outputs hold only new
    tokens; a strategy's outputs begin with the resumed ones.
    """

    request_id: str
    prompt_token_ids: Sequence[int]  # not empty; list or tuple of ids below the vocabulary size
    sampling: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    priority: int = 0  # lower runs first
    arrival_time: float = 0.0  # seconds of the engine's monotonic clock
    cache_salt: str | None = None  # requests with different salts never share prefix blocks
    lora_id: str | None = None
    read_prefix_cache: bool = True  # False: compute the whole prompt (e.g. its hidden states are wanted)
    want_hidden_states: bool = False  # fill EngineCoreOutput.hidden_states
    pooling: Pooling | None = None  # sample nothing; fill EngineCoreOutput.pooled and end
    seed: int = 0  # key of the random numbers, always concrete; 0 <= seed < 2**64
    choice_index: int = 0  # which of the n outputs this is; beam search returns its hypothesis of this rank
    sampled_prefix_len: int = 0  # trailing prompt ids that were generated earlier: see above
    resumed_token_ids: Sequence[int] = ()  # the first output tokens, made elsewhere: see above
    processed_logprobs: bool = False  # logprobs after bias, masks and penalties (no temperature), not the raw ones
    grammar: Grammar | None = None  # the form of the output; of this process, the one field that cannot be pickled
    submission: int = 0  # the client's number: tells the request from an earlier one of the same id


@dataclass(slots=True)
class RequestTimings:
    """What one request cost, measured by the engine core; times are seconds of one monotonic clock.

    A time that was not reached is None. KV counts are the most it held.
    """

    queued_at: float = 0.0
    scheduled_at: float | None = None  # first time in a step
    first_token_at: float | None = None
    last_token_at: float | None = None
    prefill_ms: float = 0.0  # scheduled_at -> first_token_at
    decode_ms: float = 0.0  # first_token_at -> last_token_at
    evict_count: int = 0  # cached blocks evicted to make room for this request
    evict_ms: float = 0.0
    num_cached_tokens: int = 0  # prompt tokens served from the prefix cache
    kv_used_tokens: int = 0
    kv_used_bytes: int = 0
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True)
class EngineCoreOutput:
    """What one step (or the end) of a request produced. The last output of a request has `finish_reason` set.

    `hidden_states` is set once, on the last output, and only when the request asked by `want_hidden_states`. It holds
    the hidden states after the final norm (what the LM head reads) of every token this request computed itself,
    accumulated over its steps and chunks: row j belongs to position `num_cached_tokens + j` of prompt + output, the
    last row to the last token that went through the model. The newest sampled token has no row: it was not computed.
    So a request with `max_tokens=1` gets the rows of prompt[num_cached_tokens:], and of the whole prompt when
    `read_prefix_cache` is False. A position recomputed after a preemption appears once. Shape [rows, hidden_size],
    activation dtype, on the CPU.
    """

    request_id: str
    new_token_ids: Sequence[int] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token id or stop string that ended it; None for eos and length
    logprobs: Sequence[TokenLogprobs] | None = None  # one a new token, if the request asked
    hidden_states: Tensor | None = None  # [rows, hidden_size], see above
    pooled: Tensor | None = None  # [hidden_size] float64, on the CPU: see `sagellm_core.pooled`
    num_cached_tokens: int = 0
    kv_used_tokens: int = 0
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None  # first entry None: nothing precedes the first token
    metrics: RequestTimings | None = None
    error: Error | None = None  # with the finish reason "error"
    submission: int = 0  # that of the request

    @property
    def finished(self) -> bool:
        """Whether this is the request's last output."""
        return self.finish_reason is not None


class CoreClient(Protocol):
    """Whatever serves engine requests: the in-process engine core, a remote one, a fake in a test."""

    def submit(self, request: EngineCoreRequest) -> AsyncGenerator[EngineCoreOutput, None]:
        """Run the request; yields its outputs in order, the last with `finish_reason`.

        An async generator: closing it (`aclose`, or cancelling its consumer) before the end aborts the request and
        frees what it holds. A request that fails after it was accepted ends with an output that carries `error`.
        """
        ...
