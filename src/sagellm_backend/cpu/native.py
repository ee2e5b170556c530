"""The compiled CPU kernels as ops: the one file that passes raw pointers.

Importing it registers the ops of the fastest instruction set this processor has (ImportError where the
installation was built without a compiler). Everything is checked here, once a call: dtype, shape, strides.
What a kernel does not cover (a head size that is no multiple of 16, half precision) goes to the reference op.

Each output element is one chain of fused multiply-adds in one order, whatever the batch, the threads or the
instruction set, so results are the same to the bit; see csrc/cpu.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sagellm_backend import _native, reference
from sagellm_backend.attention import AttentionMetadata
from sagellm_backend.cpu.packed import TYPES, NativePackedLinear, is_packable, pack, pack_quantized, quantize
from sagellm_backend.cpu.paged_cache import kernel_cache
from sagellm_backend.cpu.step_program import recordable
from sagellm_backend.ops import OPS, Approximation, OpRegistry, PackedLinear
from sagellm_backend.quantized import QuantizedTensor

SILU = 0
GELU: dict[Approximation, int] = {"tanh": 1, "none": 2}
PRIORITY = 20


class NativeOps:
    """The ops of one instruction set; `isa` is an index of `supported_isas()`."""

    def __init__(self, isa: int) -> None:
        self.isa = isa
        self.name = _native.supported_isas()[isa]

    def register(self, registry: OpRegistry, *, priority: int = PRIORITY) -> None:
        """Offer these ops to CPU backends."""
        for op in (
            "pack_linear",
            "quantize_linear",
            "linear",
            "embedding",
            "rms_norm",
            "add_rms_norm",
            "rotary",
            "layer_norm",
            "silu_and_mul",
            "gelu_and_mul",
            "gelu",
            "soft_cap",
            "reshape_and_cache",
            "paged_attention",
        ):
            register = registry.register(op, kind="cpu", priority=priority, source=f"native[{self.name}]")
            register(recordable(op, getattr(self, op)))
        # No part of a recorded step.
        registry.register("sample_tokens", kind="cpu", priority=priority, source=f"native[{self.name}]")(
            self.sample_tokens
        )

    # ---- linear ---------------------------------------------------------------------------------------

    def pack_linear(self, weight: Tensor | QuantizedTensor) -> PackedLinear:
        """See `reference.pack_linear`. The packed form is a copy: the caller may drop its tensor."""
        if isinstance(weight, QuantizedTensor):
            packable = is_packable(weight.shape[1], weight.bits, weight.group_size)
            return pack_quantized(weight, self.isa) if packable else reference.pack_linear(weight)
        if weight.dim() != 2 or weight.dtype not in TYPES or weight.stride(1) != 1:
            return reference.pack_linear(weight)
        return pack(weight, self.isa)

    def quantize_linear(self, weight: Tensor, bits: int, group_size: int) -> PackedLinear:
        """See `reference.quantize_linear`."""
        readable = weight.dim() == 2 and weight.dtype in TYPES and weight.stride(1) == 1
        if not readable or not is_packable(weight.shape[1], bits, group_size):
            return self.pack_linear(QuantizedTensor.round(weight, bits, group_size))
        return quantize(weight, bits, group_size, self.isa)

    def linear(self, x: Tensor, packed: PackedLinear, bias: Tensor | None = None) -> Tensor:
        """See `reference.linear`; the sums are in float32, whatever the weight is stored in."""
        if not isinstance(packed, NativePackedLinear):
            return reference.linear(x, packed, bias)
        if x.dtype is not torch.float32:
            return self.linear(x.float(), packed, bias).to(x.dtype)
        if x.stride(1) != 1:
            x = x.contiguous()
        assert x.dim() == 2, x.shape
        assert x.shape[1] == packed.in_features, (x.shape, packed)
        if bias is not None and (bias.dtype is not torch.float32 or not bias.is_contiguous()):
            bias = bias.float().contiguous()
        m, n = x.shape[0], packed.out_features
        y = torch.empty(m, n)
        _native.linear(
            self.isa,
            x.data_ptr(),
            packed.native,
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            x.stride(0),
            m,
            _num_threads(),
        )
        return y

    def embedding(self, ids: Tensor, table: Tensor | PackedLinear, dtype: torch.dtype) -> Tensor:
        """See `reference.embedding`."""
        if not isinstance(table, NativePackedLinear):
            return reference.embedding(ids, table, dtype)
        ids = ids.contiguous()
        y = torch.empty(ids.shape[0], table.in_features)
        _native.unpack_rows(self.isa, table.native, ids.data_ptr(), y.data_ptr(), ids.shape[0], _num_threads())
        return y.to(dtype)

    # ---- rows by themselves ---------------------------------------------------------------------------

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `reference.rms_norm`."""
        if x.dtype is not torch.float32 or weight.dtype is not torch.float32:
            return reference.rms_norm(x, weight, eps)
        rows = x.reshape(-1, x.shape[-1])
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        y = torch.empty(rows.shape)
        self._norm(rows, None, weight, y, None, eps)
        return y.view(x.shape)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `reference.add_rms_norm`."""
        usable = x.dim() == 2 and x.stride(1) == 1 and residual.is_contiguous()
        if not usable or {x.dtype, residual.dtype, weight.dtype} != {torch.float32}:
            return reference.add_rms_norm(x, residual, weight, eps)
        y, new_residual = torch.empty(x.shape), torch.empty(x.shape)
        self._norm(x, residual, weight, y, new_residual, eps)
        return y, new_residual

    def _norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, y: Tensor, new_residual: Tensor | None, eps: float
    ) -> None:
        assert weight.is_contiguous(), weight.stride()
        assert weight.shape[0] == x.shape[1], (weight.shape, x.shape)
        _native.norm(
            self.isa,
            x.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            y.data_ptr(),
            0 if new_residual is None else new_residual.data_ptr(),
            x.stride(0),
            x.shape[0],
            1,
            x.shape[1],
            eps,
            _num_threads(),
        )

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """See `reference.layer_norm`."""
        vectors = [weight] if bias is None else [weight, bias]
        fit = x.dim() == 2 and x.stride(1) == 1 and all(vector.is_contiguous() for vector in vectors)
        if not fit or {x.dtype, *(vector.dtype for vector in vectors)} != {torch.float32}:
            return reference.layer_norm(x, weight, bias, eps)
        y = torch.empty(x.shape)
        _native.layer_norm(
            self.isa,
            x.data_ptr(),
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            x.stride(0),
            x.shape[0],
            x.shape[1],
            eps,
            _num_threads(),
        )
        return y

    def rotary(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool = False
    ) -> tuple[Tensor, Tensor]:
        """See `reference.rotary`; rotates in place."""
        tables_fit = cos.is_contiguous() and sin.is_contiguous() and cos.dtype is sin.dtype is torch.float32
        if not tables_fit or not _heads_fit(q) or not _heads_fit(k) or not positions.is_contiguous():
            return reference.rotary(q, k, cos, sin, positions, interleaved)
        for x in (q, k):
            _native.rotary(
                self.isa,
                x.data_ptr(),
                cos.data_ptr(),
                sin.data_ptr(),
                positions.data_ptr(),
                x.stride(0),
                x.shape[0],
                x.shape[1],
                x.shape[2],
                cos.shape[1],
                int(interleaved),
                _num_threads(),
            )
        return q, k

    def silu_and_mul(self, x: Tensor) -> Tensor:
        """See `reference.silu_and_mul`."""
        if x.dtype is not torch.float32 or not x.is_contiguous():
            return reference.silu_and_mul(x)
        return self._activate(x, SILU, gated=True)

    def gelu_and_mul(self, x: Tensor, approximate: Approximation = "none") -> Tensor:
        """See `reference.gelu_and_mul`; exact gelu within 1.5e-7 times the input."""
        if x.dtype is not torch.float32 or not x.is_contiguous():
            return reference.gelu_and_mul(x, approximate)
        return self._activate(x, GELU[approximate], gated=True)

    def gelu(self, x: Tensor, approximate: Approximation = "none") -> Tensor:
        """See `reference.gelu`; exact gelu within 1.5e-7 times the input."""
        if x.dim() != 2 or x.dtype is not torch.float32 or not x.is_contiguous():
            return reference.gelu(x, approximate)
        return self._activate(x, GELU[approximate], gated=False)

    def soft_cap(self, x: Tensor, cap: float) -> Tensor:
        """See `reference.soft_cap`; absolute error below 2e-7 times the cap."""
        if x.dim() != 2 or x.dtype is not torch.float32 or not x.is_contiguous():
            return reference.soft_cap(x, cap)
        y = torch.empty(x.shape)
        _native.soft_cap(self.isa, x.data_ptr(), y.data_ptr(), x.shape[0], x.shape[1], cap, _num_threads())
        return y

    def _activate(self, x: Tensor, act: int, *, gated: bool) -> Tensor:
        rows, size = x.shape[0], x.shape[1] // (2 if gated else 1)
        y = torch.empty(rows, size)
        _native.activate(self.isa, x.data_ptr(), y.data_ptr(), x.stride(0), rows, size, act, gated, _num_threads())
        return y

    def sample_tokens(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """See `reference.sample_tokens`; no row is sorted, NaN counts as no logit at all."""
        if logits.dtype is not torch.float32 or logits.stride(1) != 1:
            return reference.sample_tokens(logits, wanted)
        rows, vocab_size = logits.shape
        assert wanted.shape == (rows, 5), wanted.shape
        assert wanted.dtype is torch.float64, wanted.dtype
        assert wanted.is_contiguous(), wanted.stride()
        token_ids = torch.empty(rows, dtype=torch.int64)
        _native.sample(
            self.isa,
            logits.data_ptr(),
            wanted.data_ptr(),
            token_ids.data_ptr(),
            logits.stride(0),
            rows,
            vocab_size,
            _num_threads(),
        )
        return token_ids

    # ---- the paged cache ------------------------------------------------------------------------------

    def reshape_and_cache(self, k: Tensor, v: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """See `reference.reshape_and_cache`; within a block the numbers stand in the order that the kernels read."""
        cache = kernel_cache(kv_cache)
        if cache is None:
            reference.reshape_and_cache(k, v, kv_cache, slot_mapping)
            return
        address, num_blocks, num_kv_heads, head_dim, block_size, kind = cache
        assert k.shape == v.shape == (len(slot_mapping), num_kv_heads, head_dim), (k.shape, v.shape, kv_cache.shape)
        assert slot_mapping.dtype is torch.int64, slot_mapping.dtype
        k, v = _as_heads(k), _as_heads(v)
        _native.write_cache(
            self.isa,
            k.data_ptr(),
            v.data_ptr(),
            address,
            slot_mapping.contiguous().data_ptr(),
            k.stride(0),
            v.stride(0),
            k.shape[0],
            num_kv_heads,
            head_dim,
            block_size,
            num_blocks,
            kind,
            _num_threads(),
        )

    def paged_attention(
        self,
        q: Tensor,
        kv_cache: Tensor,
        meta: AttentionMetadata,
        scale: float,
        *,
        sliding_window: int = 0,
        soft_cap: float = 0.0,
    ) -> Tensor:
        """See `reference.paged_attention`."""
        cache = kernel_cache(kv_cache)
        if cache is None:
            return reference.paged_attention(q, kv_cache, meta, scale, sliding_window=sliding_window, soft_cap=soft_cap)
        address, num_blocks, num_kv_heads, head_dim, block_size, kind = cache
        assert q.shape[1] % num_kv_heads == 0, (q.shape, kv_cache.shape)
        assert q.shape[2] == head_dim, (q.shape, kv_cache.shape)
        block_tables = meta.block_tables.contiguous()
        dtype, q = q.dtype, _as_heads(q)
        out = torch.empty(q.shape)
        _native.attention(
            self.isa,
            q.data_ptr(),
            address,
            out.data_ptr(),
            meta.query_start_loc.data_ptr(),
            meta.context_lens.data_ptr(),
            block_tables.data_ptr(),
            q.stride(0),
            meta.num_requests,
            block_tables.shape[1],
            q.shape[1],
            num_kv_heads,
            head_dim,
            block_size,
            num_blocks,
            scale,
            sliding_window,
            soft_cap,
            kind,
            _num_threads(),
        )
        return out.to(dtype)


def supported_isas() -> list[str]:
    """Instruction sets that the kernels were built for and this processor has, the fastest last."""
    return list(_native.supported_isas())


def _heads_fit(x: Tensor) -> bool:
    """Whether `x [T, H, D]` is float32 with its heads next to each other (a slice of a fused row is fine)."""
    return x.dtype is torch.float32 and x.stride(2) == 1 and x.stride(1) == x.shape[2]


def _as_heads(x: Tensor) -> Tensor:
    """`x`, or a copy of it, as the cache kernels read it."""
    return x if _heads_fit(x) else x.float().contiguous()


def _num_threads() -> int:
    return torch.get_num_threads()


FASTEST = NativeOps(len(supported_isas()) - 1)
# Without fused multiply-add in hardware the kernels are right but slower than torch.
if _native.has_fast_fma(FASTEST.isa):
    FASTEST.register(OPS)
