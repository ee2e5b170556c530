"""The op table: which implementation of each op a backend uses, chosen once and open to inspection.

An op is a function with one written contract (`sagellm_backend.reference` holds the contracts and a plain torch
implementation of each). A backend overrides ops by name: it registers an implementation for its kind, with a
priority and the processor features it requires, and `OpTable.build` picks the best for the machine at hand.

    @register_op("rms_norm", kind="cpu", priority=10, requires=("avx2",), source="native[avx2]")
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    ops = OpTable.build("cpu", features={"avx2"})
    ops.rms_norm(x, weight, 1e-6)
    ops.explain()   # {"rms_norm": "native[avx2]", "paged_attention": "reference", ...}
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from sagellm_protocol import InternalError, InvalidArgumentError, UnsupportedError

if TYPE_CHECKING:
    from sagellm_backend.attention import AttentionMetadata
    from sagellm_backend.quantized import QuantizedTensor

Approximation = Literal["none", "tanh"]
_Function = TypeVar("_Function", bound=Callable[..., Any])

# An implementation registered for this kind serves every backend.
ANY_KIND = "any"


class PackedLinear:
    """A weight in the form that one implementation of `linear` reads fastest; opaque to everybody else.

    `in_features` is K, `out_features` N, `dtype` the stored dtype (uint8 for whole numbers), `nbytes` the memory the
    packed form takes, `format` its name for people: "bf16", "int8", "int4/g32+min" (see `quantized.format_name`).
    """

    __slots__ = ("dtype", "format", "in_features", "nbytes", "out_features")

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, nbytes: int, format: str) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.nbytes = nbytes
        self.format = format

    def to_buffers(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Its memory by name, and what else `BackendProvider.restore_packed` needs to make it again (plain JSON)."""
        raise UnsupportedError(f"{type(self).__name__} cannot be stored")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(in={self.in_features}, out={self.out_features}, format={self.format})"


@dataclass(frozen=True, slots=True)
class OpImplementation:
    """One implementation of one op.

    `composite` functions take the finished table as their first argument, because they are written in terms of
    other ops (experts call `linear`) and must follow the table's choice for those.
    """

    name: str
    kind: str
    source: str
    function: Callable[..., Any]
    priority: int = 0
    requires: tuple[str, ...] = ()
    composite: bool = False


class OpRegistry:
    """The implementations known in this process. Filled at import by the modules that hold the ops."""

    def __init__(self) -> None:
        self._implementations: dict[str, list[OpImplementation]] = {}

    def register(
        self,
        name: str,
        *,
        kind: str,
        priority: int = 10,
        requires: Sequence[str] = (),
        source: str | None = None,
        composite: bool = False,
    ) -> Callable[[_Function], _Function]:
        """Decorator: `function` implements op `name` on backends of `kind` that have all features `requires`.

        The highest priority wins; among equals the later registration. `source` names the implementation in
        `explain()` (default: the module that defines the function). Registering the same source of the same op
        and kind again replaces it, so that reloading a module is harmless.
        """

        def add(function: _Function) -> _Function:
            label = source or function.__module__
            known = self._implementations.setdefault(name, [])
            known[:] = [item for item in known if (item.kind, item.source) != (kind, label)]
            known.append(OpImplementation(name, kind, label, function, priority, tuple(requires), composite))
            return function

        return add

    def names(self) -> list[str]:
        """Every op that has at least one implementation, sorted."""
        return sorted(self._implementations)

    def implementations(self, name: str, kind: str | None = None) -> list[OpImplementation]:
        """Implementations of an op, best first, restricted to those that serve `kind` if one is given."""
        found = self._implementations.get(name, [])
        serving = [item for item in found if kind is None or item.kind in (kind, ANY_KIND)]
        newest_first = serving[::-1]  # sorted is stable: among equal priorities the later registration stays first
        return sorted(newest_first, key=lambda item: -item.priority)


OPS = OpRegistry()
"""The registry that providers build their tables from."""

register_op = OPS.register


class LinearOp(Protocol):
    """See `reference.linear`."""

    def __call__(self, x: Tensor, packed: PackedLinear, bias: Tensor | None = None) -> Tensor: ...


