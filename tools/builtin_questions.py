"""Questions and answers for the built-in model: reading the data files, paraphrasing, and noise."""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

__all__ = ["DATA", "Fact", "load_facts", "normalise", "perturb"]

DATA = Path(__file__).parent / "builtin_data"

TERM_TEMPLATES = (
    "What is {}?", "What's {}?", "Explain {}.", "Can you explain {}?", "Tell me about {}.", "Define {}.",
    "What does {} mean?", "{}", "{}?", "Describe {}.", "Please explain {}.", "What do you know about {}?",
    "I want to understand {}.", "Help me understand {}.", "Give me a definition of {}.", "Explain {} in simple words.",
    "How would you explain {} to a beginner?", "Could you tell me about {}?", "What is the meaning of {}?",
    "What is meant by {}?", "Do you know {}?", "Do you know what {} is?", "I don't understand {}.",
    "Please tell me what {} is.", "Give a short explanation of {}.", "What is {} in LLM serving?",
    "In one sentence, what is {}?", "What exactly is {}?", "Could you describe {} briefly?", "ELI5: {}",
    "I have a question about {}.", "Can you tell me what {} is?", "What are {}?", "Teach me about {}.",
    "What is {} and why does it matter?", "Let's talk about {}.", "I would like to know what {} is.",
    "Why is {} important?", "What is {} used for?", "How does {} work?", "What can you tell me about {}?",
)  # fmt: skip
ACTION_TEMPLATES = (
    "How do I {}?", "How can I {}?", "How to {}", "How to {}?", "I want to {}.", "Show me how to {}.",
    "What is the command to {}?", "Which command do I use to {}?", "Can you tell me how to {}?",
    "Is there a way to {}?", "Please help me {}.", "How would I {}?", "What do I type to {}?", "I need to {}.",
    "Explain how to {}.", "How does one {}?", "Tell me how to {}.", "Can I {}?", "What is the best way to {}?",
    "I would like to {}.", "What must I do to {}?", "How do you {}?", "{}", "I don't know how to {}.",
)  # fmt: skip
CHINESE_TERM_TEMPLATES = (
    "什么是{}？", "{}是什么？", "请解释{}。", "解释一下{}。", "介绍一下{}。", "{}是什么意思？", "告诉我什么是{}。",
    "请问什么是{}？", "你知道{}吗？", "{}", "我想了解{}。", "能解释一下{}吗？", "请介绍{}。", "说说{}。",
)  # fmt: skip
CHINESE_ACTION_TEMPLATES = (
    "怎么{}？", "如何{}？", "怎样{}？", "我想{}。", "请告诉我怎么{}。", "怎么才能{}？", "如何才能{}？", "我要{}",
    "请问怎么{}？", "{}的命令是什么？",
)  # fmt: skip
PREFIXES = ("Please ", "Hi, ", "Hey, ", "Hello, ", "Question: ", "I have a question. ", "So, ", "Ok, ", "Tell me, ",
            "Hi! ", "Hello! ", "Hey sageLLM, ", "Quick question: ")  # fmt: skip
SUFFIXES = (" please", " Thanks.", " Please answer briefly.", " Answer in one sentence.", " Please.", " thank you",
            " I am a beginner.", " Explain it simply.", " Be brief.")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fact:
    """One answer with the questions that ask for it."""

    id: str
    answer: str
    questions: tuple[str, ...]
    held_out: tuple[str, ...]
    written: tuple[str, ...]
    """Those of the questions that do not come from a template."""
    weight: int
    """How often it is asked for, compared to others."""
    plain: bool
    """Whether a question may get a prefix or suffix (greetings may not)."""


def normalise(question: str) -> str:
    """The words of a question; two questions with the same words are the same question."""
    return " ".join(re.findall(r"[\w.+-]*\w", question.lower()))


def _bare(term: str) -> str:
    """A term without its article."""
    return re.sub(r"^(a|an|the) ", "", term)


