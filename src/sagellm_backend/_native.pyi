"""Types of the compiled kernels. Addresses are `Tensor.data_ptr()`, strides count elements, `isa` is an index of
`supported_isas()`, `type` is 0 for float32, 1 for bfloat16, 2 for float16. Nothing is checked here."""

def supported_isas() -> list[str]: ...
def has_fast_fma(isa: int) -> bool: ...

class Weight:
    """A packed matrix; whoever makes it keeps the memory behind the addresses."""

    def __init__(
        self,
        data: int,
        scales: int = 0,
        mins: int = 0,
        *,
        n: int,
        k: int,
        format: int,
        bits: int = 0,
        group: int = 0,
    ) -> None: ...

_Slot = tuple[int, int]  # buffer, column
_Cache = tuple[int, int, int, int, int, int]  # address, num_blocks, kv_heads, head_dim, block_size, type

class Program:
    """See csrc/cpu/program.h."""

    def __init__(self, isa: int) -> None: ...
    def buffer(self, width: int) -> int: ...
    def input(self, width: int) -> None: ...
    def gather(self, index: int, table: int, type: int, y: _Slot) -> None: ...
    def unpack(self, index: int, weight: Weight, y: _Slot) -> None: ...
    def scale(self, x: _Slot, factor: float, y: _Slot) -> None: ...
    def add(self, a: _Slot, b: _Slot, y: _Slot) -> None: ...
    def linear(self, x: _Slot, weight: Weight, bias: int, y: _Slot) -> None: ...
    def rms_norm(self, x: _Slot, heads: int, weight: int, eps: float, y: _Slot) -> None: ...
    def add_rms_norm(
        self, x: _Slot, residual: _Slot, weight: int, eps: float, y: _Slot, new_residual: _Slot
    ) -> None: ...
    def layer_norm(self, x: _Slot, weight: int, bias: int, eps: float, y: _Slot) -> None: ...
    def activate(self, x: _Slot, act: int, gated: bool, y: _Slot) -> None: ...
    def soft_cap(self, x: _Slot, cap: float, y: _Slot) -> None: ...
    def rotate(self, x: _Slot, heads: int, head_dim: int, cos: int, sin: int, half: int, interleaved: bool) -> None: ...
    def store(self, k: _Slot, v: _Slot, cache: _Cache) -> None: ...
    def attention(
        self, q: _Slot, heads: int, cache: _Cache, scale: float, window: int, soft_cap: float, y: _Slot
    ) -> None: ...
    def take(self, x: _Slot, y: _Slot) -> None: ...
    def argmax(self, x: _Slot) -> None: ...
    def rows_out(self, x: _Slot) -> None: ...
    def samples_out(self, x: _Slot) -> None: ...
    def finish(self) -> None: ...
    def run_rows(self, rows: int, input: int, output: int, threads: int) -> None: ...
    def run(
        self,
        rows: int,
        ids: int,
        positions: int,
        slot_mapping: int,
        query_start_loc: int,
        context_lens: int,
        block_tables: int,
        requests: int,
        table_width: int,
        samples: int,
        num_samples: int,
        rows_out: int,
        samples_out: int,
        best: int,
        threads: int,
    ) -> None: ...

def pack(isa: int, source: int, packed: int, stride: int, n: int, k: int, type: int, threads: int) -> None: ...
def pack_int(isa: int, codes: int, stride: int, weight: Weight, threads: int) -> None: ...
def quantize(isa: int, source: int, stride: int, type: int, weight: Weight, threads: int) -> None: ...
def linear(isa: int, x: int, weight: Weight, bias: int, y: int, x_stride: int, m: int, threads: int) -> None: ...
def unpack_rows(isa: int, weight: Weight, rows: int, y: int, num_rows: int, threads: int) -> None: ...
def attention(
    isa: int,
    q: int,
    cache: int,
    out: int,
    query_start_loc: int,
    context_lens: int,
    block_tables: int,
    q_stride: int,
    requests: int,
    table_width: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    num_blocks: int,
    scale: float,
    window: int,
    soft_cap: float,
    type: int,
    threads: int,
) -> None: ...
def write_cache(
    isa: int,
    k: int,
    v: int,
    cache: int,
    slot_mapping: int,
    k_stride: int,
    v_stride: int,
    tokens: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    num_blocks: int,
    type: int,
    threads: int,
) -> None: ...
def norm(
    isa: int,
    x: int,
    residual: int,
    weight: int,
    y: int,
    new_residual: int,
    x_stride: int,
    rows: int,
    heads: int,
    size: int,
    eps: float,
    threads: int,
) -> None: ...
def layer_norm(
    isa: int,
    x: int,
    weight: int,
    bias: int,
    y: int,
    x_stride: int,
    rows: int,
    size: int,
    eps: float,
    threads: int,
) -> None: ...
def rotary(
    isa: int,
    x: int,
    cos: int,
    sin: int,
    positions: int,
    x_stride: int,
    tokens: int,
    heads: int,
    head_dim: int,
    half: int,
    interleaved: int,
    threads: int,
) -> None: ...
def soft_cap(isa: int, x: int, y: int, rows: int, size: int, cap: float, threads: int) -> None: ...
def activate(
    isa: int, x: int, y: int, x_stride: int, rows: int, size: int, act: int, gated: bool, threads: int
) -> None: ...
def sample(isa: int, x: int, wanted: int, chosen: int, x_stride: int, rows: int, size: int, threads: int) -> None: ...
