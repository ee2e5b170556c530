"""Stories for the built-in model: reading, restoring capitals, and turning them into requests and answers."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

__all__ = ["StorySource", "load_stories", "story_request", "validation_stories"]

StorySource = tuple[str, str]
"""(question, answer) of a story in chat form."""

OPENING = re.compile(r"(once|one day|one |there (was|were|lived)|a long time|in a )", re.IGNORECASE)
SENTENCE_END = re.compile(r'(?<=[.!?])["”]?\s+')
WORD = re.compile(r"[A-Za-z]+")
TOPIC_WORDS = (
    "dog cat bird fish bear rabbit bunny frog lion tiger horse cow pig duck mouse elephant monkey fox owl bee "
    "butterfly ant spider turtle sheep goat chicken whale dolphin dragon fairy princess prince king queen wizard "
    "witch monster robot doctor farmer baker teacher girl boy baby friend family mom dad grandma car truck train "
    "boat ship airplane bike bus ball doll toy kite balloon cake cookie apple banana orange pizza soup tree flower "
    "garden forest park beach river lake ocean sea mountain hill farm zoo school house castle store rain snow sun "
    "moon star rainbow cloud hat coat shoe box key door window book pencil crayon picture song game puzzle swing "
    "slide pond puppy kitten squirrel crab seed rock stick bed blanket lamp bell drum guitar treasure map"
)
TOPICS = frozenset(TOPIC_WORDS.split(" "))
ASK_PLAIN = (
    "Tell me a story.", "Tell me a short story.", "Write a story.", "Can you tell me a story?", "A story please.",
    "Please tell me a story.", "I want to hear a story.", "Write a short story for children.", "Make up a story.",
    "Tell me a bedtime story.", "tell me a nice story", "Story", "Once upon a time", "Please write a simple story.",
)  # fmt: skip
ASK_TOPIC = (
    "Tell me a story about {}.", "Write a story about {}.", "Can you tell me a story about {}?",
    "Tell me a short story about {}.", "Write a short story about {}.", "I want a story about {}.",
    "A story about {} please", "Please tell me a story about {}.", "tell a story about {}", "Make up a story about {}.",
    "Do you know a story about {}?", "Write a little story about {} for my child.", "story about {}",
)  # fmt: skip
ASK_CONTINUE = (
    "Continue: {}", "Continue this story: {}", "Continue the story: {}", "Please continue: {}", "{}",
    "Finish this story: {}", "What happens next? {}", "Write the rest of this story: {}", "Go on: {}",
)  # fmt: skip


def _key(text: str) -> str:
    """What makes two copies of a story the same, whatever their spacing and case."""
    return re.sub(r"\W+", "", text.lower())[:120]


def _normalise(text: str) -> str:
    """One blank line between paragraphs and plain quotes."""
    text = text.translate(str.maketrans("“”‘’", "\"\"''"))
    return "\n\n".join(part.strip() for part in text.split("\n") if part.strip())


def _split_plain(text: str) -> list[str]:
    """Stories of a file in which a single newline separates them (and sometimes their paragraphs too)."""
    stories: list[str] = []
    for piece in re.split(r"(?<!\n)\n(?!\n)", text):
        if not piece.strip():
            continue
        if stories and len(stories[-1]) < 500 and not OPENING.match(piece):
            stories[-1] += "\n" + piece
        else:
            stories.append(piece)
    return stories


def _proper_names(stories: list[str]) -> dict[str, str]:
    """Words that are mostly written with a capital inside sentences, by their lower-case form."""
    upper: Counter[str] = Counter()
    lower: Counter[str] = Counter()
    for story in stories:
        for word in re.findall(r"(?<=[a-z,] )[A-Za-z]{2,}", story):
            (upper if word[0].isupper() else lower)[word.lower()] += 1
    return {word: word.capitalize() for word, count in upper.items() if count > lower[word]}


def restore_case(text: str, names: dict[str, str]) -> str:
    """Capitals for a lower-case story: starts of sentences and quotations, names, and the word I."""
    text = re.sub(r"(?<!')\b[a-z]+", lambda match: names.get(match[0], match[0]), text)
    text = re.sub(r"\bi\b", "I", text)
    text = re.sub(r'(^|[.!?]"?\s+|\n|(?:^|\s)")([a-z])', lambda match: match[1] + match[2].upper(), text)
    return re.sub(r'([!?]" )(He|She|They|It|The)\b', lambda match: match[1] + match[2].lower(), text)


def _usable(story: str) -> bool:
    """Whole stories in plain characters, neither very short nor very long."""
    return 200 <= len(story) <= 2400 and story[-1] in '.!?"' and story.isascii()


def load_stories(folder: Path) -> list[str]:
    """All distinct training stories of `folder` (the validation file is never opened here)."""
    marked = (folder / "tinystories_2MB_endoftext.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    cased = [_normalise(story) for story in marked]
    cased += [_normalise(story) for story in _split_plain((folder / "tiny_stories_944KB.txt").read_text("utf-8"))]
    names = _proper_names(cased)
    lower = _split_plain((folder / "tinystories_4MB_lowercase.txt").read_text(encoding="utf-8"))
    distinct: dict[str, str] = {}
    for story in cased + [restore_case(_normalise(story), names) for story in lower]:
        if story and _usable(story):
            distinct.setdefault(_key(story), story)
    return list(distinct.values())


def validation_stories(folder: Path, limit: int = 300) -> list[str]:
    """Stories of the file that is kept out of training."""
    text = (folder / "tinystories_val_794KB.txt").read_text(encoding="utf-8")
    parts = re.split(r"\n\s*\n(?=Once upon a time|One day,)", text)
    return [_normalise(part) for part in parts[1:] if 200 <= len(part) <= 2400][:limit]


def _topic(story: str, rng: random.Random) -> str | None:
    """Something the story is about: a thing it names often, or the name of a child."""
    words = Counter(word.lower() for word in WORD.findall(story))
    early = {word.lower() for word in WORD.findall(story[:180])}
    things = [word for word in TOPICS & early if words[word] >= 2]
    if not things:
        return None
    thing = rng.choice(sorted(things, key=lambda word: (-words[word], word))[:2])
    named = re.search(rf"\b{thing} named ([A-Z][a-z]+)", story)
    article = "an" if thing[0] in "aeiou" else "a"
    if named and rng.random() < 0.5:
        return f"{article} {thing} named {named[1]}"
    if thing in {"mom", "dad", "grandma", "rain", "snow"}:
        return thing
    return f"{article} {thing}"


def story_request(story: str, rng: random.Random) -> StorySource:
    """One way to ask for this story, and the answer to it."""
    choice = rng.random()
    if choice < 0.35:
        sentences = SENTENCE_END.split(story, maxsplit=3)
        cut = len("".join(sentences[: rng.randint(1, 2)])) + 1
        cut = story.find(" ", max(cut - 1, 1))
        head, tail = story[:cut].strip(), story[cut:].strip()
        if head.endswith((".", "!", "?", '"')) and len(tail) > 100:
            return rng.choice(ASK_CONTINUE).format(head), tail
    topic = _topic(story, rng)
    if topic is not None and choice < 0.88:
        return rng.choice(ASK_TOPIC).format(topic), story
    return rng.choice(ASK_PLAIN), story
