"""`Topology`: a world of workers as a grid of data, pipeline and tensor parallel coordinates."""

from __future__ import annotations

from dataclasses import dataclass

from sagellm_protocol import CommGroupError, InvalidArgumentError


@dataclass(frozen=True, slots=True)
class Coordinates:
    """A rank's place: which replica, which stage of the model, which shard of the stage."""

    dp: int
    pp: int
    tp: int


@dataclass(frozen=True, slots=True)
class Topology:
    """Sizes of the grid. Tensor parallel ranks are neighbours, because they talk the most.

    rank = (dp * pp_size + pp) * tp_size + tp
    """

    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1

    def __post_init__(self) -> None:
        for name in ("tp_size", "pp_size", "dp_size"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} must be at least 1, got {getattr(self, name)}", field=name)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp_size * self.pp_size * self.dp_size

    def coordinates(self, rank: int) -> Coordinates:
        """Where a rank stands."""
        if not 0 <= rank < self.world_size:
            raise CommGroupError(f"rank must be 0 to {self.world_size - 1} in {self}, got {rank}", rank=rank)
        stage, tp = divmod(rank, self.tp_size)
        dp, pp = divmod(stage, self.pp_size)
        return Coordinates(dp, pp, tp)

    def rank(self, dp: int = 0, pp: int = 0, tp: int = 0) -> int:
        """The rank at a place of the grid."""
        for name, value, size in (("dp", dp, self.dp_size), ("pp", pp, self.pp_size), ("tp", tp, self.tp_size)):
            if not 0 <= value < size:
                raise CommGroupError(f"{name} must be 0 to {size - 1} in {self}, got {value}")
        return (dp * self.pp_size + pp) * self.tp_size + tp

    def tp_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that share a stage of one replica, in order of their shards."""
        at = self.coordinates(rank)
        return tuple(self.rank(at.dp, at.pp, tp) for tp in range(self.tp_size))

    def pp_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that hand activations to each other, in order of the stages."""
        at = self.coordinates(rank)
        return tuple(self.rank(at.dp, pp, at.tp) for pp in range(self.pp_size))

    def dp_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that hold the same weights."""
        at = self.coordinates(rank)
        return tuple(self.rank(dp, at.pp, at.tp) for dp in range(self.dp_size))
