"""Bad checkpoints give one clear error each: its code, the file's name, the remedy; before any weight is read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_driver import prompt_logits
from model_zoo import build
from sagellm_backend import BackendProvider
from sagellm_core.models import load_model
from sagellm_protocol.errors import ErrorCode, SageLLMError

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    build("llama", folder)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def change_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def failure(folder: Path, provider: BackendProvider, **options: int) -> SageLLMError:
    with pytest.raises(SageLLMError) as caught:
        load_model(folder, provider=provider, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def test_missing_folder(tmp_path: Path, provider: BackendProvider) -> None:
    error = failure(tmp_path / "absent", provider)
    assert error.code == ErrorCode.NOT_FOUND
    assert "absent: no such model folder" in error.message


def test_missing_config(folder: Path, provider: BackendProvider) -> None:
    (folder / "config.json").unlink()
    error = failure(folder, provider)
    assert error.code == ErrorCode.NOT_FOUND
    assert "no config.json" in error.message


def test_config_that_is_not_json(folder: Path, provider: BackendProvider) -> None:
    (folder / "config.json").write_text("{")
    error = failure(folder, provider)
    assert error.code == ErrorCode.INVALID_ARGUMENT
    assert "config.json: cannot be read as JSON" in error.message


def test_missing_weights(folder: Path, provider: BackendProvider) -> None:
    (folder / WEIGHTS).unlink()
    error = failure(folder, provider)
    assert error.code == ErrorCode.NOT_FOUND
    assert "no model.safetensors" in error.message


def test_pickles_are_refused(folder: Path, provider: BackendProvider) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    error = failure(folder, provider)
    assert error.code == ErrorCode.INVALID_ARGUMENT
    assert "pytorch_model.bin is a pickle" in error.message
    assert "safetensors" in error.message


@pytest.mark.parametrize("keep", [0, 5, 100, 50_000, -1])
def test_truncated_weights(keep: int, folder: Path, provider: BackendProvider) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    error = failure(folder, provider)
    assert error.code == ErrorCode.INVALID_ARGUMENT
    assert "model.safetensors: it " in error.message
    assert "download the file again" in error.message


def test_garbage_instead_of_weights(folder: Path, provider: BackendProvider) -> None:
    (folder / WEIGHTS).write_bytes(b"<html>Too many requests</html>" * 100)
    error = failure(folder, provider)
    assert error.code == ErrorCode.INVALID_ARGUMENT
    assert "model.safetensors: it has no safetensors header" in error.message


def test_header_and_data_that_disagree(folder: Path, provider: BackendProvider) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data.replace(b"[301,64]", b"[301,65]", 1))
    error = failure(folder, provider)
    assert error.code == ErrorCode.INVALID_ARGUMENT
    assert "size and shape of" in error.message


def test_missing_tensor(folder: Path, provider: BackendProvider) -> None:
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))
    error = failure(folder, provider)
    assert error.code == ErrorCode.INVALID_ARGUMENT
    assert "model.layers.1.self_attn.k_proj.weight is missing" in error.message


def test_unexpected_tensors(folder: Path, provider: BackendProvider) -> None:
    extra = {f"model.layers.{i}.self_attn.q_proj.bias": torch.zeros(96) for i in range(5)}
    change_tensors(folder, lambda tensors: tensors.update(extra))
    error = failure(folder, provider)
    assert error.code == ErrorCode.INVALID_ARGUMENT
    assert "q_proj.bias and 2 more tensors are not part of the model" in error.message


def test_missing_output_projection_of_an_untied_model(folder: Path, provider: BackendProvider) -> None:
    change_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert "lm_head.weight is missing" in failure(folder, provider).message


def test_wrong_shape(folder: Path, provider: BackendProvider) -> None:
    change_config(folder, intermediate_size=100)
    error = failure(folder, provider)
    assert error.code == ErrorCode.INVALID_ARGUMENT
    assert "gate_proj.weight has shape [96, 64], config.json asks for [100, 64]" in error.message


def test_integer_weights(folder: Path, provider: BackendProvider) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    error = failure(folder, provider)
    assert error.code == ErrorCode.NOT_IMPLEMENTED
    assert f"{name} is stored as I8" in error.message


def test_quantized_checkpoint(folder: Path, provider: BackendProvider) -> None:
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    error = failure(folder, provider)
    assert error.code == ErrorCode.NOT_IMPLEMENTED
    assert "quantized (gptq)" in error.message


def test_index_that_names_an_absent_file(folder: Path, provider: BackendProvider) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    error = failure(folder, provider)
    assert error.code == ErrorCode.NOT_FOUND
    assert "1 of 2 weight files are missing, first model-00002-of-00002.safetensors" in error.message


def test_index_that_leads_out_of_the_folder(folder: Path, provider: BackendProvider) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert failure(folder, provider).code == ErrorCode.NOT_FOUND


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}'])
def test_broken_index(content: str, folder: Path, provider: BackendProvider) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    error = failure(folder, provider)
    assert error.code == ErrorCode.INVALID_ARGUMENT
    assert "model.safetensors.index.json" in error.message


def test_shards_without_index(folder: Path, provider: BackendProvider) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"")
    error = failure(folder, provider)
    assert error.code == ErrorCode.NOT_FOUND
    assert "no model.safetensors.index.json" in error.message


def test_single_file_under_another_name(folder: Path, provider: BackendProvider) -> None:
    (folder / WEIGHTS).rename(folder / "weights.safetensors")
    assert load_model(folder, provider=provider).spec.num_layers == 3


def test_longer_than_the_model(folder: Path, provider: BackendProvider) -> None:
    error = failure(folder, provider, max_model_len=257)
    assert error.code == ErrorCode.INVALID_ARGUMENT
    assert "max_model_len 257 exceeds the 256 positions" in error.message


def test_weight_bytes_count_every_parameter(folder: Path, provider: BackendProvider) -> None:
    stored = load_file(folder / WEIGHTS)
    model = load_model(folder, provider=provider)
    num_bytes = sum(tensor.nbytes for tensor in stored.values())
    assert num_bytes <= model.weight_bytes < 1.01 * num_bytes  # packing rounds rows up to sixteen
    assert model.max_model_len == 256


def test_progress_is_told_matrix_by_matrix(folder: Path, provider: BackendProvider) -> None:
    told: list[tuple[int, int]] = []
    load_model(folder, provider=provider, on_progress=lambda done, total: told.append((done, total)))
    stored = load_file(folder / WEIGHTS)
    total = sum(tensor.numel() for tensor in stored.values() if tensor.dim() > 1)
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert len(told) == 2 + 3 * 4  # embedding, LM head; qkv, o, gate_up, down of three layers


def test_a_loaded_model_does_not_depend_on_its_file(folder: Path, provider: BackendProvider) -> None:
    model = load_model(folder, provider=provider)
    before = prompt_logits(model, provider, list(range(3, 20)))
    with (folder / WEIGHTS).open("r+b") as stream:  # in place, which a mapped file would show
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        stream.write(b"\0" * 100_000)
    assert torch.equal(prompt_logits(model, provider, list(range(3, 20))), before)


_MEASURE = """
import re, sys, torch
from pathlib import Path
from sagellm_backend import CPUBackendProvider
from sagellm_core.models import load_model

