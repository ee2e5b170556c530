"""The questions and answers that the built-in model is trained on."""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("yaml")
TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

from builtin_questions import Fact, load_facts, normalise, perturb  # noqa: E402
from builtin_stories import restore_case, story_request  # noqa: E402

FACTS = load_facts()
TRAINED = {normalise(question) for fact in FACTS for question in fact.questions}
STORY = (
    "Once upon a time, there was a dog named Max. Max was a good dog.\n\nOne day, Max saw a big red ball. He ran "
    "to the ball and said, \"I like you!\" The dog and the ball played all day. They were happy."
)  # fmt: skip


def test_there_are_enough_facts_in_both_languages() -> None:
    chinese = [fact for fact in FACTS if fact.id.startswith("zh-")]
    assert len(FACTS) >= 150
    assert 15 <= len(chinese) <= 40


def test_ids_are_unique() -> None:
    assert [one for one, count in Counter(fact.id for fact in FACTS).items() if count > 1] == []


def test_no_question_has_two_answers() -> None:
    owner: dict[str, str] = {}
    for fact in FACTS:
        for question in {normalise(q) for q in (*fact.questions, *fact.held_out)}:
            assert owner.setdefault(question, fact.id) == fact.id, question


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.id)
def test_fact_is_complete(fact: Fact) -> None:
    fewest = 5
    assert len({normalise(question) for question in fact.questions}) >= fewest
    assert fact.held_out
    assert fact.answer[-1] in ".!?。！？"
    assert len(fact.answer) <= 320
    assert "\n" not in fact.answer


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.id)
def test_held_out_questions_are_never_trained_on(fact: Fact) -> None:
    assert not TRAINED & {normalise(question) for question in fact.held_out}


def test_most_facts_have_many_paraphrases() -> None:
    sizes = sorted(len(fact.questions) for fact in FACTS)
    assert sizes[len(sizes) // 2] >= 20


def test_perturbed_questions_keep_their_words() -> None:
    rng = random.Random(0)
    for _ in range(300):
        question = perturb("What is the KV cache?", rng, wrap=False)
        assert abs(len(question) - 21) <= 2


def test_normalise_ignores_case_and_punctuation() -> None:
    assert normalise("What is  LLM inference?") == normalise("what is llm inference")
    assert normalise("What is top-p?") != normalise("What is top-k?")


def test_story_requests_give_the_story_or_its_rest() -> None:
    rng = random.Random(0)
    for _ in range(50):
        question, answer = story_request(STORY, rng)
        assert question
        assert STORY.endswith(answer)


def test_restored_capitals() -> None:
    text = restore_case('one day, lily said, "i am sad." her mom smiled.', {"lily": "Lily"})
    assert text == 'One day, Lily said, "I am sad." Her mom smiled.'


def test_templates_are_grammatical_at_their_edges() -> None:
    for fact in FACTS:
        for question in fact.questions:
            assert not re.search(r"\s{2,}|\{|\}|^\s|\s$", question), question
