"""Whatever the model would like to write: an answer that can be completed within its tokens is complete and valid."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLParserLimits
from tokenizers import AddedToken

from sagellm_core.structured import compiler, steering
from sagellm_core.structured.compiler import CompiledGrammar, CompileLimits
from sagellm_core.structured.vocabulary import Vocabulary
from sagellm_core.tokenizer import FastBackend, Tokenizer
from sagellm_protocol import InvalidArgumentError, StructuredOutput
from small_tokenizers import byte_level_backend

Build = Callable[..., CompiledGrammar]
Write = Callable[..., tuple[list[int], bool]]
TextOf = Callable[[list[int]], str]

NAMES = st.sampled_from(["a", "b", "name", "value", "long_property_name", "inner0", "inner1", "l", "r"])
PATTERNS = ["^[0-9]{3}-[a-z]{4}$", "^(ab|cde)*f$", "^[A-Z][a-z]+ is [0-9]{2}$", "^x+y{2,5}$"]
NODE = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "l": {"$ref": "#/$defs/node"}, "r": {"$ref": "#/$defs/tail"}},
    "required": ["v", "r"],
    "additionalProperties": False,
}
DEFINITIONS = {"node": NODE, "tail": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}


@st.composite
def bounded(draw: st.DrawFn, kind: str, low: str, high: str, smallest: int, span: int) -> dict[str, Any]:
    """A schema with a lower bound, an upper bound, both or none."""
    schema: dict[str, Any] = {"type": kind}
    least = draw(st.integers(smallest, smallest + span))
    if draw(st.booleans()):
        schema[low] = least
    if draw(st.booleans()):
        schema[high] = least + draw(st.integers(0, span))
    return schema


leaves: st.SearchStrategy[Any] = st.one_of(
    bounded("string", "minLength", "maxLength", 0, 12),
    st.sampled_from(PATTERNS).map(lambda pattern: {"type": "string", "pattern": pattern}),
    bounded("integer", "minimum", "maximum", -500, 1000),
    bounded("number", "minimum", "maximum", -5, 500),
    st.sampled_from(["boolean", "null"]).map(lambda kind: {"type": kind}),
    st.lists(st.sampled_from(["red", "a long value", "é", 1, 22, None, True]), min_size=1, max_size=4, unique=True).map(
        lambda values: {"enum": values}
    ),
    st.just({"$ref": "#/$defs/node"}),
)


@st.composite
def arrays(draw: st.DrawFn, items: st.SearchStrategy[Any]) -> dict[str, Any]:
    least = draw(st.integers(0, 4))
    schema = {"type": "array", "items": draw(items), "minItems": least}
    return {**schema, "maxItems": least + draw(st.integers(0, 3))} if draw(st.booleans()) else schema


@st.composite
def objects(draw: st.DrawFn, values: st.SearchStrategy[Any]) -> dict[str, Any]:
    properties = draw(st.dictionaries(NAMES, values, max_size=5))
    required = [name for name in properties if draw(st.booleans())]
    extra = draw(st.booleans())
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": extra}


schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        arrays(inner),
        objects(inner),
        objects(inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda s: {"anyOf": s}),
    ),
    max_leaves=12,
).map(lambda schema: {**schema, "$defs": DEFINITIONS})


def wishes(vocabulary: Vocabulary, kind: str, seed: int) -> Callable[[list[int]], np.ndarray]:
    """Logits of a model that never ends by itself and always would rather go on."""
    rng = np.random.default_rng(seed)
    size = vocabulary.tokens.vocab_size
    lengths = np.array([len(vocabulary.symbols_of(i)) for i in range(size)], dtype=np.float64)
    opens = np.array([sum(map(vocabulary.symbols_of(i).count, '{[,"')) for i in range(size)], dtype=np.float64)
    fixed = {"long": lengths, "short": -lengths, "opens": 3 * opens, "random": 0 * lengths}[kind]

    def logits(token_ids: list[int]) -> np.ndarray:
        noisy = fixed + rng.normal(size=size)
        noisy[list(vocabulary.eos_token_ids)] = -1e3
        return noisy

    return logits


json_cases = given(
    schema=schemas,
    extra=st.sampled_from([0, 0, 1, 2, 3, 5, 10, 30, 100]),
    kind=st.sampled_from(["long", "short", "opens", "random"]),
    seed=st.integers(0, 2**32 - 1),
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@json_cases
def test_json_is_complete_and_valid_within_its_tokens(
    build: Build, write: Write, text_of: TextOf, vocabulary: Vocabulary, **case: Any
) -> None:
    check_json(build, write, text_of, vocabulary, **case)


@pytest.mark.slow
@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@json_cases
def test_more_json_is_complete_and_valid_within_its_tokens(
    build: Build, write: Write, text_of: TextOf, vocabulary: Vocabulary, **case: Any
) -> None:
    check_json(build, write, text_of, vocabulary, **case)


def check_json(
    build: Build,
    write: Write,
    text_of: TextOf,
    vocabulary: Vocabulary,
    *,
    schema: dict[str, Any],
    extra: int,
    kind: str,
    seed: int,
) -> None:
    grammar = build(json_schema=schema)
    shortest = grammar.completion
    assert shortest is not None, "none of these schemas is beyond the search"
    jsonschema.validate(json.loads(shortest.symbols.encode("latin-1")), schema)
    max_tokens = shortest.num_tokens + extra
    token_ids, is_complete = write(grammar, max_tokens, wishes(vocabulary, kind, seed))
    assert is_complete
    assert len(token_ids) <= max_tokens
    jsonschema.validate(json.loads(text_of(token_ids)), schema)


REGEXES = [
    "[A-Z][a-z]+ is [0-9]{2}",
    "a(b|cde)*f",
    "(?s:.*)END",
    "[0-9]{4}-[0-9]{2}-[0-9]{2}( [0-9]{2}:[0-9]{2})?",
    "(yes|no)(, (really|indeed))*[.!]",
    "([a-f0-9]{2}:){5}[a-f0-9]{2}",
    "(one|two|three)+ (apples|pears)",
]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    regex=st.sampled_from(REGEXES),
    extra=st.integers(0, 30),
    kind=st.sampled_from(["long", "short", "random"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_regular_expressions_match_whole(
    build: Build,
    write: Write,
    text_of: TextOf,
    vocabulary: Vocabulary,
    regex: str,
    extra: int,
    kind: str,
    seed: int,
) -> None:
    grammar = build(regex=regex)
    assert grammar.completion is not None
    max_tokens = grammar.completion.num_tokens + extra
    token_ids, is_complete = write(grammar, max_tokens, wishes(vocabulary, kind, seed))
    assert is_complete
    assert re.fullmatch(regex, text_of(token_ids))


@pytest.mark.parametrize("kind", ["long", "short", "opens", "random"])
@pytest.mark.parametrize("extra", [0, 1, 7, 40])
def test_replaying_gives_the_same_state(
    build: Build, vocabulary: Vocabulary, write: Write, extra: int, kind: str
) -> None:
    """Resubmitted after any token, as prompt + emitted tokens, the same wishes give the same rest."""
    schema = {"type": "array", "items": {"$ref": "#/$defs/node"}, "minItems": 1, "$defs": DEFINITIONS}
    grammar = build(json_schema=schema)
    assert grammar.completion is not None
    max_tokens = grammar.completion.num_tokens + extra
    token_ids, _ = write(grammar, max_tokens, wishes(vocabulary, kind, 0))
    straight = grammar.start(max_tokens)
    for count, token_id in enumerate(token_ids, start=1):
        assert straight.accept(token_id, max_tokens - count) == token_id
        resumed = grammar.start(max_tokens - count, token_ids[:count])
        assert resumed.completion == straight.completion
        assert resumed.is_accepting == straight.is_accepting
        if not straight.is_terminated:
            np.testing.assert_array_equal(resumed.allowed, straight.allowed)


def test_emitted_tokens_must_have_the_form(build: Build, tokenizer: Any) -> None:
    grammar = build(choice=["yes", "no"])
    yes, no = tokenizer.encode("yes"), tokenizer.encode("no")
    assert grammar.start(4, yes).is_accepting
    for wrong in (tokenizer.encode("maybe"), [*yes, *no]):
        with pytest.raises(InvalidArgumentError, match="does not allow the emitted token"):
            grammar.start(4, wrong)


def test_a_token_that_is_not_allowed_is_replaced(build: Build, tokenizer: Any) -> None:
    """Logits that are no numbers, or a bias that leaves nothing, must not lead out of the form."""
    matcher = build(choice=["yes"]).start(8)
    assert [matcher.accept(tokenizer.encode("no")[0], 7)] == tokenizer.encode("yes")[:1]


def test_without_room_nothing_is_steered(build: Build, write: Write, vocabulary: Vocabulary) -> None:
    grammar = build(json_schema={"type": "string", "minLength": 200})
    assert grammar.completion is not None
    matcher = grammar.start(5)
    assert matcher.completion is None
    token_ids, is_complete = write(grammar, 5, wishes(vocabulary, "long", 0))
    assert len(token_ids) == 5
    assert not is_complete


def test_far_from_the_end_the_model_writes_as_it_likes(build: Build, vocabulary: Vocabulary) -> None:
    grammar = build(json_schema={"type": "array", "items": {"type": "string", "minLength": 3}})
    matcher = grammar.start(1000)
    wish = wishes(vocabulary, "opens", 1)
    for left in range(999, 600, -1):
        bits = np.unpackbits(matcher.allowed.view(np.uint8), bitorder="little")[: vocabulary.tokens.vocab_size]
        sampled = int(np.where(bits, wish([]), -np.inf).argmax())
        assert matcher.accept(sampled, left) == sampled


def test_where_only_the_end_fits_the_end_is_taken(build: Build, vocabulary: Vocabulary, tokenizer: Any) -> None:
    matcher = build(regex="(abcdefgh)*").start(2)
    assert matcher.is_accepting
    taken = matcher.accept(tokenizer.encode("a")[0], 0)
    assert taken in vocabulary.eos_token_ids
    assert matcher.is_terminated


def test_a_completion_is_lost_and_found_again(
    build: Build, vocabulary: Vocabulary, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search that finds nothing far from the end lets the model go on, and steering sets in again later."""
    grammar = build(json_schema={"type": "array", "items": {"$ref": "#/$defs/node"}, "$defs": DEFINITIONS})
    matcher = grammar.start(500)
    text = tokenizer.encode('[{"v":12,"l":{"v":7,"r":null},"r":{"v":1,"r":null}},{"v":3')
    monkeypatch.setattr(steering, "_MAX_STATES", 1)
    monkeypatch.setattr(steering, "_LAST_STATES", 1)
    for left, token_id in enumerate(text, start=400):
        assert matcher.accept(token_id, left) == token_id
    assert matcher.completion is None
    assert matcher.fallback_token_id in vocabulary.eos_token_ids or not matcher.is_accepting
    monkeypatch.undo()
    for left in range(40, 20, -1):
        assert matcher.accept(tokenizer.encode("5")[0], left) == tokenizer.encode("5")[0]
    assert matcher.completion is not None
    assert matcher.completion.symbols.endswith("}]")


