"""Thoughts between marks, however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_gateway.pieces import AnswerChoice, Piece, ReasoningPiece, collect
from sagellm_gateway.reasoning import FORMATS, for_template

THINK = FORMATS[0]

# whether the prompt opens the thought, text, thought, answer
CASES = [
    (False, "<think>hm</think>\n\nYes.", "hm", "Yes."),
    (False, "\n<think>a\n\nb \n</think> Yes.\n", "a\n\nb", "Yes.\n"),
    (False, "No thought. <think>x</think>", "", "No thought. <think>x</think>"),
    (False, "<thin", "", "<thin"),
    (True, "hm</think>Yes.", "hm", "Yes."),
    (True, "never ends", "never ends", ""),
    (True, "</think>Yes.", "", "Yes."),
    (True, "a </thin b</think>c", "a </thin b", "c"),
    (True, "\n<think>\nagain\n</think>\nc", "again", "c"),
    (True, "cut off </thi", "cut off </thi", ""),
    (True, " \n ", "", ""),
    (False, "<think>\n\n</think>\n\n<think>c", "", "<think>c"),
    (False, " <b>", "", " <b>"),
]


def read(prompt_opens: bool, chunks: list[str]) -> tuple[str, str]:
    parser = THINK.parser(0, prompt_opens)
    pieces: list[Piece] = [*(piece for chunk in chunks for piece in parser.feed(chunk)), *parser.end()]
    choice = (collect(pieces).choices or [AnswerChoice()])[0]
    return choice.reasoning, choice.text


@pytest.mark.parametrize(("opens", "text", "thought", "answer"), CASES)
def test_thought_and_answer(opens: bool, text: str, thought: str, answer: str) -> None:
    assert read(opens, [text]) == (thought, answer)
    assert read(opens, list(text)) == (thought, answer)


@given(data=st.data(), case=st.sampled_from(CASES))
def test_any_cut_tells_the_same(data: st.DataObject, case: tuple[bool, str, str, str]) -> None:
    opens, text, thought, answer = case
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(opens, chunks) == (thought, answer)


@given(
    opens=st.booleans(),
    parts=st.lists(st.sampled_from(["<think>", "</think>", "<", "think>", "a", " ", "\n"]), max_size=9),
)
def test_cuts_never_matter(opens: bool, parts: list[str]) -> None:
    whole = read(opens, ["".join(parts)])
    assert read(opens, parts) == whole
    assert read(opens, list("".join(parts))) == whole


def test_thoughts_stream() -> None:
    parser = THINK.parser(0, prompt_opens=True)
    assert parser.feed("one ") == [ReasoningPiece(0, "one")]
    assert parser.feed("two") == [ReasoningPiece(0, " two")]


def test_templates_and_prompts() -> None:
    assert for_template("{% if content.split('</think>') %}") is THINK
    assert for_template("plain") is None
    magistral = for_template("[THINK] ... [/THINK]")
    assert magistral is not None
    assert magistral.marks_are_special
    assert THINK.is_open("<|assistant|><think>\n")
    assert not THINK.is_open("<|assistant|><think>\n\n</think>\n\n")
