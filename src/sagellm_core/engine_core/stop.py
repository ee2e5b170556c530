"""When a request ends by its tokens; stop strings are text and belong to the output processor."""

from __future__ import annotations

from sagellm_core.engine_core.request import EngineRequest
from sagellm_protocol import FinishReason


def check_stop(request: EngineRequest, max_model_len: int) -> tuple[FinishReason | None, int | None]:
    """Judge the newest token: (finish reason or None, the stop token id that ended it or None).

    The end-of-sequence and stop tokens count as output tokens. `min_tokens` holds both back. A text that has the form
    asked for and can't go on ends by itself; and where the tokens run out, it is a regular end if the text is complete.
    """
    sampling = request.core.sampling
    token_id = request.token_ids[-1]
    matcher = request.matcher
    if matcher is not None and matcher.is_terminated:
        return FinishReason.STOP, None
    # What a failover or a strategy resubmitted as prompt was output before.
    if request.num_output_tokens + request.core.sampled_prefix_len >= sampling.min_tokens:
        if not sampling.ignore_eos and token_id in request.core.eos_token_ids:
            return FinishReason.STOP, None
        if token_id in sampling.stop_token_ids:
            return FinishReason.STOP, token_id
    if request.num_output_tokens >= sampling.max_tokens or request.num_tokens >= max_model_len:
        return FinishReason.STOP if matcher is not None and matcher.is_accepting else FinishReason.LENGTH, None
    return None, None
