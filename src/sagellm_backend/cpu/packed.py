"""`NativePackedLinear`: a weight as the CPU kernels read it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sagellm_backend import _native
from sagellm_backend.cpu.memory import WEIGHTS
from sagellm_backend.ops import PackedLinear
from sagellm_backend.quantized import QuantizedTensor, format_name

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LAYOUT = "cpu-1"
"""Changes whenever the kernels want packed weights in another order."""
_INT = 3
_LANES = 16
_LONGEST_GROUP = 65536  # 255 * 127 times as much is below 2^31


class NativePackedLinear(PackedLinear):
    """A weight in groups of sixteen output columns; csrc/cpu/kernels.h has the layouts.

    `buffers` are its memory by name ("data", and "scales" and "mins" of whole numbers), `native` their addresses with
    the shape.
    """

    __slots__ = ("bits", "buffers", "group_size", "native")

    def __init__(
        self,
        buffers: dict[str, Tensor],
        dtype: torch.dtype,
        in_features: int,
        out_features: int,
        bits: int = 0,
        group_size: int = 0,
    ) -> None:
        nbytes = sum(buffer.nbytes for buffer in buffers.values())
        grouped = group_size if group_size < in_features else 0
        name = format_name(dtype, bits, grouped, minima="mins" in buffers)
        super().__init__(in_features, out_features, dtype, nbytes, name)
        self.buffers = buffers
        self.bits = bits
        self.group_size = group_size
        addresses = [buffers[name].data_ptr() if name in buffers else 0 for name in ("data", "scales", "mins")]
        self.native = _native.Weight(
            *addresses, n=out_features, k=in_features, format=TYPES.get(dtype, _INT), bits=bits, group=group_size
        )

    def to_buffers(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """See `PackedLinear.to_buffers`."""
        description = {
            "dtype": str(self.dtype).removeprefix("torch."),
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bits": self.bits,
            "group_size": self.group_size,
        }
        return self.buffers, description


def restore(buffers: dict[str, Tensor], description: dict[str, Any]) -> NativePackedLinear:
    """What `to_buffers` was asked for."""
    return NativePackedLinear(
        buffers,
        getattr(torch, description["dtype"]),
        description["in_features"],
        description["out_features"],
        description["bits"],
        description["group_size"],
    )


def pack(weight: Tensor, isa: int) -> NativePackedLinear:
    """A float matrix [N, K], rows contiguous, in its own dtype."""
    n, k = weight.shape
    data = WEIGHTS.empty((-(-n // _LANES), -(-k // _LANES) * _LANES, _LANES), weight.dtype)
    packed = NativePackedLinear({"data": data}, weight.dtype, k, n)
    _native.pack(
        isa, weight.data_ptr(), data.data_ptr(), weight.stride(0), n, k, TYPES[weight.dtype], torch.get_num_threads()
    )
    return packed


def is_packable(k: int, bits: int, group_size: int) -> bool:
    """Whether the kernels read such rows: groups of whole lines of codes, and sums of products that fit 32 bits."""
    if group_size >= k:
        return k <= _LONGEST_GROUP
    return group_size % (32 if bits == 5 else 16) == 0 and group_size <= _LONGEST_GROUP


def pack_quantized(weight: QuantizedTensor, isa: int) -> NativePackedLinear:
    """A matrix in whole numbers."""
    packed = _empty(weight.shape, weight.bits, weight.group_size, minima=weight.mins is not None)
    _put_by_columns(weight.scales, packed.buffers["scales"])
    if weight.mins is not None:
        _put_by_columns(weight.mins, packed.buffers["mins"])
    codes = weight.codes if weight.codes.stride(1) == 1 else weight.codes.contiguous()
    _native.pack_int(isa, codes.data_ptr(), codes.stride(0), packed.native, torch.get_num_threads())
    return packed


def quantize(weight: Tensor, bits: int, group_size: int, isa: int) -> NativePackedLinear:
    """A float matrix [N, K], rows contiguous, rounded symmetrically and packed in one go."""
    packed = _empty((weight.shape[0], weight.shape[1]), bits, group_size, minima=False)
    packed.buffers["scales"][-1].zero_()  # the last block may have missing rows
    _native.quantize(
        isa, weight.data_ptr(), weight.stride(0), TYPES[weight.dtype], packed.native, torch.get_num_threads()
    )
    return packed


def _empty(shape: tuple[int, int], bits: int, group_size: int, *, minima: bool) -> NativePackedLinear:
    """Memory for a matrix [N, K] in whole numbers."""
    n, k = shape
    blocks, groups = -(-n // _LANES), -(-k // group_size)
    padded_k = groups * group_size if groups > 1 else -(-k // 32) * 32
    buffers = {"data": WEIGHTS.empty((blocks * padded_k * _LANES * bits // 8,), torch.uint8)}
    for name in ("scales", "mins") if minima else ("scales",):
        buffers[name] = WEIGHTS.empty((blocks, groups, _LANES), torch.float16)
    return NativePackedLinear(buffers, torch.uint8, k, n, bits, group_size)


def _put_by_columns(scales: Tensor, columns: Tensor) -> None:
    """[N, G] -> [ceil(N / 16), G, 16], zeros behind the end."""
    num_rows, num_groups = scales.shape
    padded = torch.nn.functional.pad(scales, (0, 0, 0, -num_rows % _LANES))
    columns.copy_(padded.view(-1, _LANES, num_groups).transpose(1, 2))
