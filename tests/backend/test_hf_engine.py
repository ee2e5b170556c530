"""The transformers engine: on a tiny random model on the processor, and in mock mode."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from sagellm_backend.engine.hf_cuda import HFCudaEngine, HFCudaEngineConfig
from sagellm_backend.engine.hf_generate import TextStream, generation_options
from sagellm_protocol import (
    FinishReason,
    InvalidArgumentError,
    NotFoundError,
    Request,
    SamplingParams,
    StreamEventDelta,
    StreamEventEnd,
    StreamEventStart,
    UnavailableError,
    UnsupportedError,
)

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer GPT-NeoX with random weights and a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("neox")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={"<end>": 256, **{c: i for i, c in enumerate(alphabet)}}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template=TEMPLATE)
    fast.save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = GPTNeoXConfig(vocab_size=257, max_position_embeddings=256, eos_token_id=256, bos_token_id=None, **sizes)
    config.initializer_range = 0.25
    GPTNeoXForCausalLM(config).save_pretrained(path)
    return path


def make_config(**options: Any) -> HFCudaEngineConfig:
    values: dict[str, Any] = {
        "engine_id": "hf-1",
        "model_path": "m",
        "device": "cpu",
        "dtype": "fp32",
        "max_new_tokens": 16,
        "max_batch_size": 2,
    }
    return HFCudaEngineConfig(**{**values, **options})


async def events_of(engine: HFCudaEngine, request: Request) -> list[Any]:
    return [event async for event in engine.stream(request)]


@pytest.fixture
async def engine(model_path: Path) -> Any:
    engine = HFCudaEngine(make_config(model_path=str(model_path)))
    await engine.start()
    yield engine
    await engine.stop()


async def test_it_gives_what_generate_gives(engine: HFCudaEngine, model_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    ids = torch.tensor([tokenizer("Hello there")["input_ids"]])
    model = AutoModelForCausalLM.from_pretrained(model_path)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    expected_ids = expected[0, ids.shape[1] :].tolist()
    response = await engine.execute(Request(prompt="Hello there", max_tokens=12))
    assert response.output_tokens == expected_ids
    assert response.output_text == tokenizer.decode(expected_ids, skip_special_tokens=True)
    assert response.finish_reason is FinishReason.LENGTH
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (11, 12)
    again = await engine.execute(Request(prompt=ids[0].tolist(), max_tokens=12))
    assert again.output_tokens == expected_ids


async def test_a_stream_is_one_start_deltas_and_one_end(engine: HFCudaEngine) -> None:
    request = Request(prompt="Tell me", max_tokens=9)
    events = await events_of(engine, request)
    assert isinstance(events[0], StreamEventStart)
    assert isinstance(events[-1], StreamEventEnd)
    assert all(isinstance(event, StreamEventDelta) for event in events[1:-1])
    assert "".join(event.chunk for event in events[1:-1]) == events[-1].output_text
    assert [token for event in events[1:-1] for token in event.chunk_tokens] == events[-1].output_tokens
    assert {event.request_id for event in events} == {request.request_id}
    assert {event.engine_id for event in events} == {"hf-1"}
    metrics = events[-1].metrics
    assert metrics.ttft_ms > 0
    assert metrics.throughput_tps > 0
    assert metrics.peak_mem_mb > 0
    assert len(metrics.itl_list) == 8
    assert metrics.kv_used_tokens == 7 + 9


async def test_requests_at_the_same_time_do_not_mix(engine: HFCudaEngine) -> None:
    prompts = ["a", "bcd", "Hello there", "once upon a time", "xyz"]
    alone = [(await engine.execute(Request(prompt=prompt))).output_tokens for prompt in prompts]
    together = await asyncio.gather(*(engine.execute(Request(prompt=prompt)) for prompt in prompts))
    assert [response.output_tokens for response in together] == alone


async def test_ends_by_token_string_and_beams(engine: HFCudaEngine) -> None:
    free = await engine.execute(Request(prompt="Hello", max_tokens=12))
    token = free.output_tokens[5]
    first = free.output_tokens.index(token)
    stopped = await engine.execute(
        Request(prompt="Hello", max_tokens=12, sampling_params=SamplingParams(stop_token_ids=[token]))
    )
    assert stopped.output_tokens == free.output_tokens[: first + 1]
    assert stopped.finish_reason is FinishReason.STOP
    beams = await engine.execute(Request(prompt="Hello", max_tokens=6, sampling_params=SamplingParams(num_beams=3)))
    assert len(beams.output_tokens) == 6
    assert beams.output_text


async def test_a_seed_repeats_and_temperature_samples(engine: HFCudaEngine) -> None:
    def request(seed: int) -> Request:
        return Request(prompt="Hello", sampling_params=SamplingParams(temperature=1.5, seed=seed, top_k=50, min_p=0.01))

    a, b, c = [(await engine.execute(request(seed))).output_tokens for seed in (1, 1, 2)]
    assert a == b != c


async def test_messages_go_through_the_chat_template(engine: HFCudaEngine) -> None:
    chat = await engine.execute(Request(messages=[{"role": "user", "content": "hi"}]))  # type: ignore[list-item]
    plain = await engine.execute(Request(prompt="user: hi\n"))
    assert chat.output_tokens == plain.output_tokens


async def test_a_consumer_that_leaves_ends_the_generation() -> None:
    engine = HFCudaEngine(make_config(mock_mode=True, max_new_tokens=10**6, max_batch_size=1))
    await engine.start()
    stream = engine.stream(Request(prompt="abc"))
    async for event in stream:
        if isinstance(event, StreamEventDelta):
            break
    await stream.aclose()  # type: ignore[attr-defined]
    assert not engine._running
    assert (await engine.execute(Request(prompt="abc", max_tokens=3))).output_text == "abc"  # the place is free again


async def test_stopping_aborts_what_runs() -> None:
    engine = HFCudaEngine(make_config(mock_mode=True, max_new_tokens=10**9))
    await engine.start()
    task = asyncio.create_task(engine.execute(Request(prompt="abc")))
    while not engine._running:
        await asyncio.sleep(0)
    await engine.stop()
    assert (await task).finish_reason is FinishReason.ABORT
    assert not engine.is_running
    with pytest.raises(UnavailableError, match="call start"):
        await engine.execute(Request(prompt="abc"))


async def test_mock_mode_needs_no_device_and_respects_limits() -> None:
    engine = HFCudaEngine(make_config(mock_mode=True, device="cuda:0", max_new_tokens=5))
    await engine.start()
    await engine.start()  # a second time changes nothing
    response = await engine.execute(Request(prompt="ab", max_tokens=100))
    assert response.output_text == "ababa"
    stopped = await engine.execute(Request(prompt="abcd", sampling_params=SamplingParams(stop=["cd"])))
    assert (stopped.output_text, stopped.finish_reason, stopped.stop_reason) == ("ab", FinishReason.STOP, "cd")
    chat = await engine.execute(Request(messages=[{"role": "user", "content": "hi"}]))  # type: ignore[list-item]
    assert chat.output_text == "hihih"
    await engine.stop()


async def test_what_breaks_in_the_generation_ends_the_stream_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = HFCudaEngine(make_config(mock_mode=True))
    await engine.start()

    def broken(*args: Any) -> FinishReason:
        raise RuntimeError("CUDA error: device-side assert")

    monkeypatch.setattr(engine._generator, "generate", broken)
    events = await events_of(engine, Request(prompt="ab"))
    assert [event.event for event in events] == ["start", "end"]
    assert events[-1].finish_reason is FinishReason.ERROR
    assert events[-1].error.message == "RuntimeError: CUDA error: device-side assert"
    assert events[-1].metrics.error_rate == 1.0


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"n": 2, "temperature": 1.0}, "n"),
        ({"logprobs": 3}, "logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"strategy": "contrastive"}, "strategy"),
    ],
)
async def test_what_generate_cannot_do_is_refused_before_it_starts(params: dict[str, Any], field: str) -> None:
    engine = HFCudaEngine(make_config(mock_mode=True))
    await engine.start()
    with pytest.raises(UnsupportedError, match=f"does not support {field}"):
        await engine.execute(Request(prompt="a", sampling_params=SamplingParams(**params)))
    with pytest.raises(UnsupportedError, match="lora"):
        await engine.execute(Request(prompt="a", lora="x"))
    with pytest.raises(InvalidArgumentError, match="no tokens"):
        await engine.execute(Request(prompt=""))


def test_options_say_everything_and_leave_nothing_to_the_checkpoint() -> None:
    greedy = generation_options(SamplingParams(max_tokens=7), [2])
    assert greedy["max_new_tokens"] == 7
    assert not greedy["do_sample"]
    assert greedy["temperature"] is None
    assert greedy["eos_token_id"] == [2]
    sampled = generation_options(
        SamplingParams(temperature=0.5, top_p=0.9, top_k=0, min_tokens=3, ignore_eos=True, stop_token_ids=[9]), [2]
    )
    assert (sampled["temperature"], sampled["top_p"], sampled["top_k"]) == (0.5, 0.9, 0)
    assert (sampled["min_new_tokens"], sampled["eos_token_id"]) == (3, [9])
    beams = generation_options(SamplingParams(num_beams=4, length_penalty=0.8), [])
    assert (beams["num_beams"], beams["length_penalty"], beams["eos_token_id"]) == (4, 0.8, None)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_text_never_ends_in_half_a_character(size: int) -> None:
    data = list("naïve 日本語 🙂 end".encode())
    stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"), (), keep_stop=False)
    chunks = [stream.add(data[i : i + size]) for i in range(0, len(data), size)]
    assert not any("\ufffd" in chunk for chunk in chunks)
    assert "".join(chunks) + stream.flush() == "naïve 日本語 🙂 end"


@pytest.mark.parametrize(("keep", "expected"), [(False, "one tw"), (True, "one two")])
@pytest.mark.parametrize("size", [1, 2, 100])
def test_a_stop_string_is_found_across_chunks(size: int, keep: bool, expected: str) -> None:
    data = list(b"one two three")
    stream = TextStream(lambda ids: bytes(ids).decode(), ("zzzzzz", "o" if keep else "o t"), keep_stop=keep)
    if keep:
        data = data[4:]
        expected = "two"
    text = "".join(stream.add(data[i : i + size]) for i in range(0, len(data), size)) + stream.flush()
    assert text == expected
    assert stream.matched is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be fp32, fp16 or bf16"),
        ({"device": "npu:0"}, "device"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "exclude each other"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_bad_configuration_names_the_field(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        make_config(**options)


@pytest.mark.parametrize("field", ["engine_id", "model_path", "device", "dtype", "max_new_tokens", "max_batch_size"])
def test_required_fields_have_no_default(field: str) -> None:
    values = make_config().model_dump()
    del values[field]
    with pytest.raises(InvalidArgumentError, match=field):
        HFCudaEngineConfig(**values)


async def test_a_missing_model_or_device_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no model at"):
        await HFCudaEngine(make_config(model_path=str(tmp_path / "nothing"))).start()
    if not torch.cuda.is_available():
        with pytest.raises(UnavailableError, match=r"needs a cuda device.*mock_mode=True"):
            await HFCudaEngine(make_config(device="cuda:0")).start()
