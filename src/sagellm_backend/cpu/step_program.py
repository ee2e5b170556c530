"""Step programs: a model's forward pass recorded once, as a list of kernel calls, and replayed in one native call.

Recording calls the model's own `forward` with symbols in place of tensors. A native op that is given a symbol appends
its kernel to the program instead of running it (`recordable`), so that the eager code stays the one description of a
model and a program computes, bit for bit, what it computes. A forward that does anything else with a symbol (an op
without a kernel, a torch function) raises `NotRecordableError`, and the caller keeps the eager forward.

What a step saves: two hundred trips through Python, as many allocations, and a wake-up of the threads an op.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, SupportsFloat, TypeVar, cast

import torch
from torch import Tensor

from sagellm_backend import _native
from sagellm_backend.attention import AttentionMetadata
from sagellm_backend.cpu.packed import TYPES, NativePackedLinear
from sagellm_backend.cpu.paged_cache import kernel_cache
from sagellm_backend.ops import Approximation
from sagellm_backend.provider import Forward, RowsFunction, StepFunction, StepOutput, StepWants

_Op = TypeVar("_Op", bound=Callable[..., Any])

_SILU = 0
_GELU: dict[Approximation, int] = {"tanh": 1, "none": 2}
_ROWS = -1  # stands for the number of rows in the shape of a symbol


class NotRecordableError(Exception):
    """The forward does something with a symbol that no kernel call stands for; the message says what."""


class Symbol:
    """What stands for a tensor while a program is recorded. Any use of it that is not recorded is an error."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise NotRecordableError(f"torch's {getattr(func, '__name__', func)} has no kernel")

    def __getattr__(self, name: str) -> NoReturn:
        raise NotRecordableError(f"{type(self).__name__} has no {name!r}")

    def _refuse(self, *operands: Any) -> Any:
        raise NotRecordableError(f"an operation of {type(self).__name__} with {operands!r} has no kernel")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __neg__ = __getitem__ = _refuse
    __len__ = __iter__ = __bool__ = __float__ = __int__ = _refuse


@dataclass(frozen=True, slots=True, eq=False)
class Indices(Symbol):
    """An array with one index a row: which table rows or which cache slots the step's tokens use."""

    recorder: Recorder
    name: Literal["input_ids", "positions", "slot_mapping"]


@dataclass(frozen=True, slots=True, eq=False)
class Rows(Symbol):
    """Activations: columns `[column, column + width)` of a buffer with one float32 row a token."""

    recorder: Recorder
    buffer: int
    column: int
    width: int
    head_dim: int = 0  # 0: [T, width], else [T, width / head_dim, head_dim]

    @property
    def slot(self) -> tuple[int, int]:
        """Where the columns start."""
        return self.buffer, self.column

    @property
    def heads(self) -> int:
        """Heads a row, 1 for plain rows."""
        return self.width // self.head_dim if self.head_dim else 1

    @property
    def dtype(self) -> torch.dtype:
        """Activations are float32."""
        return torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """With a placeholder for the number of rows."""
        return (_ROWS, self.heads, self.head_dim) if self.head_dim else (_ROWS, self.width)

    def split_with_sizes(self, sizes: tuple[int, ...], dim: int = -1) -> list[Rows]:
        """Views of neighbouring columns."""
        assert dim == -1, dim
        views, column = [], self.column
        for size in sizes:
            views.append(Rows(self.recorder, self.buffer, column, size))
            column += size
        return views

    def view(self, *shape: int) -> Rows:
        """The same columns as heads, or as plain rows again."""
        return Rows(self.recorder, self.buffer, self.column, self.width, shape[2] if len(shape) == 3 else 0)

    def float(self) -> Rows:
        """Itself: it is float32."""
        return self

    def __mul__(self, factor: SupportsFloat) -> Rows:
        return self.recorder.scale(self, factor)

    def __add__(self, other: Rows) -> Rows:
        return self.recorder.add(self, other)


class StepMeta(Symbol):
    """`AttentionMetadata` of a step to come; the program reads the real one when it runs."""

    def __init__(self, recorder: Recorder) -> None:
        self.positions = Indices(recorder, "positions")
        self.slot_mapping = Indices(recorder, "slot_mapping")


