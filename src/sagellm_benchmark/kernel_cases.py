"""What `sage-llm bench kernels` runs: every op of the op table on the shapes of a model.

A `KernelGroup` binds the operands of one op once, for one op table, and gives a call for each of its cases. Weights and
caches are bound several times over (`_copies`), and successive calls take turns on them, so that they come from memory
as they do in a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sagellm_backend import AttentionMetadata, KVLayout, QuantizedTensor
from sagellm_backend.kv import allocate_kv_cache
from sagellm_benchmark.machine import Arithmetic
from sagellm_protocol import InvalidArgumentError

if TYPE_CHECKING:
    from sagellm_backend import OpTable
    from sagellm_benchmark.shapes import ModelShape

Call = Callable[[int], object]
"""Run the op once; the number says which copy of the operands it is the turn of."""

# (bits, group size or 0 for one scale a row, with minima): our own quantizers' formats and the blocks of GGUF.
_QUANTIZED = {
    "int8": (8, 0, False),
    "int4": (4, 32, False),
    "int4-g64": (4, 64, False),
    "int4-g128": (4, 128, False),
    "int4-asym": (4, 32, True),
    "q8_0": (8, 32, False),
    "q5_k": (5, 32, True),
    "q6_k": (6, 16, False),
}
_FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
FORMATS = (*_FLOATS, *_QUANTIZED)
DEFAULT_FORMATS = ("bf16", "int8", "int4")
DEFAULT_ROWS = (1, 8, 32, 512)

_WORKING_SET = 128 << 20  # bytes to go round: more than a last-level cache holds
_MOST_COPIES = 512
_BLOCK_SIZE = 16
_MOST_SAMPLED_ROWS = 64  # the LM head only computes rows that are sampled
_CONTEXTS = (1024, 4096, 16384)
_CHUNK = 512
_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class KernelCase:
    """One line: the bytes that must be moved and the operations that must be done, whoever does them."""

    op: str
    label: str
    nbytes: int
    flops: int
    arithmetic: Arithmetic = "float32"


@dataclass(frozen=True, slots=True)
class KernelGroup:
    """Cases that share operands. `bind(ops)` makes those and returns one call a case."""

    op: str
    cases: tuple[KernelCase, ...]
    bind: Callable[[OpTable], list[Call]]


def build_groups(shape: ModelShape, formats: Sequence[str], rows: Sequence[int]) -> Iterator[KernelGroup]:
    """All groups for a model's shapes, ordered by op."""
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown:
        raise InvalidArgumentError(f"unknown format {unknown[0]!r}: use {', '.join(FORMATS)}", field="formats")
    for name in formats:
        for matrix, (n, k) in shape.matrices().items():
            yield _linear(matrix, n, k, name, [m for m in rows if matrix != "lm_head" or m <= _MOST_SAMPLED_ROWS])
    yield from _attention(shape)
    yield _encoder_attention(shape)
    yield from _cache_writes(shape, rows)
    yield from _rows_by_themselves(shape, rows)
    yield _embedding(shape, rows)
    yield _experts(shape, rows)
    yield _packing(shape)


# ---- linear -------------------------------------------------------------------------------------------


