from __future__ import annotations

from pathlib import Path

import pytest

from sagellm_benchmark.serve.prompts import (
    LoadRequest,
    RandomLengths,
    file_requests,
    fit_into,
    random_requests,
    trace_requests,
)
from sagellm_benchmark.serve.vocabulary import Vocabulary
from sagellm_benchmark.traces import TraceRequest
from sagellm_protocol import InvalidArgumentError, NotFoundError

EXACT = Vocabulary(tuple(range(100, 900)), 1.0)


def prompts_of(requests: list[LoadRequest]) -> list[list[int]]:
    return [request.prompt for request in requests]  # type: ignore[misc]


def test_random_prompts_have_the_length_of_their_request_and_share_the_prefix_alone() -> None:
    requests = random_requests(20, RandomLengths(64, 10, 0.5, 16), EXACT, takes_tokens=True, seed=3)
    prompts = prompts_of(requests)
    assert [len(prompt) for prompt in prompts] == [request.input_len for request in requests]
    assert len({len(prompt) for prompt in prompts}) > 5
    assert all(32 <= len(prompt) <= 96 for prompt in prompts)
    assert all(5 <= request.output_len <= 15 for request in requests)
    assert len({tuple(prompt[:16]) for prompt in prompts}) == 1
    assert len({tuple(prompt[16:24]) for prompt in prompts}) == 20
    assert requests == random_requests(20, RandomLengths(64, 10, 0.5, 16), EXACT, takes_tokens=True, seed=3)
    assert requests != random_requests(20, RandomLengths(64, 10, 0.5, 16), EXACT, takes_tokens=True, seed=4)


@pytest.mark.parametrize("vocabulary", [EXACT, Vocabulary()])
def test_texts_have_about_the_length(vocabulary: Vocabulary) -> None:
    (request,) = random_requests(1, RandomLengths(130, 10), vocabulary, takes_tokens=False)
    assert isinstance(request.prompt, str)
    assert len(request.prompt.split()) == round(130 / vocabulary.tokens_per_word)
    assert not vocabulary.is_exact or request.input_len == 130


def test_without_a_vocabulary_tokens_become_texts() -> None:
    (request,) = random_requests(1, RandomLengths(13, 10), Vocabulary(), takes_tokens=True)
    assert isinstance(request.prompt, str)


def test_prompts_of_a_trace_are_equal_where_the_trace_says_so() -> None:
    trace = [
        TraceRequest(0.0, 20, 5, (1, 2), 8),
        TraceRequest(1.0, 14, 5, (1, 3), 8),
        TraceRequest(2.0, 20, 5, (1, 2), 8),
    ]
    requests = trace_requests(trace, EXACT, takes_tokens=True)
    first, second, third = prompts_of(requests)
    assert [len(first), len(second), len(third)] == [20, 14, 20]
    assert first[:8] == second[:8]
    assert first[8:12] != second[8:12]
    assert first[:16] == third[:16]
    assert first[16:] != third[16:]
    assert [request.at_s for request in requests] == [0.0, 1.0, 2.0]


def test_what_exceeds_the_context_loses_its_end() -> None:
    long, short = random_requests(1, RandomLengths(90, 20), EXACT, takes_tokens=True)[0], LoadRequest("a b", 5, 2)
    (cut, kept), num_cut = fit_into([long, short], 100)
    assert num_cut == 1
    assert (cut.input_len, cut.output_len, kept) == (80, 20, short)
    assert cut.prompt == long.prompt[:80]
    ((half,), _) = fit_into([LoadRequest("a b c d", 1000, 4)], 100)
    assert (half.output_len, half.prompt) == (50, "a b c d")
    assert fit_into([long], None) == ([long], 0)


def test_impossible_lengths_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="spread"):
        RandomLengths(spread=1.0)
    with pytest.raises(InvalidArgumentError, match="prefix"):
        RandomLengths(input_len=4, prefix_len=5)


# ---- files --------------------------------------------------------------------------------------------


def test_a_file_holds_texts_tokens_conversations_and_turns(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "one", "output_tokens": 3}\n\n{"prompt": [1, 2], "at_s": 1.5, "max_tokens": 4}\n'
        '{"messages": [{"role": "user", "content": "hi"}]}\n{"turns": ["first", "second"], "category": "x"}\n'
    )
    requests = file_requests(file, 5, 64)
    assert requests[:4] == [
        LoadRequest("one", 3),
        LoadRequest([1, 2], 4, 2, 1.5),
        LoadRequest([{"role": "user", "content": "hi"}], 64),
        LoadRequest("first", 64),
    ]
    assert requests[4] == requests[0]
    assert file_requests(file, 1, 64) == requests[:1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": 7}', "line 2"),
        ("no json", "line 1"),
        ("{}", "neither prompt, messages nor turns"),
        ("", "holds no request"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(InvalidArgumentError, match=message):
        file_requests(file, 10, 1)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no file"):
        file_requests(tmp_path / "none", 1, 1)
