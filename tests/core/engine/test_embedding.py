"""Vectors of texts: what `transformers` computes, whatever else the engine has to do."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from encoder_zoo import embedding_files
from sagellm_core import LLMEngine
from sagellm_protocol import (
    EmbedParams,
    FinishReason,
    InvalidArgumentError,
    Request,
    SamplingParams,
    UnsupportedError,
)
from tiny_engine import BLOCK_SIZE, Brake, build_checkpoint, make_engine

Vectors = list[list[float]]


def prompts(count: int = 6, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    shared = [rng.randrange(3, 250) for _ in range(3 * BLOCK_SIZE)]
    return [shared[: 24 * (i % 2)] + [rng.randrange(3, 250) for _ in range(rng.randrange(1, 60))] for i in range(count)]


def rows_of(model: Any, token_ids: list[int]) -> torch.Tensor:
    """The hidden states that `transformers` computes."""
    with torch.no_grad():
        rows: torch.Tensor = model.model(torch.tensor([token_ids])).last_hidden_state[0]
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return build_checkpoint(folder)


async def embed(folder: Path, inputs: Any, **options: Any) -> Vectors:
    async with make_engine(folder, **options) as engine:
        return await engine.embed(inputs)


POOLINGS = {
    "lasttoken": lambda rows: rows[-1],
    "cls_token": lambda rows: rows[0],
    "max_tokens": lambda rows: rows.amax(0),
    "mean_tokens": lambda rows: rows.mean(0),
}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", POOLINGS)
async def test_vectors_equal_transformers(tmp_path: Path, mode: str, normalize: bool) -> None:
    model = build_checkpoint(tmp_path)
    embedding_files(tmp_path, mode, normalize=normalize)
    inputs = prompts()
    vectors = await embed(tmp_path, inputs, prefill_chunk_size=7)
    for token_ids, vector in zip(inputs, vectors, strict=True):
        expected = POOLINGS[mode](rows_of(model, token_ids))
        expected = torch.nn.functional.normalize(expected, dim=0) if normalize else expected
        torch.testing.assert_close(torch.tensor(vector), expected, atol=1e-4, rtol=1e-4)


async def test_a_decoder_takes_its_last_row_and_length_one(folder: Path, reference: Any) -> None:
    token_ids = prompts()[0]
    (vector,) = await embed(folder, token_ids)
    expected = torch.nn.functional.normalize(rows_of(reference, token_ids)[-1], dim=0)
    torch.testing.assert_close(torch.tensor(vector), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["lasttoken", "mean_tokens"])
@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk_size": 5},
        {"max_num_batched_tokens": 33},
        {"enable_prefix_caching": False},
        {"enable_chunked_prefill": False},
        {"max_batch_size": 1},
        {"num_kv_blocks": 16},
    ],
    ids=lambda options: next(iter(options)),
)
async def test_vectors_do_not_depend_on_company_chunks_or_cache(
    tmp_path: Path, mode: str, options: dict[str, Any]
) -> None:
    build_checkpoint(tmp_path)
    embedding_files(tmp_path, mode)
    inputs = prompts(12, seed=1)
    alone = [(await embed(tmp_path, [token_ids]))[0] for token_ids in inputs[:4]]
    assert (await embed(tmp_path, inputs * 2, **options))[:4] == alone


async def test_preempted_texts_begin_again(tmp_path: Path) -> None:
    build_checkpoint(tmp_path)
    embedding_files(tmp_path, "mean_tokens")
    inputs = prompts(8, seed=2)
    expected = await embed(tmp_path, inputs)
    async with make_engine(tmp_path, num_kv_blocks=16, prefill_chunk_size=4, enable_prefix_caching=False) as engine:
        writing = [
            asyncio.ensure_future(engine.generate([5 + i] * 20, max_tokens=60, sampling_params=SamplingParams()))
            for i in range(3)
        ]
        vectors = await engine.embed(inputs)
        await asyncio.gather(*writing)
        assert (await engine.stats()).num_preemptions > 0
    assert vectors == expected


async def test_vectors_and_answers_share_the_prefix_cache(folder: Path, reference: Any) -> None:
    del reference
    token_ids = prompts()[1]
    async with make_engine(folder) as engine:
        before = await engine.embed(token_ids)
        answer = await engine.generate(token_ids, max_tokens=2)
        assert answer.usage.cached_tokens == (len(token_ids) - 1) // BLOCK_SIZE * BLOCK_SIZE
        response = await engine.execute(Request(prompt=token_ids, embed=EmbedParams()))
    assert response.usage.cached_tokens > 0
    assert [response.embedding] == before


async def test_a_response_says_what_it_cost(folder: Path, reference: Any) -> None:
    del reference
    async with make_engine(folder) as engine:
        request = Request(prompt=[5, 6, 7], embed=EmbedParams(dimensions=8), trace_id="t")
        response = await engine.execute(request)
        stats = await engine.stats()
    assert response.finish_reason is FinishReason.STOP
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (3, 0)
    assert (response.request_id, response.trace_id) == (request.request_id, "t")
    assert response.metrics.ttft_ms == 0
    assert response.metrics.timestamps is not None
    assert (stats.num_running, stats.num_output_tokens, stats.num_prompt_tokens) == (0, 0, 3)
    assert stats.num_free_blocks == stats.num_blocks


async def test_cut_vectors_have_length_one_again(folder: Path, reference: Any) -> None:
    del reference
    async with make_engine(folder) as engine:
        (whole,) = await engine.embed("some text")
        (cut,) = await engine.embed("some text", dimensions=10)
        expected = torch.nn.functional.normalize(torch.tensor(whole[:10]), dim=0)
        torch.testing.assert_close(torch.tensor(cut), expected)
        with pytest.raises(InvalidArgumentError, match="have 64") as error:
            await engine.embed("some text", dimensions=65)
    assert error.value.context["field"] == "dimensions"


async def test_texts_may_fill_the_context_but_no_more(folder: Path, reference: Any) -> None:
    del reference
    async with make_engine(folder, max_model_len=32) as engine:
        (longest,) = await engine.embed([7] * 32)
        with pytest.raises(InvalidArgumentError, match="33 tokens, the model takes 32"):
            await engine.embed([7] * 33)
        for limit in (-1, 32):
            request = Request(prompt=[7] * 33, embed=EmbedParams(truncate_prompt_tokens=limit))
            assert (await engine.execute(request)).embedding == longest
        too_long = Request(prompt=[7] * 40, embed=EmbedParams(truncate_prompt_tokens=33))
        with pytest.raises(InvalidArgumentError, match="33 tokens"):
            await engine.execute(too_long)


async def test_an_aborted_text_has_no_vector(folder: Path, reference: Any, brake: Brake) -> None:
    del reference
    async with make_engine(folder, prefill_chunk_size=1) as engine:
        brake.set(3)
        request = Request(prompt=[7] * 100, embed=EmbedParams())
        running = asyncio.ensure_future(engine.execute(request))
        await brake.held()
        engine.abort(request.request_id)
        brake.release()
        response = await running
        assert (response.finish_reason, response.embedding) == (FinishReason.ABORT, None)
        stats = await engine.stats()
        assert stats.num_free_blocks == stats.num_blocks


async def test_a_vector_is_no_stream(folder: Path, reference: Any) -> None:
    del reference
    with pytest.raises(InvalidArgumentError, match="stream does not go with embed"):
        Request(prompt="x", embed=EmbedParams(), stream=True)
    async with make_engine(folder) as engine:
        with pytest.raises(InvalidArgumentError, match="use execute"):
            await anext(engine.stream(Request(prompt="x", embed=EmbedParams())))


async def test_what_is_not_built_is_refused_by_name(tmp_path: Path) -> None:
    build_checkpoint(tmp_path)
    embedding_files(tmp_path, "weightedmean_tokens")
    with pytest.raises(UnsupportedError, match="pooling_mode_weightedmean_tokens is not supported"):
        await make_engine(tmp_path).start()
    modules = [{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UnsupportedError, match="Dense is not supported"):
        await make_engine(tmp_path).start()
    modules = [{"type": "sentence_transformers.models.Pooling", "path": "../elsewhere"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InvalidArgumentError, match="name of a folder"):
        await make_engine(tmp_path).start()


async def test_damaged_weights_are_said(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    build_checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    engine: LLMEngine
    async with make_engine(tmp_path) as engine:
        response = await engine.execute(Request(prompt="x", embed=EmbedParams()))
    assert response.finish_reason is FinishReason.ERROR
    assert response.error is not None
    assert "not all numbers" in response.error.message
