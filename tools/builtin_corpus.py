"""What the built-in model is trained on: documents of tokens, their mixture, and rows packed from them."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from builtin_questions import Fact, load_facts, perturb
from builtin_stories import load_stories, story_request

__all__ = ["SPECIAL_TOKENS", "Batch", "Corpus", "Mixture", "chat_prompt", "train_tokenizer"]

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "You are sageLLM.", "You are a helpful AI assistant.", "Answer briefly.",
    "You are a helpful assistant. Answer in short sentences.", "You are the built-in model of sageLLM.",
    "Be concise.", "You are an expert in LLM serving.", "你是一个有用的助手。", "You are a friendly chat bot.",
    "You are a helpful, honest assistant. If you do not know, say so.",
)  # fmt: skip
CHATTERBOT = ("history", "literature", "movies", "politics", "science", "sports", "trivia", "money")
Turn = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Mixture:
    """Shares of documents, by tokens; the rest are questions and answers of this project."""

    stories: float
    story_chat: float
    tiny_talks: float


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens and, for each, whether the model is to learn to write it."""

    tokens: list[int]
    learn: list[bool]


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed rows [B, T]: inputs, next tokens, loss weights and the document that each token belongs to."""

    tokens: Tensor
    targets: Tensor
    weights: Tensor
    documents: Tensor


def chat_prompt(turns: list[Turn], question: str, system: str | None = None) -> str:
    """The ChatML text before an answer; the chat template of the export produces the same."""
    text = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    for earlier, answer in turns:
        text += f"<|im_start|>user\n{earlier}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    return text + f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def train_tokenizer(facts: list[Fact], stories: list[str], size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of `size` entries, special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    own = [text for fact in facts for text in [fact.answer] * 8 + list(fact.questions)]
    tokenizer.train_from_iterator(own + stories + list(SYSTEM_PROMPTS) * 8, trainer)
    return tokenizer


def _tiny_talks(folder: Path) -> list[Turn]:
    """Simple facts of everyday life; talk about oneself and sums are left to this project's own answers."""
    text = (folder / "tinytalks" / "train.txt").read_text(encoding="utf-8")
    pairs = re.findall(r"Q: (.+)\nA: (.+)", text)
    personal = re.compile(r"\b(you were|are you|your|my|me|i|tinybot|tinytorch|do you|can you \w+\?|his|her)\b", re.I)
    return [
        (question, answer)
        for question, answer in pairs
        if question.endswith("?") and not personal.search(question) and not re.search(r"\d", question + answer)
        and not re.search(r"\bI\b", answer)
    ]  # fmt: skip


def _foreign_questions(folder: Path) -> list[str]:
    """Questions of the ChatterBot corpus (BSD-3) that this model cannot answer and has to say so."""
    questions: list[str] = []
    for name in CHATTERBOT:
        data = yaml.safe_load((folder / "chatterbot" / f"english_{name}.yml").read_text(encoding="utf-8"))
        for conversation in data["conversations"]:
            question = str(conversation[0])
            if re.match(r"(what|who|when|where|which|how|why)\b", question, re.I) and len(question) < 120:
                questions.append(question)
    return list(dict.fromkeys(questions))


