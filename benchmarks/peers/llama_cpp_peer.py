"""llama.cpp through llama-cpp-python's low-level API: one context, all requests as sequences of it.

The program its `llama-batched-bench` is: prompts in batches of up to `n_batch` tokens, then one token of every sequence
a step. Environment: `pip install llama-cpp-python gguf`, built with CMAKE_ARGS="-DGGML_NATIVE=ON".
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import checkpoint
import numpy as np

_TYPES = {"16-bit": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
_BATCH = 2048
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def prepare(model: str, weights: str, folder: str) -> Path:
    """A GGUF file with every matrix in one type (llama.cpp's `--pure`); Qwen2 and Qwen3 checkpoints."""
    import gguf

    source, kind = Path(model), _TYPES[weights]
    target = Path(folder) / f"{source.name}-{kind}.gguf"
    if target.exists():
        return target
    config = checkpoint.read_config(source)
    if config["model_type"] not in ("qwen2", "qwen3"):
        raise ValueError(f"GGUF files are written for qwen2 and qwen3, not {config['model_type']}")
    partial = target.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, config["model_type"], use_temp_file=False)
    _add_metadata(writer, config)
    for name, tensor in checkpoint.read_tensors(source):
        # Norms and biases stay in float32, as llama.cpp wants them.
        stored = gguf.GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
        writer.add_tensor(_stored_name(name), gguf.quantize(tensor, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return partial.rename(target)


def _add_metadata(writer: Any, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("none")  # prompts are token ids
    writer.add_vocab_size(config["vocab_size"])


def _stored_name(name: str) -> str:
    stem, suffix = name.rsplit(".", 1)
    if stem in _OUTER_NAMES:
        return f"{_OUTER_NAMES[stem]}.{suffix}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[inner]}.{suffix}"


class Peer:
    """A model, and a context made for the shape of the batch: a sequence of its own for every request."""

    def __init__(self, checkpoint: str, weights: str, threads: int, max_requests: int, max_len: int) -> None:
        import llama_cpp

        del max_requests, max_len
        self.lib, self.kind, self.threads = llama_cpp, _TYPES[weights], threads
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(checkpoint.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {checkpoint}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
        self.shape = (0, 0)
        self.context: Any = None

    def _open(self, requests: int, length: int) -> None:
        """An empty context for that many requests of that many tokens."""
        if self.shape != (requests, length):
            if self.context:
                self.lib.llama_free(self.context)
            params = self.lib.llama_context_default_params()
            params.n_ctx = requests * (-(-length // 256) * 256)
            params.n_batch = _BATCH
            params.n_seq_max = requests
            params.n_threads = params.n_threads_batch = self.threads
            self.context = self.lib.llama_init_from_model(self.model, params)
            if not self.context:
                raise RuntimeError("llama.cpp cannot make a context")
            self.shape = (requests, length)
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def describe(self) -> dict[str, Any]:
        """Version, weights, what it was built for."""
        system = self.lib.llama_print_system_info().decode()
        return {"package": f"llama-cpp-python {self.lib.__version__}", "weights": self.kind, "system": system}

    def generate(self, prompts: list[list[int]], output_len: int) -> list[list[float]]:
        """See worker.py."""
        self._open(len(prompts), max(map(len, prompts)) + output_len)
        times: list[list[float]] = [[] for _ in prompts]
        began = time.perf_counter()
        last = self._prefill(prompts, times, began)
        for position in range(output_len - 1):
            self.batch.n_tokens = 0
            for sequence, token in enumerate(last):
                self._add(token, len(prompts[sequence]) + position, sequence, wanted=True)
            last = self._decode(range(len(prompts)))
            now = time.perf_counter() - began
            for arrivals in times:
                arrivals.append(now)
        return times

    def _prefill(self, prompts: list[list[int]], times: list[list[float]], began: float) -> list[int]:
        """Run the prompts in batches; returns the first token of each."""
        first: list[int] = []
        ends: list[int] = []  # rows of the batch that close a prompt

        def run() -> None:
            found = self._decode(ends)
            now = time.perf_counter() - began
            for token in found:
                times[len(first)].append(now)
                first.append(token)
            ends.clear()
            self.batch.n_tokens = 0

        self.batch.n_tokens = 0
        for sequence, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                is_end = position == len(prompt) - 1
                if is_end:
                    ends.append(self.batch.n_tokens)
                self._add(token, position, sequence, wanted=is_end)
                if self.batch.n_tokens == _BATCH:
                    run()
        if self.batch.n_tokens:
            run()
        return first

    def _add(self, token: int, position: int, sequence: int, *, wanted: bool) -> None:
        batch, row = self.batch, self.batch.n_tokens
        batch.token[row] = token
        batch.pos[row] = position
        batch.n_seq_id[row] = 1
        batch.seq_id[row][0] = sequence
        batch.logits[row] = wanted
        batch.n_tokens = row + 1

    def _decode(self, rows: Any) -> list[int]:
        """Run the batch; the most probable token of each of `rows`."""
        if self.lib.llama_decode(self.context, self.batch):
            raise RuntimeError("llama_decode failed")
        return [int(self._logits(row).argmax()) for row in rows]

    def _logits(self, row: int) -> np.ndarray:
        pointer = self.lib.llama_get_logits_ith(self.context, row)
        return np.ctypeslib.as_array(pointer, shape=(self.vocab_size,))
