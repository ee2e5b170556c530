"""Requests in, complete engine requests out; every mistake is told with its field and remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_core import input_processor
from sagellm_core.chat_template import PLAIN_CHAT_STOP
from sagellm_core.engine_core.types import EngineCoreRequest
from sagellm_core.input_processor import InputProcessor, generation_defaults
from sagellm_core.sampling.rng import derive_seed
from sagellm_core.tokenizer import Tokenizer
from sagellm_protocol.errors import InvalidArgumentError
from sagellm_protocol.request import Request, RequestPriority
from sagellm_protocol.sampling import DecodingStrategy, SamplingParams

MakeConfig = Callable[..., Any]
RECOMMENDED = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.1}


@pytest.fixture
def process(byte_level: Tokenizer, model_config: MakeConfig) -> Callable[..., list[EngineCoreRequest]]:
    """Process a request; keywords are the request's fields, `setup` those of the processor and model."""

    def run(setup: dict[str, Any] | None = None, **fields: Any) -> list[EngineCoreRequest]:
        options: dict[str, Any] = {"max_model_len": 100, "default_max_tokens": 16, **(setup or {})}
        config = model_config(byte_level.vocab_size, **options.pop("config", {}))
        processor = InputProcessor(options.pop("tokenizer", byte_level), config, **options)
        return processor.process(Request(**fields), arrival_time=12.5)

    return run


def test_a_text_request(process: Callable[..., list[EngineCoreRequest]], byte_level: Tokenizer) -> None:
    (core,) = process(
        prompt="Hello",
        request_id="req-1",
        priority=RequestPriority.HIGH,
        cache_salt="tenant",
        lora="adapter",
        sampling_params=SamplingParams(seed=7, stop_token_ids=[5], max_tokens=3),
    )
    assert core.prompt_token_ids == byte_level.encode("Hello")
    assert (core.request_id, core.arrival_time, core.seed) == ("req-1", 12.5, 7)
    assert (core.priority, core.cache_salt, core.lora_id) == (-1, "tenant", "adapter")
    assert core.sampling.max_tokens == 3
    assert core.sampling.stop_token_ids == (5,)
    assert core.eos_token_ids == {2}


def test_token_ids_and_chats(process: Callable[..., list[EngineCoreRequest]], byte_level: Tokenizer) -> None:
    assert process(prompt=[3, 4, 5])[0].prompt_token_ids == [3, 4, 5]
    (core,) = process(messages=[{"role": "user", "content": "hi"}])
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert byte_level.decode(core.prompt_token_ids, False) == text
    (core,) = process(
        messages=[{"role": "user", "content": "hi"}], chat_template_kwargs={"add_generation_prompt": False}
    )
    assert byte_level.decode(core.prompt_token_ids, False) == "<|im_start|>user\nhi<|im_end|>\n"


