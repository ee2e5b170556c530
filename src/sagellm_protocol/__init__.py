"""The vocabulary that all parts of sageLLM share: Protocol v0.1.

Requests, responses, stream events, metrics, errors, capabilities and KV types. Imports only the standard library and
pydantic. The types of the OpenAI API stand in :mod:`sagellm_protocol.openai`, which is imported on its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sagellm_protocol.lazy import lazy_exports

if TYPE_CHECKING:
    from sagellm_protocol.batch import BatchType
    from sagellm_protocol.capability import CapabilityDescriptor
    from sagellm_protocol.dtypes import DType, KernelKind
    from sagellm_protocol.embedding import EmbedParams
    from sagellm_protocol.errors import (
        CommGroupError,
        CommTimeoutError,
        DeadlineExceededError,
        DistributedRuntimeError,
        Error,
        ErrorCode,
        InternalError,
        InvalidArgumentError,
        KVTransferError,
        NotFoundError,
        NotImplementedInBackendError,
        PermissionDeniedError,
        RequestCancelledError,
        ResourceExhaustedError,
        SageLLMError,
        UnauthenticatedError,
        UnavailableError,
        UnsupportedError,
    )
    from sagellm_protocol.ids import new_engine_id, new_request_id, new_session_id, new_trace_id, new_transfer_id
    from sagellm_protocol.kv import KVAllocateParams, KVBlock, KVErrorCode, KVHandle, KVTransferMetadata
    from sagellm_protocol.messages import ChatMessage, FunctionCall, FunctionDefinition, TextPart, Tool, ToolCall
    from sagellm_protocol.metrics import Metrics, Timestamps, wall_clock_epoch
    from sagellm_protocol.model import EchoedModel, EdgeModel, ProtocolEnum, ProtocolModel, Remedy, parse
    from sagellm_protocol.model_description import ModelDescription, TokenizeRequest
    from sagellm_protocol.request import SLO, Request, RequestPriority
    from sagellm_protocol.response import CompletionOutput, FinishReason, Response, TokenLogprob, TopLogprob, Usage
    from sagellm_protocol.resume import ResumePoint
    from sagellm_protocol.sampling import DecodingStrategy, SamplingParams, SamplingPreset
    from sagellm_protocol.stream import (
        StreamEvent,
        StreamEventDelta,
        StreamEventEnd,
        StreamEventStart,
        parse_stream_event,
    )
    from sagellm_protocol.structured import StructuredOutput
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            ".batch": ("BatchType",),
            ".capability": ("CapabilityDescriptor",),
            ".dtypes": ("DType", "KernelKind"),
            ".embedding": ("EmbedParams",),
            ".errors": (
                "CommGroupError",
                "CommTimeoutError",
                "DeadlineExceededError",
                "DistributedRuntimeError",
                "Error",
                "ErrorCode",
                "InternalError",
                "InvalidArgumentError",
                "KVTransferError",
                "NotFoundError",
                "NotImplementedInBackendError",
                "PermissionDeniedError",
                "RequestCancelledError",
                "ResourceExhaustedError",
                "SageLLMError",
                "UnauthenticatedError",
                "UnavailableError",
                "UnsupportedError",
            ),
            ".ids": ("new_engine_id", "new_request_id", "new_session_id", "new_trace_id", "new_transfer_id"),
            ".kv": ("KVAllocateParams", "KVBlock", "KVErrorCode", "KVHandle", "KVTransferMetadata"),
            ".messages": ("ChatMessage", "FunctionCall", "FunctionDefinition", "TextPart", "Tool", "ToolCall"),
            ".metrics": ("Metrics", "Timestamps", "wall_clock_epoch"),
            ".model": ("EchoedModel", "EdgeModel", "ProtocolEnum", "ProtocolModel", "Remedy", "parse"),
            ".model_description": ("ModelDescription", "TokenizeRequest"),
            ".request": ("SLO", "Request", "RequestPriority"),
            ".response": ("CompletionOutput", "FinishReason", "Response", "TokenLogprob", "TopLogprob", "Usage"),
            ".resume": ("ResumePoint",),
            ".sampling": ("DecodingStrategy", "SamplingParams", "SamplingPreset"),
            ".stream": ("StreamEvent", "StreamEventDelta", "StreamEventEnd", "StreamEventStart", "parse_stream_event"),
            ".structured": ("StructuredOutput",),
        },
    )

PROTOCOL_VERSION = "0.1"

__all__ = [
    "PROTOCOL_VERSION",
    "SLO",
    "BatchType",
    "CapabilityDescriptor",
    "ChatMessage",
    "CommGroupError",
    "CommTimeoutError",
    "CompletionOutput",
    "DType",
    "DeadlineExceededError",
    "DecodingStrategy",
    "DistributedRuntimeError",
    "EchoedModel",
    "EdgeModel",
    "EmbedParams",
    "Error",
    "ErrorCode",
    "FinishReason",
    "FunctionCall",
    "FunctionDefinition",
    "InternalError",
    "InvalidArgumentError",
    "KVAllocateParams",
    "KVBlock",
    "KVErrorCode",
    "KVHandle",
    "KVTransferError",
    "KVTransferMetadata",
    "KernelKind",
    "Metrics",
    "ModelDescription",
    "NotFoundError",
    "NotImplementedInBackendError",
    "PermissionDeniedError",
    "ProtocolEnum",
    "ProtocolModel",
    "Remedy",
    "Request",
    "RequestCancelledError",
    "RequestPriority",
    "ResourceExhaustedError",
    "Response",
    "ResumePoint",
    "SageLLMError",
    "SamplingParams",
    "SamplingPreset",
    "StreamEvent",
    "StreamEventDelta",
    "StreamEventEnd",
    "StreamEventStart",
    "StructuredOutput",
    "TextPart",
    "Timestamps",
    "TokenLogprob",
    "TokenizeRequest",
    "Tool",
    "ToolCall",
    "TopLogprob",
    "UnauthenticatedError",
    "UnavailableError",
    "UnsupportedError",
    "Usage",
    "new_engine_id",
    "new_request_id",
    "new_session_id",
    "new_trace_id",
    "new_transfer_id",
    "parse",
    "parse_stream_event",
    "wall_clock_epoch",
]
