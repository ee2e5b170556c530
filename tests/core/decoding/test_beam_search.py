"""Beam search against exhaustive search and transformers; ends, failures, cancellation."""

import asyncio
import itertools

import pytest
import torch

from sagellm_core.decoding.base import child_request
from sagellm_core.decoding.beam_search import BeamSearchDecoding
from sagellm_core.engine_core.types import EngineCoreRequest
from sagellm_protocol import FinishReason, InvalidArgumentError, SamplingParams
from toy_engine import ToyEngine, collect, hash_model, tokens_of

PROMPT = [3, 1, 2]


def request(*, eos=(), prompt=PROMPT, **params):
    params.setdefault("num_beams", 3)
    params.setdefault("max_tokens", 6)
    return EngineCoreRequest("r", prompt, SamplingParams(strategy="beam_search", **params), frozenset(eos))


async def search(model, asked):
    (output,) = await collect(BeamSearchDecoding()(ToyEngine(model), asked))
    return output


def logprob_of(model, token_ids, prompt=PROMPT):
    total, context = 0.0, list(prompt)
    for token_id in token_ids:
        total += torch.log_softmax(model(context)[0].double(), -1)[token_id].item()
        context.append(token_id)
    return total


async def test_enough_beams_find_the_most_probable_sequence():
    model = hash_model(vocab_size=4)
    output = await search(model, request(num_beams=64, max_tokens=3))
    best = max(itertools.product(range(4), repeat=3), key=lambda tokens: logprob_of(model, tokens))
    assert output.new_token_ids == list(best)
    assert output.finish_reason is FinishReason.LENGTH


async def test_one_beam_is_greedy():
    engine = ToyEngine(hash_model())
    (output,) = await collect(BeamSearchDecoding()(engine, request(num_beams=1)))
    greedy = await collect(engine.submit(EngineCoreRequest("g", PROMPT, SamplingParams(max_tokens=6))))
    assert output.new_token_ids == tokens_of(greedy)


async def test_scores_and_logprobs_are_the_models_own():
    model = hash_model()
    output = await search(model, request(logprobs=2, num_beams=4))
    assert [entry.token_id for entry in output.logprobs] == output.new_token_ids
    assert sum(entry.logprob for entry in output.logprobs) == pytest.approx(
        logprob_of(model, output.new_token_ids), abs=1e-4
    )
    assert {len(entry.top) for entry in output.logprobs} == {2}
    assert (await search(model, request())).logprobs is None


async def test_children_return_the_hypotheses_in_order():
    model = hash_model()
    asked = request(n=3)
    outputs = [await search(model, child_request(asked, index)) for index in range(3)]
    together = await BeamSearchDecoding().search(ToyEngine(model), asked)
    assert [output.new_token_ids for output in outputs] == [output.new_token_ids for output in together]
    assert [output.request_id for output in outputs] == ["r/0", "r/1", "r/2"]
    scores = [logprob_of(model, output.new_token_ids) for output in outputs]
    assert scores == sorted(scores, reverse=True)