class Recorder:
    """Appends kernel calls to a program; one method an op, with the op's own signature."""

    def __init__(self, isa: int) -> None:
        self.program = _native.Program(isa)
        self._kept: list[object] = []  # whatever the program's addresses point to

    def new(self, width: int, head_dim: int = 0) -> Rows:
        """A buffer for the result of the next call."""
        return Rows(self, self.program.buffer(width), 0, width, head_dim)

    def embedding(self, ids: Indices, table: Tensor | NativePackedLinear, dtype: torch.dtype) -> Rows:
        """Rows of a plain or a packed table."""
        _require(dtype is torch.float32, "embeddings in half precision have no kernel")
        index = {"input_ids": 0, "positions": 1}[ids.name]
        if isinstance(table, NativePackedLinear):
            y = self.new(table.in_features)
            self.program.unpack(index, self._weight(table), y.slot)
            return y
        _require(
            isinstance(table, Tensor) and table.dtype in TYPES and table.is_contiguous(), "no kernel reads the table"
        )
        y = self.new(table.shape[1])
        self.program.gather(index, self._address(table), TYPES[table.dtype], y.slot)
        return y

    def scale(self, x: Rows, factor: SupportsFloat) -> Rows:
        """x * factor."""
        y = self.new(x.width)
        self.program.scale(x.slot, float(factor), y.slot)
        return y

    def add(self, a: Rows, b: Rows) -> Rows:
        """a + b."""
        y = self.new(a.width)
        self.program.add(a.slot, b.slot, y.slot)
        return y

    def linear(self, x: Rows, packed: object, bias: Tensor | None = None) -> Rows:
        """See `reference.linear`."""
        _require(isinstance(packed, NativePackedLinear), "the weight is not packed for the kernels")
        packed = cast("NativePackedLinear", packed)
        y = self.new(packed.out_features)
        self.program.linear(x.slot, self._weight(packed), self._vector(bias), y.slot)
        return y

    def rms_norm(self, x: Rows, weight: Tensor, eps: float) -> Rows:
        """See `reference.rms_norm`."""
        y = self.new(x.width, x.head_dim)
        self.program.rms_norm(x.slot, x.heads, self._vector(weight), eps, y.slot)
        return y

    def add_rms_norm(self, x: Rows, residual: Rows, weight: Tensor, eps: float) -> tuple[Rows, Rows]:
        """See `reference.add_rms_norm`."""
        y, new_residual = self.new(x.width), self.new(x.width)
        self.program.add_rms_norm(x.slot, residual.slot, self._vector(weight), eps, y.slot, new_residual.slot)
        return y, new_residual

    def layer_norm(self, x: Rows, weight: Tensor, bias: Tensor | None, eps: float) -> Rows:
        """See `reference.layer_norm`."""
        y = self.new(x.width)
        self.program.layer_norm(x.slot, self._vector(weight), self._vector(bias), eps, y.slot)
        return y

    def silu_and_mul(self, x: Rows) -> Rows:
        """See `reference.silu_and_mul`."""
        return self._activate(x, _SILU, gated=True)

    def gelu_and_mul(self, x: Rows, approximate: Approximation = "none") -> Rows:
        """See `reference.gelu_and_mul`."""
        return self._activate(x, _GELU[approximate], gated=True)

    def gelu(self, x: Rows, approximate: Approximation = "none") -> Rows:
        """See `reference.gelu`."""
        return self._activate(x, _GELU[approximate], gated=False)

    def soft_cap(self, x: Rows, cap: float) -> Rows:
        """See `reference.soft_cap`."""
        y = self.new(x.width)
        self.program.soft_cap(x.slot, cap, y.slot)
        return y

    def _activate(self, x: Rows, act: int, *, gated: bool) -> Rows:
        y = self.new(x.width // 2 if gated else x.width)
        self.program.activate(x.slot, act, gated, y.slot)
        return y

    def rotary(
        self, q: Rows, k: Rows, cos: Tensor, sin: Tensor, positions: Indices, interleaved: bool = False
    ) -> tuple[Rows, Rows]:
        """See `reference.rotary`; in place."""
        assert positions.name == "positions", positions
        for x in (q, k):
            tables = self._vector(cos), self._vector(sin)
            self.program.rotate(x.slot, x.heads, x.head_dim, *tables, cos.shape[1], interleaved)
        return q, k

    def reshape_and_cache(self, k: Rows, v: Rows, kv_cache: Tensor, slot_mapping: Indices) -> None:
        """See `reference.reshape_and_cache`."""
        assert slot_mapping.name == "slot_mapping", slot_mapping
        self.program.store(k.slot, v.slot, self._cache(kv_cache))

    def paged_attention(
        self,
        q: Rows,
        kv_cache: Tensor,
        meta: StepMeta,
        scale: float,
        *,
        sliding_window: int = 0,
        soft_cap: float = 0.0,
    ) -> Rows:
        """See `reference.paged_attention`."""
        del meta  # every step brings one
        y = self.new(q.width, q.head_dim)
        self.program.attention(q.slot, q.heads, self._cache(kv_cache), scale, sliding_window, soft_cap, y.slot)
        return y

    def take(self, x: Rows) -> Rows:
        """The rows to be sampled; what follows works on them alone."""
        y = self.new(x.width)
        self.program.take(x.slot, y.slot)
        return y

    def _cache(self, kv_cache: Tensor) -> tuple[int, int, int, int, int, int]:
        cache = kernel_cache(kv_cache)
        _require(cache is not None, "no attention kernel reads this cache")
        self._kept.append(kv_cache)
        return cast("tuple[int, int, int, int, int, int]", cache)

    def _weight(self, packed: NativePackedLinear) -> _native.Weight:
        self._kept.append(packed)
        return packed.native

    def _vector(self, tensor: Tensor | None) -> int:
        """Address of a float32 tensor (0 for None); what has another type is converted once."""
        if tensor is None:
            return 0
        return self._address(tensor.float().contiguous())

    def _address(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()


def recordable(name: str, op: _Op) -> _Op:
    """The op, which records itself when its first argument is a symbol."""

    @functools.wraps(op)
    def run_or_record(x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, Symbol):
            recorder = cast("Indices | Rows", x).recorder
            return getattr(recorder, name)(x, *args, **kwargs)
        return op(x, *args, **kwargs)

    return cast("_Op", run_or_record)


def record_step(isa: int, forward: Forward, compute_logits: RowsFunction) -> StepFunction:
    """A step as one program, see `BackendProvider.compile_step`.

    Raises `NotRecordableError` where the model does what no kernel does.
    """
    recorder = Recorder(isa)
    program = recorder.program
    ids, meta_to_come = Indices(recorder, "input_ids"), StepMeta(recorder)
    hidden = _whole(forward(cast("Tensor", ids), cast("AttentionMetadata", meta_to_come)))
    logits = _whole(compute_logits(cast("Tensor", recorder.take(hidden))))
    program.rows_out(hidden.slot)
    program.samples_out(logits.slot)
    program.argmax(logits.slot)
    program.finish()

    def run(input_ids: Tensor, meta: AttentionMetadata, samples: Tensor, want: StepWants) -> StepOutput:
        num_rows, num_samples = input_ids.shape[0], samples.shape[0]
        hidden_out = torch.empty(num_rows, hidden.width) if want.hidden else None
        best = logits_out = None
        if num_samples:
            if want.only_best:
                best = torch.empty(num_samples, dtype=torch.int64)
            else:
                logits_out = torch.empty(num_samples, logits.width)
        block_tables = meta.block_tables.contiguous()
        program.run(
            num_rows,
            input_ids.data_ptr(),
            meta.positions.data_ptr(),
            meta.slot_mapping.data_ptr(),
            meta.query_start_loc.data_ptr(),
            meta.context_lens.data_ptr(),
            block_tables.data_ptr(),
            meta.num_requests,
            block_tables.shape[1],
            samples.data_ptr(),
            num_samples,
            _address(hidden_out),
            _address(logits_out),
            _address(best),
            torch.get_num_threads(),
        )
        return StepOutput(hidden_out, logits_out, None if best is None else best.tolist())

    run.recorder = recorder  # type: ignore[attr-defined]  # keeps what the addresses point to
    return run


def record_rows(isa: int, function: RowsFunction, width: int) -> RowsFunction:
    """`function(x [R, width]) -> [R, ...]` as a program; one call at a time.

    Raises `NotRecordableError` where the function does what no kernel does.
    """
    recorder = Recorder(isa)
    program = recorder.program
    program.input(width)
    output = _whole(function(cast("Tensor", Rows(recorder, 0, 0, width))))
    program.rows_out(output.slot)
    program.finish()

    def run(x: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty(x.shape[0], output.width)
        program.run_rows(x.shape[0], x.data_ptr(), y.data_ptr(), torch.get_num_threads())
        return y

    run.recorder = recorder  # type: ignore[attr-defined]  # keeps what the addresses point to
    return run


def _whole(value: object) -> Rows:
    """The value as what it must be at the end of a program: all columns of its buffer."""
    assert isinstance(value, Rows), value
    assert value.column == 0, value
    return value


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise NotRecordableError(otherwise)
