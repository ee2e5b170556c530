"""Every way to choose tokens through the whole engine: against `transformers`, and against itself in any company."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sagellm_core import LLMEngine
from sagellm_protocol import FinishReason, Request, SamplingParams
from tiny_engine import make_engine

PROMPTS = [[5, 6, 7, 8], list(range(20, 37)), [250, 3, 99, 120, 64, 64, 7]]
REPETITIVE = [11] * 12  # what follows repeats itself unless a penalty forbids it
NUM_TOKENS = 14
EOS = 2

# The ways in which an engine may cut up the same work.
CUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks": {"prefill_chunk_size": 4},
    "no prefix cache": {"enable_prefix_caching": False},
    "preemption": {"num_kv_blocks": 8, "max_model_len": 64},
}


def params(**fields: Any) -> SamplingParams:
    return SamplingParams.model_validate({"max_tokens": NUM_TOKENS, "ignore_eos": True, **fields})


def reference(model: Any, prompt: list[int], **options: Any) -> list[int]:
    """What `transformers` generates."""
    options = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "pad_token_id": 0, **options}
    mask = torch.ones(1, len(prompt), dtype=torch.long)
    tokens: list[int] = model.generate(torch.tensor([prompt]), attention_mask=mask, **options)[0].tolist()
    return tokens[len(prompt) :]


async def ask(engine: LLMEngine, prompt: list[int], sampling: SamplingParams) -> list[int]:
    return (await engine.generate(prompt, sampling_params=sampling)).output_tokens


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.5])
async def test_beam_search_equals_transformers(
    llama: tuple[Path, Any], length_penalty: float, early_stopping: bool
) -> None:
    folder, model = llama
    options = {"num_beams": 3, "length_penalty": length_penalty, "early_stopping": early_stopping}
    sampling = params(**options, ignore_eos=False)
    async with make_engine(folder) as engine:
        found = await asyncio.gather(*(ask(engine, prompt, sampling) for prompt in PROMPTS))
    assert found == [reference(model, prompt, **options) for prompt in PROMPTS]


async def test_beam_search_returns_its_hypotheses_best_first(llama: tuple[Path, Any]) -> None:
    folder, model = llama
    expected = model.generate(
        torch.tensor([PROMPTS[1]]),
        attention_mask=torch.ones(1, len(PROMPTS[1]), dtype=torch.long),
        max_new_tokens=6,
        min_new_tokens=6,
        num_beams=3,
        num_return_sequences=3,
        do_sample=False,
        pad_token_id=0,
    )[:, len(PROMPTS[1]) :].tolist()
    async with make_engine(folder) as engine:
        response = await engine.generate(PROMPTS[1], sampling_params=params(num_beams=3, n=3, max_tokens=6))
    assert [output.token_ids for output in response.outputs] == expected


@pytest.mark.parametrize("penalty", [1.3, 5.0])
async def test_repetition_penalty_equals_transformers(llama: tuple[Path, Any], penalty: float) -> None:
    folder, model = llama
    sampling = SamplingParams(max_tokens=30, repetition_penalty=penalty)
    prompts = [REPETITIVE, *PROMPTS]
    async with make_engine(folder) as engine:
        found = await asyncio.gather(*(ask(engine, prompt, sampling) for prompt in prompts))
        plain = await ask(engine, REPETITIVE, SamplingParams(max_tokens=30))
    expected = [reference(model, prompt, repetition_penalty=penalty, max_new_tokens=30) for prompt in prompts]
    assert found == expected
    assert found[0] != plain


@torch.no_grad()
def reference_logprobs(model: Any, token_ids: list[int]) -> torch.Tensor:
    """Log-probabilities [len(token_ids), V] of the token after each."""
    logprobs: torch.Tensor = torch.log_softmax(model(torch.tensor([token_ids])).logits[0].float(), -1)
    return logprobs


async def test_logprobs_are_those_of_transformers(llama: tuple[Path, Any]) -> None:
    folder, model = llama
    prompt = PROMPTS[1]
    async with make_engine(folder, prefill_chunk_size=5) as engine:
        response = await engine.generate(prompt, sampling_params=params(logprobs=4, prompt_logprobs=2))
    token_ids = [*prompt, *response.output_tokens]
    expected = reference_logprobs(model, token_ids)
    assert response.logprobs is not None
    assert response.prompt_logprobs is not None
    assert response.prompt_logprobs[0] is None
    entries = [*response.prompt_logprobs[1:], *response.logprobs]
    assert len(entries) == len(token_ids) - 1
    for position, entry in enumerate(entries):
        assert entry is not None
        assert entry.token_id == token_ids[position + 1]
        assert entry.logprob == pytest.approx(float(expected[position, entry.token_id]), abs=1e-4)
        best = expected[position].topk(len(entry.top))
        assert [top.token_id for top in entry.top] == best.indices.tolist()
        assert [top.logprob for top in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    total = sum(entry.logprob for entry in response.logprobs)
    assert response.outputs[0].cumulative_logprob == pytest.approx(total)


@pytest.mark.parametrize("cut", CUTS)
async def test_seeded_sampling_is_reproducible_in_any_company(folder: Path, cut: str) -> None:
    samplings = [params(temperature=1.0, seed=seed, top_p=0.9, max_tokens=30) for seed in (0, 1, 2**63 - 1)]
    async with make_engine(folder, enable_prefix_caching=False) as engine:
        alone = [await ask(engine, PROMPTS[1], sampling) for sampling in samplings]
    async with make_engine(folder, **CUTS[cut]) as engine:
        company = [ask(engine, [start] * 9, params(temperature=1.3)) for start in range(60, 66)]
        together = await asyncio.gather(*(ask(engine, PROMPTS[1], sampling) for sampling in samplings), *company)
        preemptions = (await engine.stats()).num_preemptions
        again = [await ask(engine, PROMPTS[1], sampling) for sampling in samplings]
    assert together[:3] == alone == again
    assert len({tuple(tokens) for tokens in alone}) == 3
    assert (cut == "preemption") == (preemptions > 0)


@pytest.mark.parametrize("strategy", ["beam_search", "contrastive"])
@pytest.mark.parametrize("cut", CUTS)
async def test_search_strategies_do_not_depend_on_the_cut(folder: Path, cut: str, strategy: str) -> None:
    async with make_engine(folder) as engine:
        expected = await ask(engine, PROMPTS[1], params(strategy=strategy))
    async with make_engine(folder, **CUTS[cut]) as engine:
        runs = [ask(engine, PROMPTS[1], params(strategy=strategy)) for _ in range(2)]
        company = [ask(engine, [start] * 9, params(temperature=1.0, max_tokens=30)) for start in range(60, 64)]
        found = await asyncio.gather(*runs, *company)
    assert found[:2] == [expected, expected]


async def test_without_a_seed_answers_differ(folder: Path) -> None:
    async with make_engine(folder) as engine:
        runs = [ask(engine, PROMPTS[0], params(temperature=1.5)) for _ in range(4)]
        assert len({tuple(tokens) for tokens in await asyncio.gather(*runs)}) == 4


async def test_what_leaves_one_candidate_is_greedy(folder: Path) -> None:
    async with make_engine(folder) as engine:
        greedy = await ask(engine, PROMPTS[1], params())
        for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-5}):
            assert await ask(engine, PROMPTS[1], params(**{"temperature": 1.0, "seed": 5, **narrow})) == greedy
        contrastive = params(strategy="contrastive", penalty_alpha=0.0)
        assert await ask(engine, PROMPTS[1], contrastive) == greedy


async def test_logit_bias_forces_and_forbids(folder: Path) -> None:
    async with make_engine(folder) as engine:
        assert await ask(engine, PROMPTS[0], params(logit_bias={7: 100.0})) == [7] * NUM_TOKENS
        first = (await ask(engine, PROMPTS[0], params()))[0]
        assert first not in await ask(engine, PROMPTS[0], params(logit_bias={first: -100.0}))


async def test_min_tokens_holds_the_end_back(folder: Path) -> None:
    wants_to_end = {"logit_bias": {EOS: 100.0}, "ignore_eos": False}
    async with make_engine(folder) as engine:
        at_once = await engine.generate(PROMPTS[0], sampling_params=params(**wants_to_end))
        later = await engine.generate(PROMPTS[0], sampling_params=params(**wants_to_end, min_tokens=5))
        never = await engine.generate(PROMPTS[0], sampling_params=params(logit_bias={EOS: 100.0}))
        by_id = await engine.generate(PROMPTS[0], sampling_params=params(logit_bias={9: 100.0}, stop_token_ids=[9]))
    assert (at_once.output_tokens, at_once.output_text) == ([EOS], "")
    assert at_once.finish_reason is FinishReason.STOP
    assert later.output_tokens.index(EOS) == len(later.output_tokens) - 1 == 5
    assert (never.output_tokens, never.finish_reason) == ([EOS] * NUM_TOKENS, FinishReason.LENGTH)
    assert (by_id.output_tokens, by_id.stop_reason) == ([9], 9)


@pytest.mark.parametrize("keep", [False, True])
async def test_stop_strings_cut_the_text(folder: Path, keep: bool) -> None:
    async with make_engine(folder) as engine:
        text = (await engine.generate(PROMPTS[1], sampling_params=params(max_tokens=40))).output_text
        stop = next(text[i : i + 2] for i in range(4, len(text)) if text[i : i + 2].isalpha() and text[i].isascii())
        cut = params(max_tokens=40, stop=["never to be seen", stop], include_stop_str_in_output=keep)
        response = await engine.generate(PROMPTS[1], sampling_params=cut)
    end = text.index(stop)
    assert response.output_text == text[: end + 2 * keep]
    assert (response.finish_reason, response.stop_reason) == (FinishReason.STOP, stop)


async def test_the_request_wins_over_the_engine_and_the_engine_over_the_model(folder: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(folder, checkpoint)
    (checkpoint / "generation_config.json").write_text(json.dumps({"repetition_penalty": 5.0, "max_new_tokens": 3}))
    async with make_engine(folder) as engine:
        expected = {
            p: await ask(engine, REPETITIVE, params(repetition_penalty=p, max_tokens=30)) for p in (5.0, 1.3, 1.0)
        }
    assert len({tuple(tokens) for tokens in expected.values()}) == 3
    defaults = SamplingParams(repetition_penalty=1.3)
    async with make_engine(checkpoint) as engine:
        assert await ask(engine, REPETITIVE, params(max_tokens=30)) == expected[5.0]
    async with make_engine(checkpoint, sampling_defaults=defaults) as engine:
        assert await ask(engine, REPETITIVE, params(max_tokens=30)) == expected[1.3]
        assert await ask(engine, REPETITIVE, params(repetition_penalty=1.0, max_tokens=30)) == expected[1.0]


async def test_max_tokens_comes_from_the_request_or_the_engine(folder: Path) -> None:
    async with make_engine(folder, max_new_tokens=5) as engine:
        lengths = [
            len((await engine.generate([5, 6], sampling_params=SamplingParams(ignore_eos=True))).output_tokens),
            len((await engine.generate([5, 6], sampling_params=params(), max_tokens=NUM_TOKENS)).output_tokens),
            len((await engine.execute(Request(prompt=[5, 6], max_tokens=3))).output_tokens),
            len((await engine.generate([5] * 120, sampling_params=params(max_tokens=50))).output_tokens),
        ]
    assert lengths == [5, NUM_TOKENS, 3, 8]  # the last one is cut by the context of 128
