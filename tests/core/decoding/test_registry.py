"""Finding strategies by name, the simple strategies, and the n outputs of a request."""

import pytest

from sagellm_core import decoding
from sagellm_core.decoding import available_strategies, child_request, get_strategy, register_strategy
from sagellm_core.decoding.sampling import GreedyDecoding, SamplingDecoding
from sagellm_core.engine_core.types import EngineCoreRequest
from sagellm_protocol import DecodingStrategy, InvalidArgumentError, SamplingParams
from toy_engine import ToyEngine, collect, hash_model, tokens_of


def request(**params):
    return EngineCoreRequest("r", [1, 2, 3], SamplingParams(**params), seed=9)


@pytest.mark.parametrize("strategy", list(DecodingStrategy))
def test_every_strategy_of_the_protocol_is_there(strategy):
    assert get_strategy(strategy).strategy is strategy
    assert get_strategy(strategy.value).strategy is strategy
    assert strategy.value in available_strategies()


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(InvalidArgumentError, match=r"'magic'.*beam_search, contrastive, greedy, sampling"):
        get_strategy("magic")


def test_third_parties_register_lazily_by_name(monkeypatch):
    monkeypatch.setattr("sagellm_core.decoding.registry._STRATEGIES", {})
    register_strategy("loud", "sagellm_core.decoding.sampling:GreedyDecoding")
    assert isinstance(get_strategy("loud"), GreedyDecoding)
    assert available_strategies() == ("loud",)
    with pytest.raises(InvalidArgumentError, match=r"package\.module:Class"):
        register_strategy("quiet", "no colon")


def test_exports_are_sorted_and_there():
    assert sorted(decoding.__all__) == decoding.__all__
    assert all(getattr(decoding, name) is not None for name in decoding.__all__)
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = decoding.missing


async def test_greedy_passes_the_request_on_and_takes_the_most_probable():
    engine = ToyEngine(hash_model())
    asked = request(max_tokens=5)
    outputs = await collect(GreedyDecoding()(engine, asked))
    token_ids = [1, 2, 3]
    for _ in range(5):
        token_ids.append(int(engine.model(token_ids)[0].argmax()))
    assert tokens_of(outputs) == token_ids[3:]
    assert engine.requests == [asked]


async def test_greedy_decodes_any_request_greedily():
    engine = ToyEngine(hash_model())
    greedy = await collect(GreedyDecoding()(engine, request(max_tokens=8)))
    hot = child_request(EngineCoreRequest("s", [1, 2, 3], SamplingParams(temperature=2.0, top_k=3, max_tokens=8)), 0)
    assert tokens_of(await collect(GreedyDecoding()(engine, hot))) == tokens_of(greedy)


async def test_sampling_draws_at_temperature_1_unless_told():
    engine = ToyEngine(hash_model())
    await collect(SamplingDecoding()(engine, request(max_tokens=3)))
    assert engine.requests[0].sampling.strategy is DecodingStrategy.SAMPLING
    assert engine.requests[0].sampling.temperature == 1.0
    given = EngineCoreRequest("s", [1], SamplingParams(temperature=0.5, max_tokens=3))
    await collect(SamplingDecoding()(engine, given))
    assert engine.requests[1] is given


async def test_a_resubmitted_request_goes_on_with_the_same_tokens():
    params = SamplingParams(temperature=1.0, frequency_penalty=0.5, max_tokens=12)
    engine = ToyEngine(hash_model())
    whole = tokens_of(await collect(engine.submit(EngineCoreRequest("a", [4, 5], params, seed=3))))
    rest = EngineCoreRequest("b", [4, 5, *whole[:5]], params.replace(max_tokens=7), seed=3, sampled_prefix_len=5)
    assert tokens_of(await collect(engine.submit(rest))) == whole[5:]


def test_children_have_ids_and_seeds_of_their_own():
    parent = request(temperature=1.0, n=3)
    children = [child_request(parent, index) for index in range(3)]
    assert [child.request_id for child in children] == ["r/0", "r/1", "r/2"]
    assert [child.choice_index for child in children] == [0, 1, 2]
    assert {child.sampling.n for child in children} == {1}
    assert children[0].seed == parent.seed
    assert len({child.seed for child in children}) == 3
    alone = request(temperature=1.0)
    assert child_request(alone, 0) is alone
