"""Bias, masks and penalties against their formulas, and that they touch nothing else."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_core.engine_core.types import EngineCoreRequest
from sagellm_core.sampling.metadata import SamplingMetadata, SamplingRow
from sagellm_core.sampling.penalties import apply_mask, process_logits
from sagellm_protocol import SamplingParams
from sampling_reference import process

VOCAB_SIZE = 12
IDS = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=8)


@st.composite
def sampling_rows(draw):
    params = SamplingParams(
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.7])),
        presence_penalty=draw(st.sampled_from([0.0, 0.5, -2.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.25, -1.0])),
        logit_bias=draw(st.dictionaries(st.integers(0, VOCAB_SIZE + 3), st.floats(-100, 100, width=32), max_size=3)),
    )
    return SamplingRow(
        sampling=params,
        seed=0,
        position=0,
        prompt_token_ids=draw(IDS),
        output_token_ids=draw(IDS),
        banned_token_ids=draw(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=2)),
        allowed_token_ids=draw(st.none() | st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=6)),
        mask=draw(st.none() | st.integers(0, 2**VOCAB_SIZE - 1).map(lambda bits: np.array([bits], dtype=np.int32))),
    )


def processed(logits, rows):
    tensor = torch.from_numpy(logits.copy())
    process_logits(tensor, SamplingMetadata.from_requests(rows))
    return tensor.numpy()


@settings(deadline=None)
@given(st.lists(sampling_rows(), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_against_the_formulas(rows, seed):
    logits = np.random.default_rng(seed).normal(0, 3, (len(rows), VOCAB_SIZE)).astype(np.float32)
    expected = np.stack([process(logits[i], row) for i, row in enumerate(rows)])
    np.testing.assert_allclose(processed(logits, rows), expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(st.lists(sampling_rows(), min_size=2, max_size=5), st.integers(0, 2**32 - 1))
def test_a_row_keeps_its_bits_in_any_batch(rows, seed):
    logits = np.random.default_rng(seed).normal(0, 3, (len(rows), VOCAB_SIZE)).astype(np.float32)
    together = processed(logits, rows)
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(together[i], processed(logits[i : i + 1], [row])[0])


def test_presence_counts_once_frequency_each_time_and_the_prompt_not_at_all():
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    row = SamplingRow(params, 0, 0, prompt_token_ids=[0, 1], output_token_ids=[1, 1, 2])
    logits = processed(np.zeros((1, 4), np.float32), [row])
    assert logits.tolist() == [[0.0, -1.0, -0.75, 0.0]]


def test_repetition_divides_positive_and_multiplies_negative_logits_once():
    params = SamplingParams(repetition_penalty=2.0)
    row = SamplingRow(params, 0, 0, prompt_token_ids=[0, 1, 1], output_token_ids=[1, 2])
    logits = processed(np.array([[4, 4, -4, 4]], np.float32), [row])
    assert logits.tolist() == [[2.0, 2.0, -8.0, 4.0]]


def test_an_id_outside_the_vocabulary_leaves_the_next_row_alone():
    rows = [SamplingRow(SamplingParams(logit_bias={4: 9.0, 5: 9.0}), 0, 0), SamplingRow(SamplingParams(), 0, 0)]
    assert not processed(np.zeros((2, 4), np.float32), rows).any()


def request(prompt, *, eos=(), sampled_prefix_len=0, **params):
    return EngineCoreRequest(
        "r", prompt, SamplingParams(**params), frozenset(eos), seed=5, sampled_prefix_len=sampled_prefix_len
    )


def test_rows_carry_token_ids_only_where_a_penalty_reads_them():
    plain = SamplingRow.from_request(request([1, 2]), [1, 2, 3])
    assert (plain.prompt_token_ids, plain.output_token_ids, plain.position, plain.seed) == ((), (), 3, 5)
    penalised = SamplingRow.from_request(request([1, 2], presence_penalty=1.0), [1, 2, 3])
    assert (penalised.prompt_token_ids, penalised.output_token_ids) == ((1, 2), (3,))


def test_min_tokens_bans_all_stop_tokens_until_reached():
    asked = request([1], eos=[7], stop_token_ids=[8], min_tokens=2)
    assert SamplingRow.from_request(asked, [1, 5]).banned_token_ids == (7, 8)
    assert SamplingRow.from_request(asked, [1, 5, 5]).banned_token_ids == ()
    ignoring = request([1], eos=[7], stop_token_ids=[8], min_tokens=2, ignore_eos=True)
    assert SamplingRow.from_request(ignoring, [1, 5]).banned_token_ids == (8,)


def test_resubmitted_output_counts_as_output():
    whole = request([1, 2], eos=[7], min_tokens=2, frequency_penalty=1.0)
    resubmitted = request([1, 2, 3], eos=[7], min_tokens=2, frequency_penalty=1.0, sampled_prefix_len=1)
    assert SamplingRow.from_request(resubmitted, [1, 2, 3]) == SamplingRow.from_request(
        EngineCoreRequest("r", [1, 2], resubmitted.sampling, whole.eos_token_ids, seed=5), [1, 2, 3]
    )


def test_a_mask_of_few_tokens_is_like_one_of_many():
    logits = torch.randn(1000)
    for allowed in ([], [3], [0, 31, 32, 999], list(range(0, 1000, 2))):
        bits = np.zeros(1024, dtype=np.uint8)
        bits[allowed] = 1
        masked = logits.clone()
        apply_mask(masked, np.packbits(bits, bitorder="little").view(np.int32))
        expected = torch.full((1000,), -torch.inf)
        expected[allowed] = logits[allowed]
        assert torch.equal(masked, expected)