def test_near_the_end_a_search_that_finds_nothing_changes_the_token(
    build: Build, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammar = build(json_schema={"type": "array", "items": {"$ref": "#/$defs/node"}, "$defs": DEFINITIONS})
    matcher = grammar.start(20)
    monkeypatch.setattr(steering, "_MAX_STATES", 1)
    assert matcher.accept(tokenizer.encode("[")[0], 19) == tokenizer.encode("[")[0]
    assert matcher.accept(tokenizer.encode("{")[0], 18) == tokenizer.encode("]")[0]
    assert matcher.is_terminated


def test_emitted_tokens_are_taken_even_if_no_completion_fits_behind_them(build: Build, tokenizer: Any) -> None:
    grammar = build(json_schema={"type": "array", "items": {"$ref": "#/$defs/node"}, "$defs": DEFINITIONS})
    matcher = grammar.start(2, tokenizer.encode('[{"v":12,"l":{'))
    assert matcher.completion is None
    assert not matcher.is_accepting


def test_without_symbols_a_grammar_works_unsteered(build: Build, vocabulary: Vocabulary) -> None:
    matcher = build(grammar='start: <[300]> "ab"?').start(3)
    assert matcher.completion is None
    assert matcher.fallback_token_id == 300
    assert matcher.accept(7, 2) == 300  # 7 is not allowed
    assert matcher.is_accepting


def test_a_grammar_that_grows_beyond_its_limits_ends(
    vocabulary: Vocabulary, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "parser_limits", lambda: LLParserLimits(max_lexer_states=60, verbose_errors=False))
    grammar = CompiledGrammar(vocabulary, StructuredOutput(regex="([a-z]{1,40} ){1,40}[0-9]"), CompileLimits())
    with pytest.raises(InvalidArgumentError, match="cannot be compiled") as error:
        write(grammar, 200, wishes(vocabulary, "random", 0))
    assert error.value.context["field"] == "structured_output"


@pytest.mark.parametrize("max_tokens", [9, 10, 14, 30])
def test_added_tokens_that_a_grammar_names(max_tokens: int) -> None:
    """As Qwen's marks of tool calls: text for the tokenizer, single tokens for the grammar and the model."""
    backend = byte_level_backend()
    backend.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("</tool>", normalized=False)])
    tokenizer = Tokenizer(FastBackend(backend), special_tokens={"eos_token": "<|im_end|>"})
    opening, closing = tokenizer.encode("<tool></tool>")
    vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)
    wanted = StructuredOutput(
        grammar=f"""start: /(?s:.+)/? <[{opening}]> call <[{closing}]>
call: %json {{"type": "object", "properties": {{"x": {{"type": "integer"}}}}, "required": ["x"]}}
"""
    )
    grammar = CompiledGrammar(vocabulary, wanted, CompileLimits())
    assert grammar.completion is not None
    assert grammar.completion.num_tokens <= 9
    matcher, token_ids = grammar.start(max_tokens), list[int]()
    wish = wishes(vocabulary, "random", max_tokens)
    while not matcher.is_terminated:
        bits = np.unpackbits(matcher.allowed.view(np.uint8), bitorder="little")[: vocabulary.tokens.vocab_size]
        token_ids.append(
            matcher.accept(int(np.where(bits, wish([]), -np.inf).argmax()), max_tokens - len(token_ids) - 1)
        )
    assert len(token_ids) <= max_tokens
    begin = token_ids.index(opening)
    assert token_ids[-1] == closing
    assert isinstance(json.loads(tokenizer.decode(token_ids[begin + 1 : -1]))["x"], int)
