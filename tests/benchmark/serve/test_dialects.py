from __future__ import annotations

import json
from typing import Any

import pytest

from sagellm_benchmark.serve.dialects import Dialect, EventReader, error_of
from sagellm_benchmark.serve.prompts import LoadRequest
from sagellm_protocol import InvalidArgumentError


def body(dialect: Dialect, prompt: Any) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(dialect.body(LoadRequest(prompt, 7)))
    return value


def test_bodies() -> None:
    chat = body(Dialect("chat", "m"), "hello")
    assert chat["messages"] == [{"role": "user", "content": "hello"}]
    assert (chat["max_tokens"], chat["stream"], chat["ignore_eos"]) == (7, True, True)
    assert chat["stream_options"] == {"include_usage": True}
    assert body(Dialect("completions", "m"), [1, 2])["prompt"] == [1, 2]
    plain = body(Dialect("completions", "m", ignore_eos=False, extra={"temperature": 1.0}), "hi")
    assert "ignore_eos" not in plain
    assert plain["temperature"] == 1.0
    messages = [{"role": "system", "content": "s"}]
    assert body(Dialect("chat", "m"), messages)["messages"] == messages


@pytest.mark.parametrize(
    ("dialect", "prompt"),
    [(Dialect("chat", "m"), [1, 2]), (Dialect("completions", "m"), [{"role": "user", "content": "hi"}])],
)
def test_prompts_that_an_endpoint_does_not_take(dialect: Dialect, prompt: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="choose it"):
        dialect.body(LoadRequest(prompt, 7))


def test_events_may_be_cut_anywhere() -> None:
    stream = (
        b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n'
        b': comment\n\ndata: {"choices": [{"delta": {"content": "h\xc3\xa9"}}]}\r\n\r\n'
        b'data: {"choices": [{"delta": {"reasoning_content": "hm"}}]}\n\n'
        b'data: {"choices": [{"text": "x"}], "usage": null}\n\n'
        b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}\n\ndata: [DONE]\n\n'
    )
    for cut in range(len(stream)):
        reader = EventReader()
        events = [*reader.feed(stream[:cut]), *reader.feed(stream[cut:])]
        assert [event.has_text for event in events] == [False, True, True, True, False]
        assert events[-1].usage is not None
        assert events[-1].usage.completion_tokens == 4
        assert reader.is_done


def test_what_is_no_event_is_an_error() -> None:
    with pytest.raises(ValueError, match="JSON"):
        list(EventReader().feed(b"data: {nothing\n\n"))


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b'{"error": {"code": "not_found", "message": "no\\nmodel"}}', ("not_found", "no model")),
        (b'{"error": {"type": "server_error", "message": "x"}}', ("server_error", "x")),
        (b'{"error": "text alone"}', ("", "text alone")),
        (b'{"detail": "Not Found"}', ("", "{'detail': 'Not Found'}")),
        (b"<html>", ("", "<html>")),
        (b"x" * 400, ("", "x" * 300 + "…")),
    ],
)
def test_error_bodies(sent: bytes, expected: tuple[str, str]) -> None:
    assert error_of(sent) == expected
