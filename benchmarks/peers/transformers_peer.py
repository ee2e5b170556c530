"""`transformers`' own `generate`, a batch at a time. Environment: `pip install transformers torch`."""

from __future__ import annotations

import time
from typing import Any


def prepare(model: str, weights: str, folder: str) -> str:
    """The checkpoint as it is."""
    del folder
    if weights != "16-bit":
        raise ValueError("transformers runs 16-bit weights only here")
    return model


class Peer:
    """A model in its checkpoint's dtype."""

    def __init__(self, checkpoint: str, weights: str, threads: int, max_requests: int, max_len: int) -> None:
        import torch
        import transformers

        del weights, max_requests, max_len
        torch.set_num_threads(threads)
        self.torch, self.lib = torch, transformers
        self.model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").eval()

    def describe(self) -> dict[str, Any]:
        """Version and dtype."""
        return {"package": f"transformers {self.lib.__version__}", "weights": str(self.model.dtype)}

    def generate(self, prompts: list[list[int]], output_len: int) -> list[list[float]]:
        """See worker.py; prompts of one length."""
        moments: list[float] = []

        def note(input_ids: Any, scores: Any) -> Any:
            moments.append(time.perf_counter() - began)
            return scores

        ids = self.torch.tensor(prompts)
        began = time.perf_counter()
        self.model.generate(
            ids,
            attention_mask=self.torch.ones_like(ids),
            max_new_tokens=output_len,
            min_new_tokens=output_len,
            do_sample=False,
            pad_token_id=0,
            logits_processor=[note],
        )
        return [list(moments) for _ in prompts]
