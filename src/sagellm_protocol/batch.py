"""What a step's batch consists of."""

from __future__ import annotations

from sagellm_protocol.model import ProtocolEnum


class BatchType(ProtocolEnum):
    """A description of one step for the kernel and for metrics; never a branch of the scheduler."""

    PREFILL = "prefill"  # every request has more than one query token, or is in its prompt
    DECODE = "decode"  # every request has exactly one query token
    MIXED = "mixed"  # both
