"""The trained models: prompt logprobs and greedy continuations as recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from model_driver import ModelDriver
from sagellm_backend import BackendProvider
from sagellm_core.models import load_model


@pytest.mark.parametrize("name", ["stories260K", "llama2xs"])
def test_recorded_logprobs_and_tokens(name: str, shared: Path, provider: BackendProvider) -> None:
    golden = json.loads((shared / "golden" / f"{name}.json").read_text())
    model = load_model(shared / "models" / name, provider=provider)
    for case in golden["cases"]:
        prompt, expected = case["prompt_ids"], case["new_ids"][:8]
        driver = ModelDriver(model, provider)
        logits = driver.logits([(0, prompt)])
        logprobs = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        torch.testing.assert_close(logprobs, torch.tensor(case["prompt_logprobs"]), atol=2e-4, rtol=0)
        token_ids = [int(logits[-1].argmax())]
        while len(token_ids) < len(expected):
            token_ids.append(int(driver.logits([(0, token_ids[-1:])])[-1].argmax()))
        assert token_ids == expected
