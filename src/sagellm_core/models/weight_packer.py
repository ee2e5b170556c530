"""From a checkpoint's parameters to packed weights, counting their bytes on the way; what all builders of models do."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from sagellm_backend.quantized import QuantizedTensor
from sagellm_core.layers.linear import Linear

if TYPE_CHECKING:
    from torch import Tensor

    from sagellm_backend import OpTable, PackedLinear

    from .loader import ParameterReader
    from .packed_cache import PackedCache

__all__ = ["WeightPacker"]


class WeightPacker:
    """Reads parameters by key and brings each into the form that the ops want."""

    def __init__(self, reader: ParameterReader, ops: OpTable, cache: PackedCache | None = None) -> None:
        self.weight_bytes = 0
        self.weight_formats: Counter[str] = Counter()
        self._reader = reader
        self._ops = ops
        self._cache = cache

    def linear(self, key: str) -> Linear:
        """The linear layer `key`, with its bias where it has one."""
        return Linear(self._ops, self.packed(f"{key}.weight"), self._reader.bias(f"{key}.bias"))

    def packed(self, key: str) -> PackedLinear:
        """The matrix of a linear layer, quantized where that was asked for."""
        packed = None if self._cache is None else self._cache.get(key)
        if packed is None:
            packed = self._pack(self._reader.weight(key))
            if self._cache is not None:
                self._cache.add(key, packed)
        self._reader.finish(key)
        return self.count(packed)

    def exact(self, key: str) -> PackedLinear:
        """As `packed`, but never rounded."""
        packed = self._ops.pack_linear(self._reader.table(key))
        self._reader.finish(key)
        return self.count(packed)

    def table(self, key: str) -> Tensor:
        """A matrix whose rows are looked up."""
        table = self._reader.table(key)
        self._reader.finish(key)
        self.weight_bytes += table.nbytes
        return table

    def norm_weight(self, key: str) -> Tensor:
        """A vector of a norm."""
        weight = self._reader.norm(key)
        self.weight_bytes += weight.nbytes
        return weight

    def count(self, packed: PackedLinear) -> PackedLinear:
        """`packed`, counted."""
        self.weight_bytes += packed.nbytes
        self.weight_formats[packed.format] += 1
        return packed

    def _pack(self, weight: Tensor | QuantizedTensor) -> PackedLinear:
        method = self._reader.method
        if method is None or isinstance(weight, QuantizedTensor):
            return self._ops.pack_linear(weight)
        return method.pack(self._ops, weight)