def make_weight(n: int, k: int, name: str) -> Tensor | QuantizedTensor:
    """A random matrix [N, K] in a format of `FORMATS`."""
    if name in _FLOATS:
        return (torch.randn(n, k) * 0.02).to(_FLOATS[name])
    bits, group, minima = _QUANTIZED[name]
    group = group or k
    scales = (torch.rand(n, -(-k // group)) * 0.01 + 0.001).half()
    codes = torch.randint(1, 1 << bits, (n, k), dtype=torch.uint8)
    return QuantizedTensor(codes, scales, scales * 8 if minima else None, bits, group)


def stored_bytes(n: int, k: int, name: str) -> int:
    """Bytes of such a matrix when its codes lie next to each other."""
    if name in _FLOATS:
        return n * k * _FLOATS[name].itemsize
    bits, group, minima = _QUANTIZED[name]
    groups = -(-k // (group or k))
    return n * k * bits // 8 + 2 * n * groups * (2 if minima else 1)


def _linear(matrix: str, n: int, k: int, name: str, rows: Sequence[int]) -> KernelGroup:
    nbytes = stored_bytes(n, k, name)
    arithmetic: Arithmetic = "int8" if name in _QUANTIZED else "bfloat16" if name == "bf16" else "float32"

    def bind(ops: OpTable) -> list[Call]:
        weight = make_weight(n, k, name)
        packed = [ops.pack_linear(_clone(weight)) for _ in range(_copies(nbytes))]

        def call(m: int) -> Call:
            x = torch.randn(m, k)
            return lambda number: ops.linear(x, packed[number % len(packed)])

        return [call(m) for m in rows]

    cases = [
        KernelCase("linear", f"{matrix} {n}x{k} {name}, {m} rows", nbytes + 4 * m * (n + k), 2 * m * n * k, arithmetic)
        for m in rows
    ]
    return KernelGroup("linear", tuple(cases), bind)


def _clone(weight: Tensor | QuantizedTensor) -> Tensor | QuantizedTensor:
    """In memory of its own, also where packing keeps the tensor."""
    return weight.clone() if isinstance(weight, Tensor) else weight.map_rows(torch.clone)


def _copies(nbytes: int) -> int:
    return max(1, min(_MOST_COPIES, _WORKING_SET // nbytes))


def _packing(shape: ModelShape) -> KernelGroup:
    n, k = shape.matrices()["gate_up"]
    cases, names = [], ("bf16", "int8", "int4")
    for name in names:
        nbytes = 2 * stored_bytes(n, k, name)
        cases.append(KernelCase("pack_linear", f"{n}x{k} {name}", nbytes, 0))

    def bind(ops: OpTable) -> list[Call]:
        weights = [make_weight(n, k, name) for name in names]
        return [lambda number, weight=weight: ops.pack_linear(weight) for weight in weights]  # type: ignore[misc]

    return KernelGroup("pack_linear", tuple(cases), bind)


def _experts(shape: ModelShape, rows: Sequence[int]) -> KernelGroup:
    """Two of eight experts a token, in bf16."""
    hidden, inner, experts, chosen = shape.hidden_size, shape.intermediate_size // 4, 8, 2
    matrix_bytes = 2 * 3 * inner * hidden

    def bind(ops: OpTable) -> list[Call]:
        gate_up = [ops.pack_linear(make_weight(2 * inner, hidden, "bf16")) for _ in range(experts)]
        down = [ops.pack_linear(make_weight(hidden, inner, "bf16")) for _ in range(experts)]

        def call(m: int) -> Call:
            x, weights = torch.randn(m, hidden), torch.full((m, chosen), 1 / chosen)
            ids = torch.stack([torch.randperm(experts)[:chosen] for _ in range(m)])
            return lambda number: ops.moe_experts(x, ids, weights, gate_up, down)

        return [call(m) for m in rows]

    cases = [
        KernelCase(
            "moe_experts",
            f"{chosen} of {experts} of {inner}, bf16, {m} rows",
            min(experts, m * chosen) * matrix_bytes,
            2 * m * chosen * 3 * inner * hidden,
            "bfloat16",
        )
        for m in rows
    ]
    return KernelGroup("moe_experts", tuple(cases), bind)


# ---- the paged cache ----------------------------------------------------------------------------------


def _attention(shape: ModelShape) -> Iterator[KernelGroup]:
    """Decodes of one and of many requests, and a chunk of a prompt at the end of contexts of several lengths."""
    for requests, context in [*((1, context) for context in _CONTEXTS), (8, 1024), (32, 1024)]:
        yield _attend(shape, f"decode, {requests} x {context} tokens", [1] * requests, context)
    for context in (_CHUNK, 2048, 8192):
        yield _attend(shape, f"prefill, {_CHUNK} tokens up to {context}", [_CHUNK], context)


def _attend(shape: ModelShape, label: str, query_lens: list[int], context: int) -> KernelGroup:
    requests, tokens = len(query_lens), sum(query_lens)
    width = -(-context // _BLOCK_SIZE)
    layer = KVLayout(1, shape.num_kv_heads, shape.head_dim, _BLOCK_SIZE, torch.bfloat16)
    kv_bytes = requests * width * layer.bytes_per_block
    scores = sum(context - query_len + place + 1 for query_len in query_lens for place in range(query_len))

    def bind(ops: OpTable) -> list[Call]:
        caches = [_random_cache(layer, requests * width) for _ in range(_copies(kv_bytes))]
        q = torch.randn(tokens, shape.num_heads, shape.head_dim)
        meta = AttentionMetadata.build(
            query_lens=query_lens,
            context_lens=[context] * requests,
            block_tables=[list(range(r * width, (r + 1) * width)) for r in range(requests)],
            block_size=_BLOCK_SIZE,
        )
        scale = shape.head_dim**-0.5
        return [lambda number: ops.paged_attention(q, caches[number % len(caches)], meta, scale)]

    case = KernelCase(
        "paged_attention",
        label,
        kv_bytes + 8 * tokens * shape.num_heads * shape.head_dim,
        4 * scores * shape.num_heads * shape.head_dim,
    )
    return KernelGroup("paged_attention", (case,), bind)


def _encoder_attention(shape: ModelShape) -> KernelGroup:
    """Texts of a chunk's length that each see the whole of themselves: what an embedding model does."""
    size, texts = shape.num_heads * shape.head_dim, (1, 8)

    def bind(ops: OpTable) -> list[Call]:
        scale = shape.head_dim**-0.5

        def call(count: int) -> Call:
            q, k, v = (torch.randn(count * _CHUNK, shape.num_heads, shape.head_dim) for _ in range(3))
            starts = [number * _CHUNK for number in range(count + 1)]
            return lambda _: ops.encoder_attention(q, k, v, starts, scale)

        return [call(count) for count in texts]

    cases = tuple(
        KernelCase(
            "encoder_attention",
            f"{count} x {_CHUNK} tokens",
            16 * count * _CHUNK * size,
            4 * count * _CHUNK**2 * size,
        )
        for count in texts
    )
    return KernelGroup("encoder_attention", cases, bind)


def _random_cache(layer: KVLayout, num_blocks: int) -> Tensor:
    cache = allocate_kv_cache(layer, num_blocks, torch.device("cpu"))[0]
    return cache.copy_(torch.randn(cache.shape))


def _cache_writes(shape: ModelShape, rows: Sequence[int]) -> Iterator[KernelGroup]:
    layer = KVLayout(1, shape.num_kv_heads, shape.head_dim, _BLOCK_SIZE, torch.bfloat16)
    blocks = -(-max(rows) // _BLOCK_SIZE)

    def bind_writes(ops: OpTable) -> list[Call]:
        cache = _random_cache(layer, blocks)

        def call(m: int) -> Call:
            k, v = (torch.randn(m, shape.num_kv_heads, shape.head_dim) for _ in range(2))
            slots = torch.arange(m)
            return lambda number: ops.reshape_and_cache(k, v, cache, slots)

        return [call(m) for m in rows]

    token_bytes = 2 * shape.num_kv_heads * shape.head_dim
    writes = [KernelCase("reshape_and_cache", f"{m} rows", m * token_bytes * (4 + 2), 0) for m in rows]
    yield KernelGroup("reshape_and_cache", tuple(writes), bind_writes)

    def bind_copies(ops: OpTable) -> list[Call]:
        cache = _random_cache(layer, 16)
        pairs = torch.stack([torch.arange(8), torch.arange(8, 16)], dim=1)
        return [lambda number: ops.copy_blocks(cache, pairs)]

    yield KernelGroup(
        "copy_blocks", (KernelCase("copy_blocks", "8 blocks", 2 * 8 * layer.bytes_per_block, 0),), bind_copies
    )


# ---- rows by themselves -------------------------------------------------------------------------------


def _rows_by_themselves(shape: ModelShape, rows: Sequence[int]) -> Iterator[KernelGroup]:
    """Norms, rotary positions, activations: float32 rows in and out."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    weight, bias = torch.ones(hidden), torch.zeros(hidden)
    angles = torch.rand(max(rows), shape.head_dim // 2)
    cos, sin = angles.cos(), angles.sin()

    def heads(m: int, count: int) -> Tensor:
        return torch.randn(m, count, shape.head_dim)

    def rotary(ops: OpTable, m: int) -> Call:
        q, k, positions = heads(m, shape.num_heads), heads(m, shape.num_kv_heads), torch.arange(m)
        return lambda number: ops.rotary(q, k, cos, sin, positions)

    def add_rms_norm(ops: OpTable, m: int) -> Call:
        # The reference may add in place: zeros keep the operands finite however often that happens.
        x, residual = torch.zeros(m, hidden), torch.randn(m, hidden)
        return lambda number: ops.add_rms_norm(x, residual, weight, _EPS)

    def of_rows(width: int, run: Callable[[OpTable, Tensor], object]) -> Callable[[OpTable, int], Call]:
        def make(ops: OpTable, m: int) -> Call:
            x = torch.randn(m, width)
            return lambda number: run(ops, x)

        return make

    heads_width = (shape.num_heads + shape.num_kv_heads) * shape.head_dim
    # op, numbers moved a row, how a call is made
    yield _by_rows("rms_norm", rows, 2 * hidden, of_rows(hidden, lambda ops, x: ops.rms_norm(x, weight, _EPS)))
    yield _by_rows("add_rms_norm", rows, 4 * hidden, add_rms_norm)
    yield _by_rows(
        "layer_norm", rows, 2 * hidden, of_rows(hidden, lambda ops, x: ops.layer_norm(x, weight, bias, _EPS))
    )
    yield _by_rows("rotary", rows, 2 * heads_width, rotary)
    yield _by_rows("silu_and_mul", rows, 3 * inner, of_rows(2 * inner, lambda ops, x: ops.silu_and_mul(x)))
    yield _by_rows("gelu_and_mul", rows, 3 * inner, of_rows(2 * inner, lambda ops, x: ops.gelu_and_mul(x)))
    yield _by_rows("gelu", rows, 2 * inner, of_rows(inner, lambda ops, x: ops.gelu(x)))
    sampled = [m for m in rows if m <= _MOST_SAMPLED_ROWS]
    yield _by_rows(
        "soft_cap", sampled, 2 * shape.vocab_size, of_rows(shape.vocab_size, lambda ops, x: ops.soft_cap(x, 30.0))
    )


def _by_rows(op: str, rows: Sequence[int], numbers: int, make: Callable[[OpTable, int], Call]) -> KernelGroup:
    cases = tuple(KernelCase(op, f"{m} rows", 4 * m * numbers, 0) for m in rows)
    return KernelGroup(op, cases, lambda ops: [make(ops, m) for m in rows])


def _embedding(shape: ModelShape, rows: Sequence[int]) -> KernelGroup:
    """Rows of a packed bf16 table, as with tied embeddings."""
    vocab, hidden = shape.vocab_size, shape.hidden_size

    def bind(ops: OpTable) -> list[Call]:
        table = ops.pack_linear(make_weight(vocab, hidden, "bf16"))

        def call(m: int) -> Call:
            ids = torch.randint(0, vocab, (_MOST_COPIES, m))
            return lambda number: ops.embedding(ids[number % _MOST_COPIES], table, torch.float32)

        return [call(m) for m in rows]

    cases = tuple(KernelCase("embedding", f"bf16, {m} rows", m * hidden * (2 + 4), 0) for m in rows)
    return KernelGroup("embedding", cases, bind)
