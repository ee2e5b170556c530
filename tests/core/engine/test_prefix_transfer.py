"""Prefixes carried from one engine's cache into another's: same bits, same tokens, and refusals that say why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from sagellm_core import LLMEngine
from sagellm_core.engine_core import prefix_transfer
from sagellm_core.kv_format import PrefixBlocks
from sagellm_core.worker import kv_blocks
from sagellm_protocol import ErrorCode, KVTransferError, SamplingParams, UnsupportedError
from tiny_engine import BLOCK_SIZE, build_checkpoint, make_engine

PROMPT = [(7 * i) % 290 + 3 for i in range(50)]
SAMPLING = SamplingParams(max_tokens=20, temperature=1.0, seed=5, ignore_eos=True)
NUM_FULL = len(PROMPT) // BLOCK_SIZE * BLOCK_SIZE


async def exported(engine: LLMEngine, prompt: list[int] = PROMPT, **names: Any) -> PrefixBlocks:
    blocks = await engine.export_prefix(prompt, **names)
    assert blocks is not None
    return blocks


async def check_idle(engine: LLMEngine) -> None:
    stats = await engine.stats()
    assert stats.num_free_blocks == stats.num_blocks
    assert engine._client is not None
    await engine._client.check_integrity()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("block_size", [8, 16])  # 16: the native kernels' own order, where they are built
async def test_the_answer_is_that_of_one_engine(
    tmp_path: Path, family: str, kv_cache_dtype: str, block_size: int
) -> None:
    build_checkpoint(tmp_path, family)
    options = {"kv_cache_dtype": kv_cache_dtype, "block_size": block_size}
    async with make_engine(tmp_path, **options) as one, make_engine(tmp_path, **options) as two:
        expected = await one.generate(PROMPT, sampling_params=SAMPLING)
        blocks = await exported(one)
        num_full = len(PROMPT) // block_size * block_size
        assert (blocks.num_tokens, blocks.token_ids) == (num_full, tuple(PROMPT[:num_full]))
        assert await two.import_prefix(blocks) == num_full
        assert (await exported(two)).data == blocks.data
        response = await two.generate(PROMPT, sampling_params=SAMPLING)
        assert response.output_tokens == expected.output_tokens
        assert response.usage.cached_tokens == num_full
        await check_idle(two)


async def test_imported_bytes_are_what_is_read(folder: Path) -> None:
    """Wrong keys and values, under a right checksum, change the answer: it is made from the blocks."""
    async with make_engine(folder) as one, make_engine(folder) as two:
        expected = await one.generate(PROMPT, sampling_params=SAMPLING)
        blocks = await exported(one)
        data = bytes(len(blocks.data))
        wrong = PrefixBlocks.of(blocks.token_ids, blocks.cache_salt, blocks.lora_id, blocks.format, data)
        await two.import_prefix(wrong)
        assert (await two.generate(PROMPT, sampling_params=SAMPLING)).output_tokens != expected.output_tokens


async def test_salts_stay_apart(folder: Path) -> None:
    async with make_engine(folder) as one, make_engine(folder) as two:
        await one.generate(PROMPT, sampling_params=SAMPLING)
        assert await one.export_prefix(PROMPT, cache_salt="mine") is None
        await two.import_prefix(await exported(one))
        assert await two.export_prefix(PROMPT, cache_salt="mine") is None
        assert await two.export_prefix(PROMPT, lora_id="mine") is None


async def test_nothing_is_exported_of_what_is_not_cached(folder: Path) -> None:
    async with make_engine(folder) as engine:
        assert await engine.export_prefix(PROMPT) is None
        await engine.generate(PROMPT, sampling_params=SAMPLING)
        assert await engine.export_prefix(PROMPT[: BLOCK_SIZE - 1]) is None
        assert (await exported(engine, [*PROMPT[:20], 299, *PROMPT[20:]])).num_tokens == 16


async def test_in_pieces_between_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with make_engine(folder) as one, make_engine(folder) as two:
        await one.generate(PROMPT, sampling_params=SAMPLING)
        whole = await exported(one)
        monkeypatch.setattr(prefix_transfer, "_MAX_BYTES", 2 * whole.format.bytes_per_block)
        assert await exported(one) == whole
        assert await two.import_prefix(whole) == NUM_FULL
        assert (await exported(two)).data == whole.data


async def test_what_is_there_is_not_written_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    def write(caches: list[Tensor], block_ids: list[int], data: memoryview) -> None:
        written.append(len(block_ids))
        kv_blocks.write_blocks(caches, block_ids, data)

    monkeypatch.setattr("sagellm_core.worker.worker.write_blocks", write)
    async with make_engine(folder) as one, make_engine(folder) as two:
        await one.generate(PROMPT, sampling_params=SAMPLING)
        blocks = await exported(one)
        await two.generate(PROMPT[: 3 * BLOCK_SIZE], sampling_params=SAMPLING)
        for _ in range(2):
            assert await two.import_prefix(blocks) == NUM_FULL
        assert written == [NUM_FULL // BLOCK_SIZE - 3]
        await check_idle(two)


async def test_blocks_in_use_make_no_room(folder: Path) -> None:
    """As many of the first blocks as fit are taken, and the running request is not disturbed."""
    options = {"num_kv_blocks": 8, "max_model_len": 64}
    long = SamplingParams(max_tokens=28, ignore_eos=True)
    async with make_engine(folder) as one, make_engine(folder, **options) as two:
        await one.generate(PROMPT, sampling_params=SAMPLING)
        expected = await one.generate(PROMPT[::-1][:24], sampling_params=long)
        events = two.stream(PROMPT[::-1][:24], sampling_params=long)
        seen = [await anext(events), await anext(events)]
        num_cached = await two.import_prefix(await exported(one))
        assert 0 < num_cached < NUM_FULL
        seen += [event async for event in events]
        assert seen[-1].output_tokens == expected.output_tokens  # type: ignore[union-attr]
        await check_idle(two)


async def test_damage_is_found(folder: Path) -> None:
    async with make_engine(folder) as engine:
        await engine.generate(PROMPT, sampling_params=SAMPLING)
        blocks = await exported(engine)
        flipped = bytes([blocks.data[0] ^ 1]) + blocks.data[1:]
        for damaged in (
            replace(blocks, data=flipped),
            replace(blocks, token_ids=(*blocks.token_ids[:-1], 4)),
            replace(blocks, cache_salt="other"),
        ):
            with pytest.raises(KVTransferError, match="checksum"):
                await engine.import_prefix(damaged)
        short = PrefixBlocks.of(blocks.token_ids, None, None, blocks.format, blocks.data[:-8])
        with pytest.raises(KVTransferError, match="are no blocks of 8 tokens"):
            await engine.import_prefix(short)


@pytest.mark.parametrize(
    ("options", "field"), [({"block_size": 16}, "layout"), ({"kv_cache_dtype": "int8"}, "layout"), ({}, "model")]
)
async def test_other_models_and_layouts_are_refused(
    folder: Path, tmp_path: Path, options: dict[str, Any], field: str
) -> None:
    other = folder
    if field == "model":
        other = tmp_path
        build_checkpoint(other, seed=1)
    async with make_engine(folder) as one, make_engine(other, **options) as two:
        await one.generate(PROMPT, sampling_params=SAMPLING)
        with pytest.raises(KVTransferError, match=f"another {field}") as caught:
            await two.import_prefix(await exported(one))
        assert caught.value.code is ErrorCode.KV_TRANSFER_FAILED
        assert not caught.value.retryable
        assert await two.export_prefix(PROMPT) is None


async def test_without_a_prefix_cache(folder: Path) -> None:
    async with make_engine(folder) as one, make_engine(folder, enable_prefix_caching=False) as two:
        await one.generate(PROMPT, sampling_params=SAMPLING)
        with pytest.raises(UnsupportedError, match="enable_prefix_caching"):
            await two.import_prefix(await exported(one))
        with pytest.raises(UnsupportedError, match="enable_prefix_caching"):
            await two.export_prefix(PROMPT)
