"""Prefill and decode on instances of their own."""

from __future__ import annotations

import asyncio
from typing import Any

import virtual_loop
from sagellm_control_plane import (
    ControlPlaneManager,
    EngineConfig,
    ExecutionInstanceType,
    PDSeparationConfig,
)
from sagellm_control_plane.config import ControlPlaneConfig
from sagellm_core.config import LLMEngineConfig
from sagellm_protocol import FinishReason, Request, Response
from sim_engine import SimEngine, answer_of
from sim_world import LIFECYCLE, make_request

LONG = "a long prompt that is worth a hand-over " * 25  # 250 tokens, which fit into the cache


class Separated:
    """One prefill and one decode engine, that hand over without fail unless told otherwise."""

    def __init__(self, *, fails: str = "") -> None:
        self.fails = fails
        self.tasks: list[asyncio.Task[Response]] = []
        config = ControlPlaneConfig(
            lifecycle=LIFECYCLE,
            pd=PDSeparationConfig(prefilling_threshold_input_tokens=50, hand_over_s_per_token=0.0),
        )
        self.manager = ControlPlaneManager(config=config, make_engine=self._make)
        for name, kind in (("p", ExecutionInstanceType.PREFILLING), ("d", ExecutionInstanceType.DECODING)):
            self.manager.register_config(EngineConfig(model="sim", engine_id=name), instance_type=kind)

    def _make(self, config: LLMEngineConfig) -> SimEngine:
        engine = SimEngine(str(config.engine_id), places=8)
        engine._rng.random = lambda: 0.0 if self.fails == engine.engine_id else 1.0  # type: ignore[method-assign]
        return engine

    def engine(self, name: str) -> SimEngine:
        client = self.manager._pool.get(name).client
        assert isinstance(client, SimEngine)
        return client

    async def busy(self) -> None:
        """The decode engine has answers under way, which a long prompt would hold up."""
        for number in range(4):
            request = make_request(1000 + number, prompt=f"short {number}", max_tokens=60)
            self.tasks.append(asyncio.ensure_future(self.manager.execute_request(request)))
        await asyncio.sleep(0.1)

    async def ask(self, **fields: Any) -> Any:
        request = make_request(1, prompt=LONG, seed=4, max_tokens=20, **fields)
        response = await self.manager.execute_request(request)
        assert response.output_tokens == answer_of(request, 4)[0][0]
        return self.manager.explain("r1").to_dict()["stays"]


def run(main: Any) -> None:
    virtual_loop.run(main)


def test_a_long_prompt_is_computed_by_one_and_answered_by_the_other() -> None:
    async def main() -> None:
        house = Separated()
        async with house.manager:
            await house.busy()
            stays = await house.ask()
            assert [(stay["engine_id"], stay["prefilled_by"]) for stay in stays] == [("d", "p")]
            assert stays[0]["hand_over_s"] > 0
            assert house.engine("p").cached.keys() & house.engine("d").cached.keys()

    run(main)


def test_a_short_prompt_stays_where_it_is_answered() -> None:
    async def main() -> None:
        house = Separated()
        async with house.manager:
            response = await house.manager.execute_request(Request(request_id="s", prompt="short", max_tokens=5))
            assert response.engine_id == "d"
            assert house.manager.explain("s").to_dict()["stays"][0]["prefilled_by"] is None

    run(main)


def test_what_is_cached_already_needs_no_hand_over() -> None:
    async def main() -> None:
        house = Separated()
        async with house.manager:
            await house.busy()
            assert (await house.ask())[0]["prefilled_by"] == "p"
            await asyncio.sleep(1)
            assert (await house.ask())[0]["prefilled_by"] is None

    run(main)


def test_a_slow_hand_over_is_not_the_last() -> None:
    async def main() -> None:
        house = Separated()
        async with house.manager:
            await house.busy()
            phases = house.manager._dispatcher._phases
            assert phases is not None
            phases.measured(100, 100.0)
            whereabouts = []
            for number in range(400):
                prompt = f"{number} {LONG}"[: len(LONG)]
                response = await house.manager.execute_request(make_request(number, prompt=prompt, max_tokens=20))
                assert response.error is None
                whereabouts.append(house.manager.explain(f"r{number}").to_dict()["stays"][0]["prefilled_by"])
                if whereabouts[-1] is not None:
                    break
            assert whereabouts[0] is None
            assert whereabouts[-1] == "p"

    run(main)


def test_a_hand_over_that_fails_is_made_up_for_on_either_side() -> None:
    for side in ("p", "d"):

        async def main(side: str = side) -> None:
            house = Separated(fails=side)
            async with house.manager:
                await house.busy()
                stays = await house.ask()
                assert [(stay["engine_id"], stay["prefilled_by"]) for stay in stays] == [("d", "p")]
                assert stays[0]["hand_over_s"] is None

        run(main)


def test_a_prefill_engine_that_dies_costs_nothing_but_time() -> None:
    async def main() -> None:
        house = Separated()
        async with house.manager:
            await house.busy()
            asking = asyncio.ensure_future(house.ask())
            await asyncio.sleep(0.05)
            assert house.engine("p").requests
            house.engine("p").die()
            stays = await asking
            assert [stay["engine_id"] for stay in stays] == ["d"]
            await asyncio.sleep(5)
            assert not house.manager._pool.fleet.num_requests.any()

    run(main)


async def test_real_engines_give_the_tokens_of_one() -> None:
    """The built-in model, both halves in this process."""
    options = {"max_model_len": 512, "num_kv_blocks": 64, "num_threads": 1}
    config = ControlPlaneConfig(pd=PDSeparationConfig(prefilling_threshold_input_tokens=8, hand_over_s_per_token=0.0))
    manager = ControlPlaneManager(config=config)
    kinds = {"p": ExecutionInstanceType.PREFILLING, "d": ExecutionInstanceType.DECODING}
    for name, kind in kinds.items():
        manager.register_config(EngineConfig(model="builtin", engine_id=name, options=options), instance_type=kind)
    alone = ControlPlaneManager(engine_configs=[EngineConfig(model="builtin", options=options)])
    request = Request(request_id="r", prompt="What is a control plane, and why would one want it? " * 4, max_tokens=40)
    async with manager, alone:
        # As if the decode engine were busy for a long time: the rule has to send the prompt away.
        manager._pool.fleet.queued_tokens[manager._pool.fleet.row_of("d")] += 10**9
        response = await manager.execute_request(request)
        expected = await alone.execute_request(request)
        stay = manager.explain("r").to_dict()["stays"][0]
        assert (stay["engine_id"], stay["prefilled_by"]) == ("d", "p")
        assert stay["hand_over_s"] is not None
        assert response.usage.cached_tokens > 0
    assert response.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    assert response.output_tokens == expected.output_tokens