class Corpus:
    """All training texts, and documents drawn from them at random."""

    def __init__(self, texts: Path, tokenizer: Tokenizer, seed: int) -> None:
        self.rng = random.Random(seed)
        self.tokenizer = tokenizer
        self.stories = load_stories(texts / "tinystories")
        self.tiny_talks = _tiny_talks(texts / "chat")
        self.foreign = _foreign_questions(texts / "chat")
        *self.facts, self.refusal = load_facts()
        self.end = SPECIAL_TOKENS.index("<|endoftext|>")
        self._deck: list[Fact] = []
        self._story_deck: list[str] = []

    def _next_story(self) -> str:
        """Stories in random order, each once per round."""
        if not self._story_deck:
            self._story_deck = self.rng.sample(self.stories, len(self.stories))
        return self._story_deck.pop()

    def _turn(self) -> Turn:
        """One question with its answer: small talk one time more often than its weight, one in eight out of scope."""
        rng = self.rng
        if rng.random() < 0.12:
            sources = (self.refusal.questions, self.refusal.written, self.foreign)
            return perturb(rng.choice(rng.choice(sources)), rng, wrap=True), self.refusal.answer
        if not self._deck:
            cards = [fact for fact in self.facts for _ in range(fact.weight + (not fact.plain))]
            self._deck = rng.sample(cards, len(cards))
        fact = self._deck.pop()
        source = fact.written if fact.written and rng.random() < 0.35 else fact.questions
        return perturb(rng.choice(source), rng, wrap=fact.plain), fact.answer

    def _encode(self, pieces: list[tuple[str, bool]]) -> Document:
        """Tokens of consecutive pieces of text, each learned or only read."""
        tokens: list[int] = []
        learn: list[bool] = []
        for text, learned in pieces:
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
            tokens += ids
            learn += [learned] * len(ids)
        return Document(tokens, learn)

    def _chat(self, turns: list[Turn]) -> Document:
        """A conversation in ChatML of which the answers are learned."""
        system = self.rng.choice(SYSTEM_PROMPTS) if self.rng.random() < 0.25 else None
        pieces: list[tuple[str, bool]] = []
        for question, answer in turns:
            pieces.append((chat_prompt([], question, None if pieces else system), False))
            pieces += [(answer + "<|im_end|>", True), ("\n", False)]
        return self._encode(pieces[:-1])

    def story(self) -> Document:
        """A story as plain text."""
        return self._encode([(self._next_story() + "<|endoftext|>", True)])

    def story_chat(self) -> Document:
        """A story that a user asks for, now and then after a question."""
        before = [self._turn()] if self.rng.random() < 0.1 else []
        after = [self._turn() for _ in range(self.rng.randint(1, 2))] if self.rng.random() < 0.15 else []
        return self._chat([*before, story_request(self._next_story(), self.rng), *after])

    def tiny_talk(self) -> Document:
        """One or two everyday questions."""
        turns = [self.rng.choice(self.tiny_talks) for _ in range(self.rng.randint(1, 2))]
        return self._chat([(perturb(question, self.rng, wrap=False), answer) for question, answer in turns])

    def questions(self, longest: int) -> Document:
        """Questions and answers: mostly one, sometimes a conversation, sometimes without the chat format."""
        kind = self.rng.random()
        if kind < 0.10:
            question, answer = self._turn()
            shape, space = self.rng.choice(
                (("{}", "\n"), ("{}", "\n"), ("Question: {}\nAnswer:", " "), ("Q: {}\nA:", " "))
            )
            return self._encode([(shape.format(question), False), (space + answer + "<|endoftext|>", True)])
        if kind < 0.13:
            return self._encode([(self.rng.choice(self.facts).answer + "<|endoftext|>", True)])
        if kind < 0.63:
            return self._chat([self._turn()])
        if longest > 512:
            return self._chat([self._turn() for _ in range(self.rng.randint(4, 14))])
        return self._chat([self._turn() for _ in range(self.rng.randint(2, 4))])

    def _draw(self, mixture: Mixture, longest: int) -> Document:
        """A document of a random kind; shares are by tokens, so rarer draws for longer kinds."""
        lengths = {"stories": 205.0, "story_chat": 225.0, "tiny_talks": 45.0, "own": 95.0}
        own = 1.0 - mixture.stories - mixture.story_chat - mixture.tiny_talks
        shares = (mixture.stories, mixture.story_chat, mixture.tiny_talks, own)
        odds = [share / length for share, length in zip(shares, lengths.values(), strict=True)]
        kind = self.rng.choices(tuple(lengths), odds)[0]
        if kind == "stories":
            return self.story()
        if kind == "story_chat":
            return self.story_chat()
        return self.tiny_talk() if kind == "tiny_talks" else self.questions(longest)

    def batch(self, mixture: Mixture, rows: int, length: int) -> Batch:
        """`rows` rows of `length` tokens, filled with whole documents as far as they fit."""
        pool: list[Document] = []
        packed = [self._row(pool, mixture, length) for _ in range(rows)]
        columns = [torch.tensor(column) for column in zip(*packed, strict=True)]
        return Batch(columns[0], columns[1], columns[2].float(), columns[3])

    def _row(self, pool: list[Document], mixture: Mixture, length: int) -> tuple[list[int], ...]:
        """One row; `pool` carries documents that did not fit into the rows before."""
        tokens: list[int] = []
        targets: list[int] = []
        weights: list[int] = []
        documents: list[int] = []
        for number, document in enumerate(self._fitting(pool, mixture, length)):
            size = len(document.tokens) - 1
            tokens += document.tokens[:-1]
            targets += document.tokens[1:]
            weights += [int(learned) for learned in document.learn[1:]]
            documents += [number] * size
        missing = length - len(tokens)
        return (
            tokens + [self.end] * missing,
            targets + [self.end] * missing,
            weights + [0] * missing,
            documents + [-1] * missing,
        )

    def _fitting(self, pool: list[Document], mixture: Mixture, length: int) -> Iterator[Document]:
        """Documents that fill one row, the first that fits each time; longer ones are cut."""
        room = length
        while room > 12:
            while len(pool) < 48:
                drawn = self._draw(mixture, length)
                pool.append(Document(drawn.tokens[: length + 1], drawn.learn[: length + 1]))
            fitting = next((i for i, one in enumerate(pool) if len(one.tokens) - 1 <= room), None)
            if fitting is None:
                return
            document = pool.pop(fitting)
            room -= len(document.tokens) - 1
            yield document
