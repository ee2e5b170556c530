"""SamplingParams: bounds, derived strategy, precedence, presets."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sagellm_protocol import DecodingStrategy, ErrorCode, InvalidArgumentError, SamplingParams, SamplingPreset, parse

BEAM, CONTRASTIVE = DecodingStrategy.BEAM_SEARCH, DecodingStrategy.CONTRASTIVE
GREEDY, SAMPLING = DecodingStrategy.GREEDY, DecodingStrategy.SAMPLING

OUT_OF_BOUNDS: list[tuple[str, Any]] = [
    ("temperature", -0.1),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("temperature", "hot"),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_k", -2),
    ("top_k", 2**31),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("repetition_penalty", 0),
    ("presence_penalty", 2.1),
    ("presence_penalty", -2.1),
    ("frequency_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("length_penalty", 11),
    ("num_beams", 0),
    ("num_beams", 65),
    ("early_stopping", "soon"),
    ("penalty_alpha", -0.1),
    ("penalty_alpha", 1.1),
    ("max_tokens", 0),
    ("max_tokens", 1.5),
    ("max_tokens", 2**31),
    ("min_tokens", -1),
    ("min_tokens", 129),  # more than the default of max_tokens
    ("stop", [""]),
    ("stop", ["x"] * 17),
    ("stop", 3),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [0] * 1025),
    ("seed", -1),
    ("seed", 2**63),
    ("n", 0),
    ("n", 65),
    ("logprobs", -1),
    ("logprobs", 21),
    ("prompt_logprobs", 21),
    ("logit_bias", {5: 101}),
    ("logit_bias", {-5: 1}),
    ("logit_bias", {"x": 1}),
    ("logit_bias", dict.fromkeys(range(1025), 1)),
    ("strategy", "guess"),
]


@pytest.mark.parametrize(("field", "value"), OUT_OF_BOUNDS)
def test_a_violated_bound_names_the_field_in_one_line(field: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        SamplingParams(**{field: value})
    error = raised.value
    assert str(error).startswith(field)
    assert str(error.context["field"]).startswith(field)
    assert "\n" not in str(error)
    assert error.code is ErrorCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "build",
    [
        lambda: SamplingParams(temperature=-1),
        lambda: SamplingParams.model_validate({"temperature": -1}),
        lambda: SamplingParams.model_validate_json('{"temperature": -1}'),
        lambda: parse(SamplingParams, {"temperature": -1}, what="sampling parameters"),
        lambda: parse(SamplingParams, b'{"temperature": -1}', what="sampling parameters"),
    ],
)
def test_every_way_in_raises_the_protocols_error(build: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"temperature must be >= 0, got -1; use 0 for greedy") as raised:
        build()
    assert isinstance(raised.value, ValueError)
    assert not isinstance(raised.value, ValidationError)
    assert isinstance(raised.value.__cause__, ValidationError)


def test_bounds_are_inclusive_where_they_say_so() -> None:
    SamplingParams(temperature=0, top_p=1, min_p=1, presence_penalty=-2, frequency_penalty=2, penalty_alpha=1)
    SamplingParams(max_tokens=1, min_tokens=1, seed=2**63 - 1, n=64, logprobs=0, prompt_logprobs=20, num_beams=64)
    SamplingParams(stop=["x"] * 16, logit_bias={0: -100, 1: 100}, top_k=-1)


def test_a_typing_error_gets_a_suggestion_and_all_errors_are_told() -> None:
    with pytest.raises(InvalidArgumentError, match=r"'maxtokens' is not a field.*did you mean 'max_tokens'\?"):
        SamplingParams(maxtokens=3)
    with pytest.raises(InvalidArgumentError, match=r"top_p .*; top_k .*; min_p .*; and 1 more$"):
        SamplingParams(top_p=0, top_k=-2, min_p=2, n=0)


@pytest.mark.parametrize(
    ("given_fields", "derived"),
    [
        ({}, {"strategy": GREEDY, "temperature": 0.0}),
        ({"temperature": 0.7}, {"strategy": SAMPLING}),
        ({"temperature": 0}, {"strategy": GREEDY}),
        ({"num_beams": 3}, {"strategy": BEAM, "num_beams": 3}),
        ({"strategy": "sampling"}, {"temperature": 1.0}),
        ({"strategy": "sampling", "temperature": 0}, {"temperature": 0.0}),
        ({"strategy": "beam_search"}, {"num_beams": 4}),
        ({"strategy": "beam_search", "n": 6}, {"num_beams": 6}),
        ({"strategy": "contrastive"}, {"top_k": 4}),
        ({"strategy": "greedy", "temperature": 0.7}, {"strategy": GREEDY}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"stop": "end"}, {"stop": ("end",)}),
        ({"stop": ["a", "b"], "stop_token_ids": [7]}, {"stop": ("a", "b"), "stop_token_ids": (7,)}),
        ({"stop": None, "stop_token_ids": None}, {"stop": (), "stop_token_ids": ()}),
        ({"logit_bias": {"5": 1}}, {"logit_bias": {5: 1.0}}),
    ],
)
def test_what_was_not_given_is_derived(given_fields: dict[str, Any], derived: dict[str, Any]) -> None:
    params = SamplingParams(**given_fields)
    assert {name: getattr(params, name) for name in derived} == derived
    assert params.model_fields_set == set(given_fields), "a derived value must not count as given"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_beams": 4, "temperature": 0.5}, "temperature"),
        ({"strategy": "contrastive", "temperature": 0.5}, "temperature"),
        ({"strategy": "sampling", "num_beams": 2}, "num_beams"),
        ({"strategy": "greedy", "num_beams": 2}, "num_beams"),
        ({"num_beams": 2, "n": 3}, "n"),
        ({"strategy": "contrastive", "n": 2}, "n"),
        ({"strategy": "contrastive", "top_k": 0}, "top_k"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"^{named} must be") as raised:
        SamplingParams(**fields)
    assert raised.value.context["field"] == named


@pytest.mark.parametrize(
    ("own", "defaults", "expected"),
    [
        ({}, {"temperature": 0.6, "top_p": 0.9}, {"strategy": SAMPLING, "temperature": 0.6, "top_p": 0.9}),
        ({"temperature": 0.2}, {"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.2, "top_p": 0.9}),
        ({"temperature": 0}, {"strategy": "sampling", "temperature": 0.6}, {"strategy": GREEDY, "temperature": 0}),
        ({"temperature": 0}, {"num_beams": 4}, {"strategy": BEAM, "num_beams": 4}),
        ({"temperature": 0.8}, {"num_beams": 4}, {"strategy": SAMPLING, "num_beams": 1}),
        ({"num_beams": 2}, {"temperature": 0.6, "n": 4}, {"strategy": BEAM, "temperature": 0, "n": 1}),
        ({"num_beams": 2}, {"num_beams": 8, "n": 4}, {"strategy": BEAM, "num_beams": 2, "n": 2}),
        ({"strategy": "contrastive"}, {"temperature": 0.6, "top_k": 50}, {"top_k": 4, "temperature": 0}),
        ({"strategy": "sampling"}, {"temperature": 0}, {"strategy": SAMPLING, "temperature": 1}),
        ({"temperature": 0.7}, {"top_p": 0.9, "top_k": 5}, {"strategy": SAMPLING, "top_p": 0.9, "top_k": 5}),
        ({"strategy": "greedy"}, {"temperature": 0.6}, {"strategy": GREEDY, "temperature": 0}),
        ({"max_tokens": 3}, {"min_tokens": 9, "max_tokens": 20}, {"max_tokens": 3, "min_tokens": 3}),
        ({"min_tokens": 9}, {"max_tokens": 20}, {"max_tokens": 20, "min_tokens": 9}),
        ({"stop": []}, {"stop": "x"}, {"stop": ()}),
    ],
)
def test_precedence(own: dict[str, Any], defaults: dict[str, Any], expected: dict[str, Any]) -> None:
    merged = SamplingParams(**own).merged_over(SamplingParams(**defaults))
    assert {name: getattr(merged, name) for name in expected} == expected


def test_precedence_chains() -> None:
    request, engine = SamplingParams(max_tokens=5), SamplingParams(temperature=0.5, max_tokens=50)
    model = SamplingParams(temperature=0.9, top_k=20, strategy=SAMPLING)
    merged = request.merged_over(engine).merged_over(model)
    assert merged == SamplingParams(max_tokens=5, temperature=0.5, top_k=20)
    assert merged.model_fields_set == {"max_tokens", "temperature", "top_k", "strategy"}


def test_merging_over_nothing_changes_nothing() -> None:
    params = SamplingParams(temperature=0.5, stop=["x"])
    assert params.merged_over(SamplingParams()) == params
    assert params.merged_over(SamplingParams()).model_fields_set == params.model_fields_set


def test_presets() -> None:
    strategies = {preset: SamplingParams.from_preset(preset).strategy for preset in SamplingPreset}
    assert strategies.pop(SamplingPreset.DETERMINISTIC) is GREEDY
    assert set(strategies.values()) == {SAMPLING}
    creative = SamplingParams.from_preset("creative", max_tokens=7, temperature=0)
    assert (creative.strategy, creative.max_tokens) == (GREEDY, 7)
    assert SamplingParams.from_preset(SamplingPreset.BALANCED, num_beams=3).strategy is BEAM
    with pytest.raises(InvalidArgumentError, match="unknown preset 'wild'; use one of deterministic"):
        SamplingParams.from_preset("wild")
    with pytest.raises(InvalidArgumentError, match="top_p"):
        SamplingParams.from_preset("creative", top_p=7)


def test_replace_validates_and_keeps_what_was_given() -> None:
    params = SamplingParams(temperature=0.5).replace(max_tokens=3)
    assert params.model_fields_set == {"temperature", "max_tokens"}
    with pytest.raises(InvalidArgumentError, match="top_p"):
        params.replace(top_p=2)


def test_values_are_frozen_and_pickle() -> None:
    params = SamplingParams(temperature=0.5)
    with pytest.raises(ValidationError, match="frozen"):
        params.temperature = 1.0  # type: ignore[misc]
    copy = pickle.loads(pickle.dumps(params))
    assert copy == params
    assert copy.model_fields_set == params.model_fields_set


def small_floats(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


sampling_fields = st.fixed_dictionaries(
    {},
    optional={
        "temperature": small_floats(0, 5),
        "top_p": small_floats(0.01, 1),
        "top_k": st.integers(-1, 1000),
        "min_p": small_floats(0, 1),
        "repetition_penalty": small_floats(0.1, 3),
        "presence_penalty": small_floats(-2, 2),
        "frequency_penalty": small_floats(-2, 2),
        "length_penalty": small_floats(-10, 10),
        "early_stopping": st.sampled_from([True, False, "never"]),
        "penalty_alpha": small_floats(0, 1),
        "max_tokens": st.integers(100, 2**31 - 1),
        "min_tokens": st.integers(0, 100),
        "stop": st.one_of(st.none(), st.text(min_size=1), st.lists(st.text(min_size=1), max_size=16)),
        "stop_token_ids": st.lists(st.integers(0, 2**31 - 1), max_size=5),
        "include_stop_str_in_output": st.booleans(),
        "ignore_eos": st.booleans(),
        "seed": st.one_of(st.none(), st.integers(0, 2**63 - 1)),
        "n": st.integers(1, 64),
        "logprobs": st.one_of(st.none(), st.integers(0, 20)),
        "logit_bias": st.one_of(
            st.none(), st.dictionaries(st.integers(0, 2**31 - 1), small_floats(-100, 100), max_size=5)
        ),
        "skip_special_tokens": st.booleans(),
    },
)


@given(sampling_fields)
def test_round_trip_through_json(fields: dict[str, Any]) -> None:
    params = SamplingParams(**fields)
    full = params.model_dump_json()
    assert SamplingParams.model_validate_json(full) == params
    assert json.loads(SamplingParams.model_validate_json(full).model_dump_json()) == json.loads(full)
    sparse = SamplingParams.model_validate_json(params.model_dump_json(exclude_unset=True))
    assert sparse == params
    assert sparse.model_fields_set == params.model_fields_set


@given(sampling_fields, sampling_fields)
def test_the_given_fields_always_win(own: dict[str, Any], defaults: dict[str, Any]) -> None:
    params = SamplingParams(**own)
    merged = params.merged_over(SamplingParams(**defaults))
    assert params.given().items() <= merged.given().items()
    assert merged.model_fields_set <= set(own) | set(defaults)
