"""Bodies whose other fields are known must be read as if nothing were."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_gateway.body import BodyParser
from sagellm_protocol import SageLLMError, parse
from sagellm_protocol.openai import ChatCompletionRequest

_TEXTS = st.text(max_size=4)
_ANYTHING = st.sampled_from([None, True, 1, 1.0, 0, -0.0, -1, "1", "", [], {}, ["a"], {"a": 1}])
_MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "nobody"])},
    optional={"content": _TEXTS | _ANYTHING, "tool_call_id": _TEXTS, "further": _ANYTHING},
)
# Few values a field, so that bodies meet others that differ in the messages or in a value's type alone.
_BODIES = st.fixed_dictionaries(
    {"model": st.just("m")},
    optional={
        "messages": st.lists(_MESSAGES, max_size=2) | _ANYTHING,
        "max_tokens": st.just(3) | _ANYTHING,
        "temperature": st.sampled_from([0, 0.0, 1, 1.0, True]),
        "seed": st.just(1) | _ANYTHING,
        "logprobs": _ANYTHING,
        "stream": _ANYTHING,
        "stop": _ANYTHING,
        "metadata": _ANYTHING,
        "response_format": st.sampled_from([{"type": "json_object"}, {"type": "text"}]) | _ANYTHING,
        "tools": st.just([{"type": "function", "function": {"name": "f"}}]) | _ANYTHING,
        "unknown": _ANYTHING,
    },
)

_parse = BodyParser(ChatCompletionRequest, "messages")


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hello"}], **fields}


def outcome(read: Any) -> Any:
    """What is read, with the values' types and what was given; or the error with all it says."""
    try:
        call = read()
        return call, repr(call), call.model_fields_set, call.to_request(request_id="r", trace_id="t")
    except SageLLMError as error:
        return type(error), error.message, error.context


@given(bodies=st.lists(_BODIES, min_size=1, max_size=3))
def test_reads_and_refuses_as_validation_does(bodies: list[dict[str, Any]]) -> None:
    for body in (*bodies, *bodies):
        expected = outcome(lambda body=body: parse(ChatCompletionRequest, body, what="body"))
        before = dict(body)
        assert outcome(lambda body=body: _parse(body, what="body")) == expected
        assert body == before


def test_knows_what_differs_in_the_messages_alone() -> None:
    read = BodyParser(ChatCompletionRequest, "messages")
    first = read(chat(max_tokens=3), what="body")
    second = read({**chat(max_tokens=3), "messages": [{"role": "user", "content": "bye"}]}, what="body")
    assert second.to_sampling_params() is first.to_sampling_params()
    assert [call.messages[0].content for call in (first, second)] == ["hello", "bye"]
    assert "hello" not in str(read._known)


@pytest.mark.parametrize("fields", [{"metadata": {"a": "b"}}, {"chat_template_kwargs": {"a": 1}}])
def test_shares_nothing_that_can_be_changed(fields: dict[str, Any]) -> None:
    read = BodyParser(ChatCompletionRequest, "messages")
    calls = [read(chat(**fields), what="body") for _ in range(2)]
    (name,) = fields
    assert getattr(calls[0], name) == getattr(calls[1], name)
    assert getattr(calls[0], name) is not getattr(calls[1], name)


def test_is_bounded() -> None:
    read = BodyParser(ChatCompletionRequest, "messages")
    for seed in range(1000):
        read(chat(seed=seed), what="body")
    assert len(read._known) <= 256
    read = BodyParser(ChatCompletionRequest, "messages")
    read(chat(guided_regex="a" * 2000), what="body")
    assert not read._known
