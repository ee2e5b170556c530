"""What cannot start says so in one line with the right code, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from model_zoo import build
from sagellm_core import LLMEngine, LLMEngineConfig
from sagellm_core.models.decoder import CausalLM
from sagellm_protocol import ErrorCode, FinishReason, InvalidArgumentError, SageLLMError, SamplingParams
from small_tokenizers import byte_level_backend
from tiny_engine import Brake


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    build("llama", tmp_path)
    byte_level_backend(vocab_size=300).save(str(tmp_path / "tokenizer.json"))
    return tmp_path


async def failed_start(**fields: Any) -> SageLLMError:
    """The error of an engine that cannot start; no thread of it may be left."""
    before = set(threading.enumerate())
    with pytest.raises(SageLLMError) as caught:
        await LLMEngine(LLMEngineConfig.model_validate(fields)).start()
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("engine-core")]
    assert "\n" not in caught.value.message
    return caught.value


async def test_missing_folder(tmp_path: Path) -> None:
    error = await failed_start(model_path=str(tmp_path / "nowhere"))
    assert error.code is ErrorCode.NOT_FOUND
    assert "nowhere" in error.message


async def test_folder_without_a_configuration(tmp_path: Path) -> None:
    error = await failed_start(model_path=str(tmp_path))
    assert "config.json" in error.message


@pytest.mark.parametrize("keep", [4, 1000])
async def test_corrupt_or_truncated_weights(checkpoint: Path, keep: int) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep] if keep > 4 else b"junk" * 100)
    error = await failed_start(model_path=str(checkpoint), max_model_len=64)
    assert error.code is ErrorCode.INVALID_ARGUMENT
    assert "model.safetensors" in error.message


async def test_pickle_checkpoints_are_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    error = await failed_start(model_path=str(checkpoint), max_model_len=64)
    assert "safetensors" in error.message


async def test_unknown_architecture_lists_the_known_ones(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "architectures": ["FooForCausalLM"]}))
    error = await failed_start(model_path=str(checkpoint))
    assert "FooForCausalLM" in error.message
    assert "LlamaForCausalLM" in error.message


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"backend_type": "abacus"}, ErrorCode.INVALID_ARGUMENT, ["abacus", "cpu"]),
        ({"num_kv_blocks": 2}, ErrorCode.RESOURCE_EXHAUSTED, ["max_model_len", "num_kv_blocks"]),
        ({"num_kv_blocks": 10**9}, ErrorCode.RESOURCE_EXHAUSTED, ["num_kv_blocks", "lower"]),
        ({"kv_cache_memory_bytes": 1000}, ErrorCode.RESOURCE_EXHAUSTED, ["max_model_len"]),
        ({"max_model_len": 10**6}, ErrorCode.INVALID_ARGUMENT, ["max_model_len", "lower"]),
        ({"scheduling_policy": "astrology"}, ErrorCode.INVALID_ARGUMENT, ["astrology", "fcfs"]),
    ],
)
async def test_what_the_engine_cannot_do(
    checkpoint: Path, fields: dict[str, Any], code: ErrorCode, words: list[str]
) -> None:
    error = await failed_start(**{"model_path": str(checkpoint), "max_model_len": 64, **fields})
    assert error.code is code
    assert all(word in error.message for word in words)


@pytest.mark.parametrize(
    ("file", "content", "word"),
    [
        ("tokenizer.json", "junk", "tokenizer.json"),
        ("generation_config.json", '{"repetition_penalty": -1}', "repetition_penalty"),
        ("config.json", "{", "config.json"),
    ],
)
async def test_broken_files_beside_the_weights(checkpoint: Path, file: str, content: str, word: str) -> None:
    (checkpoint / file).write_text(content)
    error = await failed_start(model_path=str(checkpoint), max_model_len=64)
    assert error.code is ErrorCode.INVALID_ARGUMENT
    assert word in error.message


async def test_a_missing_tokenizer_is_named(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    error = await failed_start(model_path=str(checkpoint), max_model_len=64)
    assert "tokenizer" in error.message


async def test_too_little_memory(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sagellm_backend import CPUBackendProvider, MemoryInfo

    monkeypatch.setattr(CPUBackendProvider, "memory_info", lambda self: MemoryInfo(2**30, 1000))
    error = await failed_start(model_path=str(checkpoint), backend_type="cpu")
    assert error.code is ErrorCode.RESOURCE_EXHAUSTED
    assert "smaller" in error.message


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 3, "num_beams": 2}, "n"),
        ({"min_tokens": 9, "max_tokens": 4}, "min_tokens"),
    ],
)
def test_bad_sampling_parameters_name_their_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        SamplingParams(**fields)
    assert caught.value.message.startswith(field)
    assert caught.value.context["field"] == field


BAD_REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": [5] * 64}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [301]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": [5], "priority": 7}, "priority"),
    ({"prompt": [5], "max_tokens": -1}, "max_tokens"),
    ({"prompt": [5], "request_id": "good"}, "request_id"),
    ({"prompt": [5], "sampling_params": SamplingParams(stop_token_ids=(999,))}, "stop_token_ids"),
    ({"prompt": [5], "sampling_params": SamplingParams(logit_bias={999: 1.0})}, "logit_bias"),
]


async def test_bad_requests_come_and_go_while_good_ones_run(checkpoint: Path, brake: Brake) -> None:
    sampling = SamplingParams(max_tokens=50, ignore_eos=True)
    async with LLMEngine(LLMEngineConfig(model_path=str(checkpoint), max_model_len=64)) as engine:
        expected = (await engine.generate([5, 6], sampling_params=sampling)).output_tokens
        brake.set(3)
        good = asyncio.ensure_future(engine.generate([5, 6], sampling_params=sampling, request_id="good"))
        await brake.held()
        for arguments, field in BAD_REQUESTS:
            with pytest.raises(InvalidArgumentError, match=field) as caught:
                await engine.generate(**arguments)
            assert "\n" not in caught.value.message
        brake.release()
        assert (await good).output_tokens == expected
        stats = await engine.stats()
    assert stats.num_free_blocks == stats.num_blocks


@pytest.mark.parametrize("fields", [{"tensor_parallel_size": 2}, {"trust_remote_code": True}, {"max_batch_size": 0}])
def test_bad_configurations_are_refused_at_once(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(fields))):
        LLMEngineConfig.model_validate({"model_path": "builtin", **fields})


async def test_a_failed_start_can_be_mended(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.rename(checkpoint / "elsewhere")
    engine = LLMEngine(LLMEngineConfig(model_path=str(checkpoint), max_model_len=64))
    with pytest.raises(SageLLMError):
        await engine.start()
    (checkpoint / "elsewhere").rename(weights)
    async with engine:
        assert (await engine.generate([5, 6], max_tokens=2)).output_tokens


async def test_a_failing_step_ends_its_requests_and_no_others(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with LLMEngine(LLMEngineConfig(model_path=str(checkpoint), max_model_len=64)) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(CausalLM, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("the device broke")))
            failed = await engine.generate([5, 6], sampling_params=SamplingParams(max_tokens=4))
        fine = await engine.generate([5, 6], sampling_params=SamplingParams(max_tokens=4, ignore_eos=True))
        stats = await engine.stats()
    assert failed.finish_reason is FinishReason.ERROR
    assert failed.error is not None
    assert "the device broke" in failed.error.message
    assert len(fine.output_tokens) == 4
    assert stats.num_free_blocks == stats.num_blocks


async def test_a_failing_step_spares_those_that_wait(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one place in the batch, only the request in the step fails; the one behind it runs when its turn comes."""
    fails = iter([True])
    forward = CausalLM.forward

    def fail_once(model: CausalLM, *arguments: Any) -> Any:
        if next(fails, False):
            raise RuntimeError("the device broke")
        return forward(model, *arguments)

    sampling = SamplingParams(max_tokens=4, ignore_eos=True)
    config = LLMEngineConfig(model_path=str(checkpoint), max_model_len=64, max_batch_size=1)
    async with LLMEngine(config) as engine:
        expected = (await engine.generate([7, 8], sampling_params=sampling)).output_tokens
        monkeypatch.setattr(CausalLM, "forward", fail_once)
        first, second = await asyncio.gather(
            engine.generate([5, 6], sampling_params=sampling), engine.generate([7, 8], sampling_params=sampling)
        )
        assert await engine.health_check()
    assert first.finish_reason is FinishReason.ERROR
    assert second.output_tokens == expected