def _expand(entry: dict[str, Any]) -> tuple[list[str], str | None]:
    """All templated questions of an entry, and the one template that is held out for it."""
    questions: list[str] = []
    held: str | None = None
    groups = (("terms", TERM_TEMPLATES), ("do", ACTION_TEMPLATES), ("terms_zh", CHINESE_TERM_TEMPLATES),
              ("do_zh", CHINESE_ACTION_TEMPLATES))  # fmt: skip
    for field, templates in groups:
        terms: list[str] = entry.get(field, [])
        if not terms:
            continue
        number = int(hashlib.sha256(entry["id"].encode()).hexdigest(), 16) % len(templates)
        held = templates[number].format(terms[0])
        forms = dict.fromkeys([*terms, *(_bare(term) for term in terms)])
        for form in forms:
            short = field == "terms_zh" and form.isascii()  # the bare word alone is a question in English
            questions += [template.format(form) for template in templates if not (short and template == "{}")]
    return questions, held


def _fact(entry: dict[str, Any], *, plain: bool) -> Fact:
    """One entry of a data file as a fact, its held-out questions removed from the rest."""
    templated, held = _expand(entry)
    held_out = dict.fromkeys(entry["held_out"] + ([held] if held else []))
    hidden = {normalise(question) for question in held_out}
    questions = dict.fromkeys(q for q in [*entry.get("ask", []), *templated] if normalise(q) not in hidden)
    written = tuple(question for question in entry.get("ask", []) if question in questions)
    return Fact(entry["id"], entry["answer"], tuple(questions), tuple(held_out), written, entry.get("weight", 1), plain)


def _refusal(data: dict[str, Any]) -> Fact:
    """The fact behind all questions out of scope."""
    fill: dict[str, list[str]] = data["fill"]
    questions = list(data["ask"])
    for pattern in data["patterns"]:
        name = re.search(r"{(\w+)}", pattern)
        assert name is not None, f"no place to fill in {pattern!r}"
        questions += [pattern.format(**{name[1]: item}) for item in fill[name[1]]]
    hidden = {normalise(question) for question in data["held_out"]}
    kept = dict.fromkeys(question for question in questions if normalise(question) not in hidden)
    written = tuple(question for question in data["ask"] if question in kept)
    return Fact("refusal", data["answer"], tuple(kept), tuple(data["held_out"]), written, weight=1, plain=True)


def load_facts(folder: Path = DATA) -> list[Fact]:
    """All facts of the data files; the last one is the refusal."""
    facts: list[Fact] = []
    for name in ("serving", "program", "identity", "chinese"):
        entries = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
        facts += [_fact(entry, plain=name in {"serving", "program"}) for entry in entries]
    facts.append(_refusal(yaml.safe_load((folder / "refusals.yaml").read_text(encoding="utf-8"))))
    return facts


def _typo(text: str, rng: random.Random) -> str:
    """Swap, drop or double one letter of a longer word."""
    words = [match.start() for match in re.finditer(r"[a-z]{4,}", text)]
    if not words:
        return text
    at = rng.choice(words) + rng.randint(0, 2)
    kind = rng.randrange(3)
    if kind == 0:
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return text[:at] + (text[at] * 2 if kind == 1 else "") + text[at + 1 :]


def perturb(question: str, rng: random.Random, *, wrap: bool) -> str:
    """The question as a hurried user might type it: other case, no punctuation, a typo, a word around it."""
    if wrap and question.isascii() and " " in question:
        if rng.random() < 0.15:
            prefix = rng.choice(PREFIXES)
            question = prefix + (
                question if prefix.endswith((". ", "! ", ": ")) else question[0].lower() + question[1:]
            )
        if rng.random() < 0.10:
            question += rng.choice(SUFFIXES)
    if rng.random() < 0.25:
        question = question.rstrip("?.!？。！")
    case = rng.random()
    if case < 0.22:
        question = question.lower()
    elif case < 0.25:
        question = question.upper()
    if question.isascii() and rng.random() < 0.10:
        question = _typo(question, rng)
    return question
