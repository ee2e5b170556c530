"""Contrastive search against the formula of its paper, written down without an engine."""

import asyncio

import numpy as np
import pytest
import torch

from sagellm_core.decoding.contrastive import ContrastiveDecoding
from sagellm_core.engine_core.types import EngineCoreRequest
from sagellm_protocol import FinishReason, SamplingParams
from toy_engine import ToyEngine, collect, hash_model, tokens_of

PROMPT = [3, 1, 2]


def request(*, eos=(), prompt=PROMPT, **params):
    params.setdefault("max_tokens", 8)
    return EngineCoreRequest("r", prompt, SamplingParams(strategy="contrastive", **params), frozenset(eos))


def reference(model, prompt, *, alpha, top_k, max_tokens, eos=()):
    """Su et al., equation 5, with one whole forward pass for each candidate."""
    token_ids = list(prompt)
    while len(token_ids) < len(prompt) + max_tokens and (len(token_ids) == len(prompt) or token_ids[-1] not in eos):
        logits, context = model(token_ids)
        probabilities = torch.softmax(logits.double(), -1).numpy()
        context = context.double().numpy()
        context /= np.linalg.norm(context, axis=-1, keepdims=True)
        best = None
        for candidate in np.argsort(-probabilities, kind="stable")[:top_k].tolist():
            state = model([*token_ids, candidate])[1][-1].double().numpy()
            penalty = (context @ (state / np.linalg.norm(state))).max()
            score = (1 - alpha) * probabilities[candidate] - alpha * penalty
            if best is None or score > best[0]:
                best = (score, candidate)
        token_ids.append(best[1])
    return token_ids[len(prompt) :]


@pytest.mark.parametrize("num_cached", [0, 2, 100])
@pytest.mark.parametrize(("alpha", "top_k"), [(0.6, 4), (0.1, 2), (0.9, 6), (1.0, 3), (0.0, 5), (0.5, 1)])
async def test_against_the_formula(alpha, top_k, num_cached):
    model = hash_model()
    for prompt in (PROMPT, [7], [1, 1, 4, 9, 0]):
        engine = ToyEngine(model, num_cached=num_cached)
        outputs = await collect(ContrastiveDecoding()(engine, request(prompt=prompt, penalty_alpha=alpha, top_k=top_k)))
        assert tokens_of(outputs) == reference(model, prompt, alpha=alpha, top_k=top_k, max_tokens=8)
        assert [output.finished for output in outputs] == [False] * 7 + [True]


async def test_without_a_penalty_it_is_greedy():
    engine = ToyEngine(hash_model())
    outputs = await collect(ContrastiveDecoding()(engine, request(penalty_alpha=0.0)))
    greedy = await collect(engine.submit(EngineCoreRequest("g", PROMPT, SamplingParams(max_tokens=8))))
    assert tokens_of(outputs) == tokens_of(greedy)


async def test_end_tokens_and_min_tokens():
    model = hash_model(vocab_size=5)
    outputs = await collect(ContrastiveDecoding()(ToyEngine(model), request(eos=[4], max_tokens=40)))
    expected = reference(model, PROMPT, alpha=0.6, top_k=4, max_tokens=40, eos=[4])
    assert tokens_of(outputs) == expected
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert outputs[-1].stop_reason is None
    minimum = len(expected) + 3
    held = await collect(ContrastiveDecoding()(ToyEngine(model), request(eos=[4], max_tokens=40, min_tokens=minimum)))
    assert 4 not in tokens_of(held)[:minimum]
    stopped = await collect(ContrastiveDecoding()(ToyEngine(model), request(stop_token_ids=[4], max_tokens=40)))
    assert (tokens_of(stopped), stopped[-1].stop_reason) == (expected, 4)


async def test_what_it_asks_of_the_engine():
    engine = ToyEngine(hash_model())
    await collect(ContrastiveDecoding()(engine, request(top_k=3, max_tokens=2)))
    assert [probe.request_id for probe in engine.requests] == [
        "r/0.0",
        "r/1.0",
        "r/1.1",
        "r/1.2",
        "r/2.0",
        "r/2.1",
        "r/2.2",
    ]
    assert [probe.read_prefix_cache for probe in engine.requests] == [False] + [True] * 6
    assert all(probe.want_hidden_states for probe in engine.requests)
    assert engine.max_running == 3


async def test_logprobs_and_timings():
    engine = ToyEngine(hash_model())
    outputs = await collect(ContrastiveDecoding()(engine, request(logprobs=5, top_k=2)))
    token_ids = list(PROMPT)
    for output in outputs:
        (entry,) = output.logprobs
        expected = torch.log_softmax(engine.model(token_ids)[0].double(), -1)
        assert entry.logprob == pytest.approx(expected[entry.token_id].item(), abs=1e-5)
        assert [candidate.token_id for candidate in entry.top] == expected.argsort(descending=True)[:5].tolist()
        token_ids.append(entry.token_id)
    metrics = outputs[-1].metrics
    assert metrics.queued_at < metrics.scheduled_at < metrics.first_token_at < metrics.last_token_at
    assert outputs[0].metrics is None


async def test_a_failing_look_ahead_ends_the_request():
    engine = ToyEngine(hash_model(), fail_on="r/3.1", hang_on="r/3.0")
    outputs = await collect(ContrastiveDecoding()(engine, request()))
    assert len(outputs) == 3
    assert (outputs[-1].finish_reason, outputs[-1].error.message) == (FinishReason.ERROR, "the toy broke")
    assert not engine.running


async def test_leaving_early_aborts_the_look_aheads():
    engine = ToyEngine(hash_model(), hang_on="r/3.2")
    outputs = ContrastiveDecoding()(engine, request())
    await anext(outputs)
    await outputs.aclose()
    assert not engine.running
    task = asyncio.ensure_future(collect(ContrastiveDecoding()(ToyEngine(hash_model(), hang_on="r/1.0"), request())))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