def peak():  # ru_maxrss would start with the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

provider = CPUBackendProvider()
for quantization in ("int8", "none"):  # wakes up whatever is imported and started on the way
    load_model(sys.argv[1], provider=provider, quantization=quantization)
before = peak()
model = load_model(sys.argv[2], provider=provider, quantization=sys.argv[3])
print(peak() - before, model.weight_bytes)
"""


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_peak_memory_is_the_packed_model_and_one_parameter(pristine: Path, tmp_path: Path, quantization: str) -> None:
    if not Path("/proc/self/status").is_file():
        pytest.skip("the system has no /proc to read the peak from")
    pytest.importorskip("sagellm_backend._native", reason="packed by the native kernels, which were not built")
    folder = write_mid_size_model(tmp_path / "mid")
    arguments = [sys.executable, "-c", _MEASURE, str(pristine), str(folder), quantization]
    output = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=240).stdout
    peak, packed = (int(number) for number in output.split())
    shard = (folder / WEIGHTS).stat().st_size
    largest = MID_VOCAB * MID_HIDDEN * 2
    print(
        f"{quantization}: peak {peak / 2**20:.0f} MiB, packed {packed / 2**20:.0f} MiB, shard {shard / 2**20:.0f} MiB"
    )
    assert peak < packed + shard
    assert peak < packed + 1.5 * largest


MID_VOCAB, MID_HIDDEN = 32_000, 1024


def write_mid_size_model(folder: Path) -> Path:
    """0.13 billion random weights in bfloat16."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=MID_VOCAB,
        hidden_size=MID_HIDDEN,
        intermediate_size=3072,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder
