"""`benchmarks/compare.py` with a peer of one line, and the checkpoints it writes for real ones."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).parents[2] / "benchmarks"
PEER = """
def prepare(model, weights, folder):
    return model

class Peer:
    def __init__(self, checkpoint, weights, threads, max_requests, max_len):
        if weights == "int8":
            raise ValueError("no int8 here")

    def describe(self):
        print("noise on standard output")
        return {"package": "one line"}

    def generate(self, prompts, output_len):
        return [[0.5 * (place + 1) for place in range(output_len)] for _ in prompts]
"""


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER / "peers"))
    yield _load("compare", FOLDER / "compare.py")
    for name in ("compare", "checkpoint", "llama_cpp_peer", "vllm_peer"):
        sys.modules.pop(name, None)


def _load(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A Qwen2 of one layer in bf16."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    shapes = {
        "model.embed_tokens.weight": (128, 64),
        "model.norm.weight": (64,),
        "model.layers.0.self_attn.q_proj.weight": (64, 64),
        "model.layers.0.self_attn.q_proj.bias": (64,),
        "model.layers.0.mlp.down_proj.weight": (64, 96),
    }
    torch.manual_seed(0)
    save_file({name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}, folder / "model.safetensors")
    config = {
        "model_type": "qwen2",
        "num_hidden_layers": 1,
        "max_position_embeddings": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "vocab_size": 128,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_contenders_are_compared_and_missing_ones_skipped(
    compare: ModuleType,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    peers = tmp_path / "peers"
    peers.mkdir()
    shutil.copy(FOLDER / "peers" / "worker.py", peers)
    for name in ("sagellm", "vllm"):
        (peers / f"{name}_peer.py").write_text(PEER, encoding="utf-8")
    (peers / "vllm" / "bin").mkdir(parents=True)
    (peers / "vllm" / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setattr(compare, "WORKER", peers / "worker.py")
    output = tmp_path / "result.json"
    arguments = f"--model {checkpoint} --peers {peers} --work {tmp_path / 'work'} --json {output} --rounds 2"
    chosen = "--only sagellm,vllm,openvino --weights 16-bit,int8 --rows decode-8,prefill"
    lock = f"--lock {tmp_path / 'lock'}"
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments.split(), *chosen.split(), *lock.split()])
    compare.main()
    data: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    assert data["tokens_per_second"]["16-bit"] == {
        "decode-8": {"sagellm": [16.0, 16.0], "vllm": [16.0, 16.0]},
        "prefill": {"sagellm": [2048.0, 2048.0], "vllm": [2048.0, 2048.0]},
    }
    assert data["ratios"]["16-bit"]["decode-8"]["vllm"] == 1.0
    assert data["contenders"]["16-bit"]["vllm"] == {"package": "one line"}
    assert "not installed" in data["skipped"]["16-bit"]["openvino"]
    assert "ValueError: no int8 here" in data["skipped"]["int8"]["vllm"]
    out = capsys.readouterr().out
    assert "16-bit weights" in out
    assert "skipped openvino: not installed" in out


def test_a_worker_that_dies_is_an_error(compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "worker.py").write_text("import sys; sys.stdin.readline()", encoding="utf-8")
    monkeypatch.setattr(compare, "WORKER", tmp_path / "worker.py")
    contender = compare.Contender("gone", Path(sys.executable), tmp_path / "log")
    with pytest.raises(RuntimeError, match="the process of gone ended"):
        contender.call("load")
    contender.close()


@pytest.mark.parametrize("weights", ["16-bit", "int8", "int4"])
def test_gguf_files(compare: ModuleType, checkpoint: Path, tmp_path: Path, weights: str) -> None:
    peer = importlib.import_module("llama_cpp_peer")
    file = peer.prepare(model=str(checkpoint), weights=weights, folder=str(tmp_path))
    assert peer.prepare(model=str(checkpoint), weights=weights, folder=str(tmp_path)) == file
    source = {name: tensor.float().numpy() for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert set(stored) == {
        "token_embd.weight",
        "output_norm.weight",
        "blk.0.attn_q.weight",
        "blk.0.attn_q.bias",
        "blk.0.ffn_down.weight",
    }
    assert (
        stored["blk.0.ffn_down.weight"].tensor_type.name == {"16-bit": "BF16", "int8": "Q8_0", "int4": "Q4_0"}[weights]
    )
    down = gguf.dequantize(stored["blk.0.ffn_down.weight"].data, stored["blk.0.ffn_down.weight"].tensor_type)
    error = np.abs(down - source["model.layers.0.mlp.down_proj.weight"]).max()
    assert error < {"16-bit": 1e-6, "int8": 0.03, "int4": 0.6}[weights]


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_compressed_tensors(compare: ModuleType, checkpoint: Path, tmp_path: Path, weights: str) -> None:
    peer = importlib.import_module("vllm_peer")
    folder = peer.prepare(model=str(checkpoint), weights=weights, folder=str(tmp_path))
    stem = "model.layers.0.mlp.down_proj"
    source = load_file(checkpoint / "model.safetensors")[f"{stem}.weight"].float()
    tensors = load_file(folder / "model.safetensors")
    scale = tensors[f"{stem}.weight_scale"].float()
    if weights == "int8":
        restored = tensors[f"{stem}.weight"].float() * scale
    else:
        packed = tensors[f"{stem}.weight_packed"]
        codes = torch.stack([(packed >> (4 * place)) & 15 for place in range(8)], dim=2).flatten(1).float() - 8
        restored = codes * scale.repeat_interleave(32, 1)
        assert tensors[f"{stem}.weight_shape"].tolist() == list(source.shape)
    assert (restored - source).abs().max() < {"int8": 0.03, "int4": 0.4}[weights]
    assert tensors["model.embed_tokens.weight"].dtype is torch.bfloat16
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
