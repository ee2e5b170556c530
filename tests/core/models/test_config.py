"""Configurations are read without weights and without torch; malformed ones name the field."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from model_zoo import FAMILIES, make_model
from sagellm_core.models import MODELS, read_model_config
from sagellm_core.models.hf_config import HFConfig
from sagellm_core.models.registry import get_family
from sagellm_protocol.dtypes import DType
from sagellm_protocol.errors import ErrorCode, InvalidArgumentError, SageLLMError, UnsupportedError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "torch_dtype": "bfloat16",
}


def write(folder: Path, *, without: tuple[str, ...] = (), **fields: Any) -> Path:
    config = {key: value for key, value in {**LLAMA, **fields}.items() if key not in without}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_fields(tmp_path: Path) -> None:
    config = read_model_config(write(tmp_path, eos_token_id=[2, 3]))
    assert (config.path, config.architecture, config.dtype) == (tmp_path, "LlamaForCausalLM", DType.BF16)
    assert (config.eos_token_ids, config.generation_config) == ((2, 3), {})
    assert config.max_model_len == config.spec.max_position_embeddings == 128
    assert (config.spec.head_dim, config.spec.num_kv_heads, config.spec.num_layers) == (16, 4, 2)


def test_generation_config_goes_first(tmp_path: Path) -> None:
    write(tmp_path, eos_token_id=2)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8], "temperature": 0.6}))
    config = read_model_config(tmp_path)
    assert config.eos_token_ids == (7, 8)
    assert config.generation_config["temperature"] == 0.6


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"dtype": "float16"}, DType.FP16),
        ({"torch_dtype": "torch.bfloat16"}, DType.BF16),
        ({"torch_dtype": "float32"}, DType.FP32),
    ],
)
def test_dtype(fields: dict[str, str], dtype: DType, tmp_path: Path) -> None:
    write(tmp_path, without=("torch_dtype",))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **fields}))
    assert read_model_config(tmp_path).dtype == dtype


def test_unknown_architecture_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        read_model_config(write(tmp_path, architectures=["MambaForCausalLM"]))
    assert caught.value.code == ErrorCode.NOT_IMPLEMENTED
    assert "'MambaForCausalLM' is not supported" in caught.value.message
    assert all(name in caught.value.message for name in MODELS)


def test_model_type_stands_in_for_architectures(tmp_path: Path) -> None:
    assert read_model_config(write(tmp_path, without=("architectures",))).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "big"}, "hidden_size must be a whole number"),
        ({"hidden_size": -1}, "hidden_size must be a whole number >= 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be >= 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide"),
        ({"rms_norm_eps": None, "rope_theta": "x"}, "rope_theta must be a number"),
        ({"attention_bias": 1}, "attention_bias must be true or false"),
        ({"rope_scaling": 3}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "short_factor must be a list of 8 numbers"),
        ({"eos_token_id": "x"}, "eos_token_id must be token ids"),
        ({"torch_dtype": "float31"}, "dtype must be float32"),
        ({"vocab_size": None}, "vocab_size is missing"),
    ],
)
def test_malformed_fields_are_named(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        read_model_config(write(tmp_path, **fields))
    assert str(tmp_path) in caught.value.message


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": {"type": "spiral"}},
        {"hidden_act": "relu"},
        {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["linear_attention", "full_attention"]},
    ],
)
def test_unsupported_features(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="not supported; supported: "):
        read_model_config(write(tmp_path, **fields))


@pytest.mark.parametrize(
    ("scaling", "reach"),
    [
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"type": "dynamic", "factor": 2.0}, 256),
        ({"type": "linear", "factor": 8.0}, 128),
    ],
)
def test_reachable_positions(scaling: dict[str, Any], reach: int, tmp_path: Path) -> None:
    assert read_model_config(write(tmp_path, rope_scaling=scaling)).max_model_len == reach


@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_count(family: str) -> None:
    model = make_model(family)
    architecture = next(name for name, target in MODELS.items() if target.startswith(f"{family}:"))
    spec = get_family(architecture).spec(HFConfig(model.config.to_dict(), Path("config.json")))
    assert spec.num_parameters == sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    assert hash(spec) == hash(get_family(architecture).spec(HFConfig(model.config.to_dict(), Path("config.json"))))


def test_registry_is_sorted_and_complete() -> None:
    assert list(MODELS) == sorted(MODELS)
    assert {type(get_family(name)).__name__ for name in MODELS} == {target.split(":")[1] for target in MODELS.values()}
    encoders = {"bert", "nomic_bert", "roberta"}
    assert {target.split(":")[0] for target in MODELS.values()} == set(FAMILIES) | encoders


def test_reading_is_quick_and_needs_no_torch(tmp_path: Path) -> None:
    write(tmp_path)
    program = (
        "import sys; from sagellm_core.models import read_model_config, resolve_model;"
        f"read_model_config(resolve_model({str(tmp_path)!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    durations = []
    for _ in range(5):
        started = time.thread_time()
        read_model_config(tmp_path)
        durations.append(time.thread_time() - started)
    assert min(durations) < 0.05, durations


def test_errors_are_of_the_protocol(tmp_path: Path) -> None:
    with pytest.raises(SageLLMError) as caught:
        read_model_config(tmp_path / "absent")
    assert caught.value.to_error().code == ErrorCode.NOT_FOUND