class LayerNormOp(Protocol):
    """See `reference.layer_norm`."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor: ...


class RotaryOp(Protocol):
    """See `reference.rotary`."""

    def __call__(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool = False
    ) -> tuple[Tensor, Tensor]: ...


class GeluOp(Protocol):
    """See `reference.gelu` and `reference.gelu_and_mul`."""

    def __call__(self, x: Tensor, approximate: Approximation = "none") -> Tensor: ...


class PagedAttentionOp(Protocol):
    """See `reference.paged_attention`."""

    def __call__(
        self,
        q: Tensor,
        kv_cache: Tensor,
        meta: AttentionMetadata,
        scale: float,
        *,
        sliding_window: int = 0,
        soft_cap: float = 0.0,
    ) -> Tensor: ...


class EncoderAttentionOp(Protocol):
    """See `reference.encoder_attention`."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], scale: float) -> Tensor: ...


class MoeExpertsOp(Protocol):
    """See `reference.moe_experts`."""

    def __call__(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        gate_up: Sequence[PackedLinear],
        down: Sequence[PackedLinear],
        act: str = "silu",
    ) -> Tensor: ...


class OpTable:
    """The chosen implementation of every op, as attributes. Contracts: `sagellm_backend.reference`.

    Built once by a provider and never changed. Ops beyond the fixed vocabulary below (a third party's) are
    reached with `get(name)`.
    """

    pack_linear: Callable[[Tensor | QuantizedTensor], PackedLinear]
    quantize_linear: Callable[[Tensor, int, int], PackedLinear]
    linear: LinearOp
    embedding: Callable[[Tensor, Tensor | PackedLinear, torch.dtype], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    layer_norm: LayerNormOp
    rotary: RotaryOp
    silu_and_mul: Callable[[Tensor], Tensor]
    gelu_and_mul: GeluOp
    gelu: GeluOp
    soft_cap: Callable[[Tensor, float], Tensor]
    reshape_and_cache: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    paged_attention: PagedAttentionOp
    encoder_attention: EncoderAttentionOp
    copy_blocks: Callable[[Tensor, Tensor], None]
    moe_experts: MoeExpertsOp
    sample_tokens: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, kind: str, chosen: Mapping[str, OpImplementation]) -> None:
        self.kind = kind
        self._chosen = dict(chosen)
        missing = sorted(name for name in OP_NAMES if name not in chosen)
        if missing:
            raise InternalError(f"no implementation of {', '.join(missing)} for backend kind {kind!r}")
        for name, item in self._chosen.items():
            setattr(self, name, functools.partial(item.function, self) if item.composite else item.function)

    @classmethod
    def build(
        cls,
        kind: str,
        *,
        features: Collection[str] = (),
        prefer: Mapping[str, str] | None = None,
        reference_only: bool = False,
        registry: OpRegistry = OPS,
    ) -> OpTable:
        """Choose for backend `kind` on a device with `features`: highest priority whose requirements are met.

        `prefer` forces implementations by source, for tests and comparisons: `{"linear": "reference"}`;
        `reference_only` takes the torch reference for every op.
        """
        unknown = sorted(set(prefer or {}) - set(registry.names()))
        if unknown:
            raise InvalidArgumentError(
                f"there is no op {unknown[0]!r}; ops: {', '.join(registry.names())}", field="prefer"
            )
        chosen = {}
        for name in registry.names():
            usable = [item for item in registry.implementations(name, kind) if set(item.requires) <= set(features)]
            if reference_only:
                usable = [item for item in usable if item.source == "reference"]
            wanted = (prefer or {}).get(name)
            if wanted is not None:
                usable = _only_source(name, wanted, usable)
            if usable:
                chosen[name] = usable[0]
        return cls(kind, chosen)

    def get(self, name: str) -> Callable[..., Any]:
        """The chosen implementation of any op by name."""
        if name not in self._chosen:
            raise UnsupportedError(
                f"backend {self.kind!r} has no op {name!r}; it has {', '.join(sorted(self._chosen))}", op=name
            )
        function: Callable[..., Any] = getattr(self, name)
        return function

    def explain(self) -> dict[str, str]:
        """Source of the chosen implementation of each op, for people and logs."""
        return {name: item.source for name, item in sorted(self._chosen.items())}


OP_NAMES = tuple(OpTable.__annotations__)
"""The fixed vocabulary: every backend has these ops."""


def _only_source(name: str, source: str, usable: list[OpImplementation]) -> list[OpImplementation]:
    matching = [item for item in usable if item.source == source]
    if not matching:
        known = ", ".join(item.source for item in usable) or "none"
        raise InvalidArgumentError(f"op {name!r} has no usable implementation {source!r}; usable: {known}", field=name)
    return matching