def test_tools_and_tool_calls_reach_the_template(
    process: Callable[..., list[EngineCoreRequest]], byte_level: Tokenizer
) -> None:
    source = (
        "{{ tools[0].function.name }}|{% for m in messages %}{% for call in m.tool_calls %}"
        "{{ call.function.arguments is mapping }}{{ call.function.arguments }};{% endfor %}{% endfor %}"
    )
    tokenizer = Tokenizer(byte_level._backend, chat_templates={"default": source})
    calls = [
        {"id": str(index), "function": {"name": "f", "arguments": arguments}}
        for index, arguments in enumerate(('{"a": 1}', "not json", "[1]"))
    ]
    (core,) = process(
        {"tokenizer": tokenizer},
        messages=[{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": calls}],
        tools=[{"type": "function", "function": {"name": "f"}}],
    )
    assert tokenizer.decode(core.prompt_token_ids) == "f|True{'a': 1};Falsenot json;False[1];"


def test_a_model_without_template_gets_a_plain_dialogue(
    process: Callable[..., list[EngineCoreRequest]], byte_level: Tokenizer
) -> None:
    base = Tokenizer(byte_level._backend)
    (core,) = process(
        {"tokenizer": base}, messages=[{"role": "user", "content": "hi"}], sampling_params={"stop": "\n\n"}
    )
    assert base.decode(core.prompt_token_ids) == "User: hi\nAssistant:"
    assert core.sampling.stop == ("\n\n", *PLAIN_CHAT_STOP)
    assert process({"tokenizer": base}, prompt="hi")[0].sampling.stop == ()


def test_precedence_of_sampling_parameters(process: Callable[..., list[EngineCoreRequest]]) -> None:
    config = {"generation_config": RECOMMENDED}
    (core,) = process({"config": config}, prompt="x")
    assert core.sampling.strategy is DecodingStrategy.SAMPLING
    assert (core.sampling.temperature, core.sampling.top_p, core.sampling.top_k) == (0.6, 0.95, 20)

    setup = {"config": config, "defaults": SamplingParams(temperature=0.9, top_k=5)}
    (core,) = process(setup, prompt="x", sampling_params=SamplingParams(top_k=3))
    assert (core.sampling.temperature, core.sampling.top_p, core.sampling.top_k) == (0.9, 0.95, 3)

    for greedy in (SamplingParams(temperature=0.0), SamplingParams(strategy=DecodingStrategy.GREEDY)):
        (core,) = process(setup, prompt="x", sampling_params=greedy)
        assert core.sampling.strategy is DecodingStrategy.GREEDY
        assert core.sampling.repetition_penalty == 1.1

    (core,) = process(prompt="x")
    assert core.sampling.strategy is DecodingStrategy.GREEDY


def test_without_do_sample_only_penalties_of_the_model_count() -> None:
    defaults = generation_defaults({**RECOMMENDED, "do_sample": False})
    assert defaults.given() == {"repetition_penalty": 1.1}
    assert generation_defaults({"do_sample": True}).given() == {"temperature": 1.0}
    assert generation_defaults({"do_sample": True, "temperature": None, "top_k": 0, "max_new_tokens": 7}).given() == {
        "temperature": 1.0,
        "top_k": 0,
    }
    with pytest.raises(InvalidArgumentError, match=r"generation_config.json: .*top_p"):
        generation_defaults({"do_sample": True, "top_p": 7})


@given(num_prompt=st.integers(1, 120), wanted=st.none() | st.integers(1, 200), floor=st.integers(0, 5))
def test_max_tokens_is_what_fits(num_prompt: int, wanted: int | None, floor: int) -> None:
    from sagellm_core.tokenizer import FastBackend
    from small_tokenizers import empty_backend

    spec = type("Spec", (), {"vocab_size": 10, "hidden_size": 64})
    pooling = type("Pooling", (), {"pooling": "last"})
    fields_of_config = {"spec": spec, "pooling": pooling, "max_model_len": 200, "eos_token_ids": (2, 99)}
    config: Any = type("Config", (), {**fields_of_config, "generation_config": {}, "is_embedding": False})
    processor = InputProcessor(
        Tokenizer(FastBackend(empty_backend())), config, default_max_tokens=16, max_model_len=100
    )
    fields: dict[str, Any] = {} if wanted is None else {"max_tokens": wanted}
    if wanted is not None:
        fields["min_tokens"] = min(floor, wanted)
    request = Request(prompt=[1] * num_prompt, sampling_params=SamplingParams(**fields))
    if num_prompt >= 100:
        with pytest.raises(InvalidArgumentError, match=f"maximum context length is 100 tokens .* has {num_prompt};"):
            processor.process(request)
        return
    (core,) = processor.process(request)
    assert core.sampling.max_tokens == min(16 if wanted is None else wanted, 100 - num_prompt)
    assert core.sampling.min_tokens == min(fields.get("min_tokens", 0), core.sampling.max_tokens)
    assert core.eos_token_ids == {2}, "ids beyond the vocabulary are dropped"


def test_max_tokens_by_precedence(process: Callable[..., list[EngineCoreRequest]]) -> None:
    setup = {"defaults": SamplingParams(max_tokens=9)}
    assert process(setup, prompt="x")[0].sampling.max_tokens == 9
    assert process(setup, prompt="x", max_tokens=4)[0].sampling.max_tokens == 4
    assert process(setup, prompt="x", sampling_params=SamplingParams(max_tokens=5))[0].sampling.max_tokens == 5
    assert process(prompt="x")[0].sampling.max_tokens == 16


def test_kv_budget_limits_prompt_and_output(process: Callable[..., list[EngineCoreRequest]]) -> None:
    assert process(prompt=[3] * 10, kv_budget_tokens=13)[0].sampling.max_tokens == 3
    with pytest.raises(
        InvalidArgumentError, match=r"kv_budget_tokens is 10 .* at most 9 tokens or raise kv_budget_tokens"
    ):
        process(prompt=[3] * 10, kv_budget_tokens=10)


@pytest.mark.parametrize(
    ("fields", "field", "match"),
    [
        ({"prompt": ""}, "prompt", "prompt is empty"),
        ({"prompt": [3, 100_000]}, "prompt", r"token id 100000, the model's vocabulary ends at \d+"),
        (
            {"prompt": [3] * 100},
            "prompt",
            r"prompt is too long: this model's maximum context length is 100 tokens .* at most 99 .* raise max_model",
        ),
        ({"prompt": "x", "sampling_params": {"stop_token_ids": [100_000]}}, "stop_token_ids", "token id 100000"),
        ({"prompt": "x", "sampling_params": {"logit_bias": {100_000: 1.0}}}, "logit_bias", "token id 100000"),
        ({"prompt": "a\ud800"}, None, "surrogate"),
        (
            {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"tools": []}},
            "chat_template_kwargs",
            "may not hold tools",
        ),
    ],
)
def test_mistakes(process: Callable[..., list[EngineCoreRequest]], fields: Any, field: str | None, match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match) as error:
        process(**fields)
    if field is not None:
        assert error.value.context["field"] == field


@pytest.mark.parametrize("variables", [{"self": 1}, {"tools": []}, {"chat_template": ["default"]}])
def test_a_client_cannot_reach_behind_the_template(
    process: Callable[..., list[EngineCoreRequest]], variables: Any
) -> None:
    with pytest.raises(InvalidArgumentError, match="chat_template") as caught:
        process(messages=[{"role": "user", "content": "hi"}], chat_template_kwargs=variables)
    assert caught.value.context["field"] == "chat_template_kwargs"


@pytest.mark.parametrize("arguments", ["[" * 100_000, "9" * 5_000, "{", '{"a": ' * 500])
def test_a_calls_arguments_that_are_no_json_are_shown_as_they_are(
    process: Callable[..., list[EngineCoreRequest]], byte_level: Tokenizer, arguments: str
) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [call]}]
    if len(arguments) > 32_768:
        with pytest.raises(InvalidArgumentError, match="more than 32768 objects and lists"):
            process(messages=messages)
    else:
        source = "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments }}{% endfor %}{% endfor %}"
        tokenizer = Tokenizer(byte_level._backend, chat_templates={"default": source})
        (core,) = process({"tokenizer": tokenizer, "max_model_len": 20_000}, messages=messages)
        assert tokenizer.decode(core.prompt_token_ids) == arguments


