"""The types of the OpenAI API, shared by gateway, engine server and clients.

Requests refuse unknown fields and bound every value; answers ignore unknown fields. ``parse(ChatCompletionRequest,
body, what="chat completion request")`` gives the protocol's error, ``ErrorResponse.of`` the API's body for it.
"""

from __future__ import annotations

from sagellm_protocol.messages import (
    ChatMessage,
    FunctionCall,
    FunctionDefinition,
    TextPart,
    Tool,
    ToolCall,
)
from sagellm_protocol.openai.chat import (
    AllowedTools,
    AllowedToolsChoice,
    ChatAnswer,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    ChatLogprobs,
    ChatTokenLogprob,
    ChatTopLogprob,
    FunctionCallDelta,
    NamedToolChoice,
    ToolCallDelta,
    ToolChoiceFunction,
)
from sagellm_protocol.openai.common import (
    CompletionUsage,
    ErrorBody,
    ErrorResponse,
    JsonSchemaFormat,
    ModelCard,
    ModelList,
    PromptTokensDetails,
    ResponseFormat,
    StreamOptions,
    StructuredOutputs,
)
from sagellm_protocol.openai.completions import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from sagellm_protocol.openai.embeddings import EmbeddingItem, EmbeddingRequest, EmbeddingResponse, EmbeddingUsage

__all__ = [
    "AllowedTools",
    "AllowedToolsChoice",
    "ChatAnswer",
    "ChatChoice",
    "ChatChunkChoice",
    "ChatCompletion",
    "ChatCompletionChunk",
    "ChatCompletionRequest",
    "ChatDelta",
    "ChatLogprobs",
    "ChatMessage",
    "ChatTokenLogprob",
    "ChatTopLogprob",
    "Completion",
    "CompletionChoice",
    "CompletionLogprobs",
    "CompletionRequest",
    "CompletionUsage",
    "EmbeddingItem",
    "EmbeddingRequest",
    "EmbeddingResponse",
    "EmbeddingUsage",
    "ErrorBody",
    "ErrorResponse",
    "FunctionCall",
    "FunctionCallDelta",
    "FunctionDefinition",
    "JsonSchemaFormat",
    "ModelCard",
    "ModelList",
    "NamedToolChoice",
    "PromptTokensDetails",
    "ResponseFormat",
    "StreamOptions",
    "StructuredOutputs",
    "TextPart",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "ToolChoiceFunction",
]
