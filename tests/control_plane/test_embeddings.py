"""Requests for vectors: they queue, are routed and count as all others do."""

from __future__ import annotations

import asyncio

import pytest

from fake_engine import FakeEngine
from sagellm_control_plane import ControlPlaneManager, ExecutionInstance, ExecutionInstanceType
from sagellm_protocol import (
    EmbedParams,
    InternalError,
    InvalidArgumentError,
    ModelDescription,
    NotFoundError,
    Request,
)

TEXTS = ["one", "one two", "one two three"]


class Encoder(FakeEngine):
    """An engine whose model makes vectors only."""

    async def describe_model(self) -> ModelDescription:
        return (await super().describe_model()).model_copy(update={"is_embedding": True})


def make_manager(**kinds: ExecutionInstanceType) -> tuple[ControlPlaneManager, dict[str, FakeEngine]]:
    """A manager with an engine of each kind, all with the model `m`."""
    engines: dict[str, FakeEngine] = {}

    def make(config: object) -> FakeEngine:
        engine = FakeEngine(config)  # type: ignore[arg-type]
        engines[engine.engine_id] = engine
        return engine

    manager = ControlPlaneManager(make_engine=make)
    for name, kind in kinds.items():
        manager.register_instance(ExecutionInstance(instance_id=name, model_name="m", instance_type=kind))
    return manager, engines


async def test_vectors_come_in_order_and_count() -> None:
    manager = ControlPlaneManager()
    manager.register_engine(FakeEngine(), model="m")
    async with manager:
        vectors = await manager.get_embeddings(TEXTS, model="m", dimensions=2)
        assert vectors == [[1.0, 0.5], [2.0, 0.5], [3.0, 0.5]]
        assert len(await manager.get_embeddings([5, 6, 7])) == 1
        metrics = manager.get_metrics()
        assert metrics.num_requests == 4
        assert metrics.error_rate == 0
        (info,) = manager.list_engines()
        assert (info.num_requests, info.num_tokens) == (0, 0)


async def test_more_texts_than_the_queue_holds() -> None:
    manager = ControlPlaneManager(max_num_waiting=100)
    manager.register_engine(FakeEngine(max_batch_size=1), model="m")
    async with manager:
        assert len(await manager.get_embeddings(["x"] * 300)) == 300


async def test_one_that_fails_ends_the_others() -> None:
    engine = FakeEngine(max_batch_size=2)
    manager = ControlPlaneManager()
    manager.register_engine(engine, model="m")
    async with manager:
        with pytest.raises(InternalError, match="broke"):
            await manager.get_embeddings(["wait", "fail", "x"])
        assert not engine.running
        assert manager.num_waiting == 0


async def test_a_model_that_is_not_there() -> None:
    manager = ControlPlaneManager()
    manager.register_engine(FakeEngine(), model="m")
    with pytest.raises(NotFoundError, match="no engine serves the model 'n'"):
        await manager.get_embeddings("x", model="n")


async def test_instances_take_what_they_are_meant_for() -> None:
    kinds = ExecutionInstanceType
    manager, engines = make_manager(v=kinds.EMBEDDING, d=kinds.DECODING, p=kinds.PREFILLING)
    async with manager:
        await manager.get_embeddings(TEXTS, model="m")
        await asyncio.gather(*(manager.execute_request(prompt=text, max_tokens=1) for text in TEXTS))
        assert len(engines["v"].requests) == 3
        assert all(request.embed is not None for request in engines["v"].requests)
        assert len(engines["d"].requests) + len(engines["p"].requests) == 3


@pytest.mark.parametrize("kind", ["GENERAL", "HYBRID", "LLM_EMBEDDING"])
async def test_other_instances_take_both(kind: str) -> None:
    manager, engines = make_manager(e=ExecutionInstanceType[kind])
    async with manager:
        await manager.get_embeddings("x")
        await manager.execute_request(prompt="x", max_tokens=1)
        assert len(engines["e"].requests) == 2


async def test_what_no_instance_is_meant_for_is_refused_at_once() -> None:
    for kind, request, problem in (
        (ExecutionInstanceType.EMBEDDING, Request(prompt="x"), "make vectors, no text"),
        (ExecutionInstanceType.DECODING, Request(prompt="x", embed=EmbedParams()), "make text, no vectors"),
    ):
        manager, _ = make_manager(e=kind)
        async with manager:
            with pytest.raises(InvalidArgumentError, match=problem) as error:
                await manager.execute_request(request)
        assert error.value.context["field"] == "model"


async def test_who_names_no_model_gets_one_that_can_answer() -> None:
    encoder, decoder = Encoder(engine_id="v"), FakeEngine(engine_id="d", max_batch_size=8)
    manager = ControlPlaneManager(routing_policy="round_robin")
    manager.register_engine(encoder, model="vectors")
    manager.register_engine(decoder, model="texts")
    async with manager:
        await asyncio.gather(*(manager.execute_request(prompt="x", max_tokens=1) for _ in range(4)))
        assert (len(encoder.requests), len(decoder.requests)) == (0, 4)
        # The engine itself says why it can't.
        await manager.execute_request(prompt="x", model="vectors", max_tokens=1)
        assert len(encoder.requests) == 1
