"""OpenVINO GenAI's continuous batching pipeline, stepped by hand so that every token's arrival is seen.

Environment: `pip install openvino-genai optimum-intel nncf torch` (the last three convert the checkpoint).
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# int4 as the exporter makes it by default: groups of 128 with minima; the embedding and the LM head in int8.
_FORMATS = {"16-bit": "fp16", "int8": "int8", "int4": "int4"}
_BLOCK = 32  # tokens a KV block holds on CPUs


def prepare(model: str, weights: str, folder: str) -> Path:
    """OpenVINO's own format, written by `optimum-cli export openvino`."""
    source, kind = Path(model), _FORMATS[weights]
    target = Path(folder) / f"{source.name}-openvino-{kind}"
    if target.exists():
        return target
    partial = target.with_suffix(".partial")
    tool = Path(sys.executable).with_name("optimum-cli")
    options = ["--task", "text-generation-with-past", "--weight-format", kind]
    subprocess.run([tool, "export", "openvino", "-m", source, *options, partial], check=True)
    return partial.rename(target)


class Peer:
    """A continuous batching pipeline."""

    def __init__(self, checkpoint: str, weights: str, threads: int, max_requests: int, max_len: int) -> None:
        import numpy
        import openvino
        import openvino_genai

        self.lib, self.openvino, self.numpy = openvino_genai, openvino, numpy
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.num_kv_blocks = max_requests * (max_len // _BLOCK + 1)
        scheduler.max_num_seqs = max_requests
        scheduler.max_num_batched_tokens = 2048
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = False
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(
            checkpoint, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )
        self.kind = _FORMATS[weights]
        self.num_requests = 0

    def describe(self) -> dict[str, Any]:
        """Version and weights."""
        return {"package": f"openvino-genai {self.lib.__version__}", "weights": self.kind}

    def generate(self, prompts: list[list[int]], output_len: int) -> list[list[float]]:
        """See worker.py."""
        config = self.lib.GenerationConfig(max_new_tokens=output_len, ignore_eos=True, do_sample=False)
        tensors = [self.openvino.Tensor(self.numpy.array([prompt], dtype=self.numpy.int64)) for prompt in prompts]
        times: list[list[float]] = [[] for _ in prompts]
        began = time.perf_counter()
        handles = []
        for tensor in tensors:
            self.num_requests += 1
            handles.append(self.pipeline.add_request(self.num_requests, tensor, config))
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            now = time.perf_counter() - began
            for handle, arrivals in zip(handles, times, strict=True):
                while handle.can_read():
                    for output in handle.read().values():
                        arrivals += [now] * len(output.generated_ids)
        return times