class CountingTokenizer:
    """Tells how many characters were split."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.num_chars = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.num_chars += len(text)
        return self._tokenizer.encode(text, add_special_tokens)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@pytest.mark.parametrize("field", ["prompt", "messages"])
def test_a_text_that_cannot_fit_is_refused_by_its_beginning(
    process: Callable[..., list[EngineCoreRequest]], byte_level: Tokenizer, field: str
) -> None:
    counting, text = CountingTokenizer(byte_level), "word " * 100_000
    fields = {"prompt": text} if field == "prompt" else {"messages": [{"role": "user", "content": text}]}
    with pytest.raises(InvalidArgumentError, match=r"characters the first 1600 are \d+ already") as caught:
        process({"tokenizer": counting}, **fields)
    assert caught.value.context["field"] == field
    assert counting.num_chars <= 1600


def test_a_text_of_long_tokens_is_split_to_its_end(
    byte_level: Tokenizer, model_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_processor, "_CHARS_PER_TOKEN", 0)
    processor = InputProcessor(byte_level, model_config(byte_level.vocab_size), max_model_len=100)
    core = processor.process(Request(prompt="hello world, " * 5))[0]
    assert core.prompt_token_ids == byte_level.encode("hello world, " * 5)


def test_the_remedy_does_not_offer_what_the_model_cannot_do(process: Callable[..., list[EngineCoreRequest]]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"at most 99 tokens$"):
        process({"config": {"max_model_len": 100}}, prompt=[3] * 100)


def test_a_tokenizer_of_another_model_is_noticed(byte_level: Tokenizer, model_config: MakeConfig) -> None:
    processor = InputProcessor(byte_level, model_config(10), max_model_len=100)
    with pytest.raises(InvalidArgumentError, match="vocabulary ends at 9"):
        processor.process(Request(prompt="Hello"))


def test_seeds_are_concrete(process: Callable[..., list[EngineCoreRequest]]) -> None:
    seeds = {process(prompt="x")[0].seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert process(prompt="x", sampling_params={"seed": 0})[0].seed == 0


def test_n_outputs_are_n_requests(process: Callable[..., list[EngineCoreRequest]]) -> None:
    children = process(prompt="x", request_id="r", sampling_params={"n": 3, "seed": 11, "temperature": 1.0})
    assert [child.request_id for child in children] == ["r/0", "r/1", "r/2"]
    assert [child.seed for child in children] == [derive_seed(11, index) for index in range(3)]
    assert [child.choice_index for child in children] == [0, 1, 2]
    assert {child.sampling.n for child in children} == {1}


def test_end_tokens_of_model_and_tokenizer_join(byte_level: Tokenizer, model_config: MakeConfig) -> None:
    config = model_config(byte_level.vocab_size, eos_token_ids=(0,))
    (core,) = InputProcessor(byte_level, config, max_model_len=100).process(Request(prompt="x"))
    assert core.eos_token_ids == {0, byte_level.token_to_id("<|im_end|>")}
