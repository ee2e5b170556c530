"""`NativePackedLinear`: a weight as the CPU kernels read it."""

from __future__ import annotations

import torch
from torch import Tensor

from sagellm_backend import _native
from sagellm_backend.ops import PackedLinear

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_LANES = 16


class NativePackedLinear(PackedLinear):
    """A weight in groups of sixteen output columns, `[ceil(N / 16), K, 16]`, in its own dtype."""

    __slots__ = ("native", "packed")

    def __init__(self, weight: Tensor, isa: int) -> None:
        n, k = weight.shape
        super().__init__(k, n, weight.dtype, -(-n // _LANES) * _LANES * k * weight.itemsize)
        self.packed = torch.empty(-(-n // _LANES), k, _LANES, dtype=weight.dtype)
        form = TYPES[weight.dtype]
        self.native = _native.Weight(self.packed.data_ptr(), n=n, k=k, format=form)
        _native.pack(
            isa, weight.data_ptr(), self.packed.data_ptr(), weight.stride(0), n, k, form, torch.get_num_threads()
        )
