"""The grid of ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_comm import Coordinates, Topology
from sagellm_protocol import CommGroupError, InvalidArgumentError

topologies = st.builds(Topology, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


@given(topologies)
def test_ranks_and_places_are_the_same_thing(topology: Topology) -> None:
    for rank in range(topology.world_size):
        at = topology.coordinates(rank)
        assert topology.rank(at.dp, at.pp, at.tp) == rank


@given(topologies)
def test_each_kind_of_group_divides_the_world(topology: Topology) -> None:
    for group in (topology.tp_group, topology.pp_group, topology.dp_group):
        groups = {group(rank) for rank in range(topology.world_size)}
        assert sorted(rank for ranks in groups for rank in ranks) == list(range(topology.world_size))
        assert all(rank in group(rank) for rank in range(topology.world_size))


def test_tensor_parallel_ranks_are_neighbours() -> None:
    topology = Topology(tp_size=2, pp_size=3, dp_size=2)
    assert topology.world_size == 12
    assert topology.coordinates(9) == Coordinates(dp=1, pp=1, tp=1)
    assert topology.tp_group(9) == (8, 9)
    assert topology.pp_group(9) == (7, 9, 11)
    assert topology.dp_group(9) == (3, 9)


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="pp_size must be at least 1, got 0"):
        Topology(pp_size=0)
    with pytest.raises(CommGroupError, match="rank must be 0 to 1"):
        Topology(tp_size=2).coordinates(2)
    with pytest.raises(CommGroupError, match="tp must be 0 to 1"):
        Topology(tp_size=2).rank(tp=2)