async def test_a_step_runs_all_beams_together_under_ids_of_their_own():
    engine = ToyEngine(hash_model())
    await collect(BeamSearchDecoding()(engine, request(num_beams=3, max_tokens=3)))
    ids = [probe.request_id for probe in engine.requests]
    assert ids == ["r/0.0", *(f"r/{step}.{beam}" for step in (1, 2) for beam in range(3))]
    assert engine.max_running == 3
    assert {probe.sampling.max_tokens for probe in engine.requests} == {1}
    assert [probe.sampled_prefix_len for probe in engine.requests] == [0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("kind", ["eos", "stop", "ignored"])
async def test_end_tokens(kind):
    model = hash_model(vocab_size=6)
    if kind == "eos":
        output = await search(model, request(eos=[5], max_tokens=30))
        assert (output.new_token_ids[-1], output.stop_reason) == (5, None)
    elif kind == "stop":
        output = await search(model, request(stop_token_ids=[5], max_tokens=30))
        assert (output.new_token_ids[-1], output.stop_reason) == (5, 5)
    else:
        output = await search(model, request(eos=[5], ignore_eos=True, max_tokens=30))
        assert len(output.new_token_ids) == 30
    assert output.finish_reason is (FinishReason.LENGTH if kind == "ignored" else FinishReason.STOP)
    assert 5 not in output.new_token_ids[:-1] or kind == "ignored"


async def test_min_tokens_hold_the_end_back():
    model = hash_model(vocab_size=4)
    early = await search(model, request(eos=[3], max_tokens=12, length_penalty=-1.0))
    late = await search(model, request(eos=[3], max_tokens=12, length_penalty=-1.0, min_tokens=8))
    assert len(early.new_token_ids) < 8
    assert len(late.new_token_ids) > 8
    assert 3 not in late.new_token_ids[:8]


async def test_bias_and_penalties_count():
    model = hash_model()
    plain = await search(model, request())
    banned = plain.new_token_ids[0]
    assert banned not in (await search(model, request(logit_bias={banned: -100.0}))).new_token_ids
    penalised = await search(model, request(max_tokens=10, frequency_penalty=2.0, presence_penalty=2.0))
    unpenalised = await search(model, request(max_tokens=10))
    assert len(set(penalised.new_token_ids)) > len(set(unpenalised.new_token_ids))


async def test_timings_are_those_of_the_whole_search():
    engine = ToyEngine(hash_model(), num_cached=2)
    (output,) = await collect(BeamSearchDecoding()(engine, request(num_beams=2, max_tokens=4)))
    metrics = output.metrics
    assert metrics.queued_at < metrics.scheduled_at < metrics.first_token_at < metrics.last_token_at
    assert metrics.prefill_ms == (metrics.first_token_at - metrics.scheduled_at) * 1e3
    assert (output.num_cached_tokens, metrics.kv_used_tokens) == (2, 2 * (len(PROMPT) + 3))


async def test_a_failing_probe_ends_the_request_with_its_error():
    engine = ToyEngine(hash_model(), fail_on="r/2.1", hang_on="r/2.0")
    (output,) = await collect(BeamSearchDecoding()(engine, request()))
    assert (output.request_id, output.finish_reason) == ("r", FinishReason.ERROR)
    assert "the toy broke" in output.error.message
    assert not engine.running


async def test_cancelling_aborts_the_probes():
    engine = ToyEngine(hash_model(), hang_on="r/2.1")
    task = asyncio.ensure_future(collect(BeamSearchDecoding()(engine, request())))
    while "r/2.1" not in engine.running:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not engine.running


async def test_more_outputs_than_beams_are_refused():
    asked = child_request(request(num_beams=3, n=3), 2)
    asked = EngineCoreRequest("r", PROMPT, asked.sampling.model_copy(update={"num_beams": 2}), choice_index=2)
    with pytest.raises(InvalidArgumentError, match="n must be <= num_beams"):
        await search(hash_model(), asked)


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.25,
        bos_token_id=0,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).eval()


def as_language_model(llama):
    def run(token_ids):
        with torch.inference_mode():
            output = llama(torch.tensor([list(token_ids)]), output_hidden_states=True, use_cache=False)
        return output.logits[0, -1].float(), output.hidden_states[-1][0]

    return run


def generate(llama, asked):
    """The hypotheses of transformers, without padding."""
    from transformers import GenerationConfig

    sampling, num_returned = asked.sampling, asked.sampling.n
    eos = sorted(asked.eos_token_ids)
    config = GenerationConfig(
        num_beams=sampling.num_beams,
        num_return_sequences=num_returned,
        do_sample=False,
        max_new_tokens=sampling.max_tokens,
        min_new_tokens=sampling.min_tokens or None,
        length_penalty=sampling.length_penalty,
        early_stopping=sampling.early_stopping,
        eos_token_id=eos or None,
        pad_token_id=0,
        bos_token_id=None,
    )
    prompt = torch.tensor([list(asked.prompt_token_ids)])
    rows = llama.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config).tolist()
    return [up_to_end(row[len(asked.prompt_token_ids) :], eos, sampling.max_tokens) for row in rows]


def up_to_end(token_ids, eos, max_tokens):
    ends = [i for i, token_id in enumerate(token_ids) if token_id in eos]
    return token_ids[: ends[0] + 1] if ends else token_ids[:max_tokens]


@pytest.mark.parametrize("prompt", [[5, 9, 3], [17], [2, 20, 20, 8, 11, 4]], ids=len)
@pytest.mark.parametrize(
    "params",
    [
        {"num_beams": 2},
        {"num_beams": 4, "n": 4},
        {"num_beams": 3, "eos": [7], "n": 3},
        {"num_beams": 3, "eos": [7, 11], "early_stopping": True, "n": 2},
        {"num_beams": 4, "eos": [7, 2, 19], "early_stopping": "never"},
        {"num_beams": 3, "eos": [7, 2], "length_penalty": 0.0, "n": 3},
        {"num_beams": 3, "eos": [7, 2], "length_penalty": -1.5},
        {"num_beams": 4, "eos": [7, 2, 19], "length_penalty": 2.0, "early_stopping": "never", "n": 4},
        {"num_beams": 3, "eos": [7, 2, 19], "min_tokens": 5, "length_penalty": 0.5},
    ],
    ids=str,
)
async def test_the_same_as_transformers(llama, prompt, params):
    asked = request(prompt=prompt, max_tokens=10, **params)
    outputs = await BeamSearchDecoding().search(ToyEngine(as_language_model(llama)), asked)
    assert [output.new_token_ids for output in outputs[: asked.sampling.n]] == generate(llama, asked)
