"""Which tensors of a checkpoint make up which parameters of the decoder, and in which shapes.

`WeightNames` is a family's whole knowledge of a file's naming and layout; `parameter_plan` lays it over a
`DecoderSpec` and yields the complete list of parameters, each with the parts that are read, brought into form and
joined to fill it. The plan is made before anything is read, so that a checkpoint can be checked as a whole first.

Keys of the plan (i a layer, e an expert): `embedding.weight`, `positions.weight`, `final_norm.weight|bias`,
`lm_head.weight|bias`, and under `layers.<i>.`: `attention_norm`, `post_attention_norm`, `mlp_norm`, `post_mlp_norm`,
`qkv`, `q_norm`, `k_norm`, `o`, `gate_up` or `up`, `down`, `router`, `experts.<e>.gate_up`, `experts.<e>.down`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from .spec import DecoderSpec, LayerSpec, MoESpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Parameter", "Part", "WeightNames", "parameter_plan"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightNames:
    """Names and layout of the tensors of a checkpoint; the defaults are those of Llama.

    Names go without `.weight` and `.bias`; those below `layer` are relative to it. A tuple names tensors that are
    joined along their output rows; one name in it means that the checkpoint holds them joined already.
    `renames` are (pattern, replacement) pairs applied to every name of the file first; tensors whose name then matches
    one of `ignored` are left unread.
    """

    embedding: str = "model.embed_tokens"
    positions: str = ""
    final_norm: str = "model.norm"
    lm_head: str = "lm_head"
    layer: str = "model.layers.{layer}."
    attention_norm: str = "input_layernorm"
    post_attention_norm: str = "post_attention_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    post_mlp_norm: str = "post_feedforward_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    qkv_layout: Literal["plain", "per_head", "rotary_pairs"] = "plain"
    """`per_head`: rows of one fused tensor go q, k, v head by head (GPT-NeoX); `rotary_pairs`: rows of q and k
    alternate between the halves of a head (GGUF files of Llama)."""
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    o: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    expert_gate_up: tuple[str, ...] = ("mlp.experts.{expert}.gate_proj", "mlp.experts.{expert}.up_proj")
    expert_down: str = "mlp.experts.{expert}.down_proj"
    transposed: bool = False
    """Linear weights are stored [in, out] (GPT-2)."""
    norm_offset: float = 0.0
    """Added to norm weights (Gemma stores weight - 1)."""
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = (r"\.rotary_emb\.inv_freq$",)


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor to read: its name, the shape the decoder wants, and what brings it into the decoder's form."""

    name: str
    shape: Shape
    convert: Callable[[Tensor], Tensor] | None = None
    transposed: bool = False

    @property
    def stored_shape(self) -> Shape:
        """The shape in the file."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def is_plain(self) -> bool:
        """Whether the file holds the tensor as the decoder wants it."""
        return self.convert is None and not self.transposed


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the decoder: its parts, joined along dimension 0. Tensor parallelism cuts each part before."""

    key: str
    parts: tuple[Part, ...]


def parameter_plan(spec: DecoderSpec, names: WeightNames) -> dict[str, Parameter]:
    """Every parameter that a decoder of `spec` needs, by key, in the order in which the decoder is built."""
    return {parameter.key: parameter for parameter in _Planner(spec, names).parameters()}


class _Planner:
    """Walks over a specification and yields its parameters."""

    def __init__(self, spec: DecoderSpec, names: WeightNames) -> None:
        self.spec = spec
        self.names = names

    def parameters(self) -> Iterator[Parameter]:
        spec, names = self.spec, self.names
        yield self._plain("embedding.weight", f"{names.embedding}.weight", (spec.vocab_size, spec.hidden_size))
        if spec.learned_positions:
            shape = (spec.max_position_embeddings, spec.hidden_size)
            yield self._plain("positions.weight", f"{names.positions}.weight", shape)
        for index, layer in enumerate(spec.layers):
            yield from self._layer(f"layers.{index}.", names.layer.format(layer=index), layer)
        yield from self._norm("final_norm", names.final_norm)
        if not spec.tie_word_embeddings:
            yield self._plain("lm_head.weight", f"{names.lm_head}.weight", (spec.vocab_size, spec.hidden_size))
        if spec.lm_head_bias:
            yield self._plain("lm_head.bias", f"{names.lm_head}.bias", (spec.vocab_size,))

    def _layer(self, key: str, prefix: str, layer: LayerSpec) -> Iterator[Parameter]:
        spec, names = self.spec, self.names
        if spec.norm_placement != "post":
            yield from self._norm(f"{key}attention_norm", prefix + names.attention_norm)
        yield from self._qkv(key, prefix)
        if spec.qk_norm != "none":
            whole = spec.qk_norm == "projection"
            for name, source, size in (("q_norm", names.q_norm, spec.q_size), ("k_norm", names.k_norm, spec.kv_size)):
                shape = (size if whole else spec.head_dim,)
                yield self._plain(f"{key}{name}.weight", f"{prefix}{source}.weight", shape)
        yield from self._linear(f"{key}o", (prefix + names.o,), spec.hidden_size, spec.q_size, spec.o_bias)
        if spec.norm_placement != "pre":
            yield from self._norm(f"{key}post_attention_norm", prefix + names.post_attention_norm)
        if spec.norm_placement != "post":
            yield from self._norm(f"{key}mlp_norm", prefix + names.mlp_norm)
        yield from self._mlp(key, prefix, layer)
        if spec.norm_placement != "pre":
            yield from self._norm(f"{key}post_mlp_norm", prefix + names.post_mlp_norm)

    def _qkv(self, key: str, prefix: str) -> Iterator[Parameter]:
        spec, names = self.spec, self.names
        sizes = (spec.q_size, spec.kv_size, spec.kv_size)
        sources = tuple(prefix + name for name in names.qkv)
        if len(sources) == 1:
            sizes = (sum(sizes),)  # type: ignore[assignment]
        converts: tuple[Callable[[Tensor], Tensor] | None, ...] = (None,) * len(sources)
        if names.qkv_layout == "per_head":
            converts = (partial(_from_per_head, num_heads=spec.num_heads),)
        elif names.qkv_layout == "rotary_pairs":
            q, k = (partial(_from_rotary_pairs, num_heads=n) for n in (spec.num_heads, spec.num_kv_heads))
            converts = (q, k, None)
        for suffix in ("weight", "bias") if spec.qkv_bias else ("weight",):
            parts = tuple(
                self._part(f"{source}.{suffix}", (size, spec.hidden_size) if suffix == "weight" else (size,), convert)
                for source, size, convert in zip(sources, sizes, converts, strict=True)
            )
            yield Parameter(f"{key}qkv.{suffix}", parts)

    def _mlp(self, key: str, prefix: str, layer: LayerSpec) -> Iterator[Parameter]:
        mlp, names, hidden = layer.mlp, self.names, self.spec.hidden_size
        size = mlp.intermediate_size
        if isinstance(mlp, MoESpec):
            yield self._plain(f"{key}router.weight", f"{prefix}{names.router}.weight", (mlp.num_experts, hidden))
            for expert in range(mlp.num_experts):
                gate_up = tuple(prefix + name.format(expert=expert) for name in names.expert_gate_up)
                down = prefix + names.expert_down.format(expert=expert)
                yield from self._linear(f"{key}experts.{expert}.gate_up", gate_up, 2 * size, hidden, False)
                yield from self._linear(f"{key}experts.{expert}.down", (down,), hidden, size, False)
            return
        if mlp.gated:
            sources = tuple(prefix + name for name in names.gate_up)
            yield from self._linear(f"{key}gate_up", sources, 2 * size, hidden, mlp.bias)
        else:
            yield from self._linear(f"{key}up", (prefix + names.up,), size, hidden, mlp.bias)
        yield from self._linear(f"{key}down", (prefix + names.down,), hidden, size, mlp.bias)

    def _linear(self, key: str, sources: tuple[str, ...], rows: int, columns: int, bias: bool) -> Iterator[Parameter]:
        """A linear layer of `rows` outputs, shared evenly between the sources, and `columns` inputs."""
        rows //= len(sources)
        yield Parameter(f"{key}.weight", tuple(self._part(f"{source}.weight", (rows, columns)) for source in sources))
        if bias:
            yield Parameter(f"{key}.bias", tuple(self._part(f"{source}.bias", (rows,)) for source in sources))

    def _norm(self, key: str, source: str) -> Iterator[Parameter]:
        shape = (self.spec.hidden_size,)
        yield self._plain(f"{key}.weight", f"{source}.weight", shape)
        if self.spec.norm.has_bias:
            yield self._plain(f"{key}.bias", f"{source}.bias", shape)

    def _plain(self, key: str, source: str, shape: Shape) -> Parameter:
        return Parameter(key, (Part(source, shape),))

    def _part(self, source: str, shape: Shape, convert: Callable[[Tensor], Tensor] | None = None) -> Part:
        """A part of a linear layer; `shape` is [out, in] or [out]."""
        return Part(source, shape, convert, transposed=self.names.transposed and len(shape) == 2)


def _from_per_head(fused: Tensor, num_heads: int) -> Tensor:
    """[heads * (q, k, v) * head_dim, ...] -> [(q, k, v) * heads * head_dim, ...]."""
    return fused.reshape(num_heads, 3, -1, *fused.shape[1:]).transpose(0, 1).reshape(fused.shape)


def _from_rotary_pairs(rows: Tensor, num_heads: int) -> Tensor:
    """Rows of each head from (0, half, 1, half + 1, ...) to (0, 1, ..., half, half + 1, ...)."""
    half = rows.shape[0] // num_heads // 2
    return rows.reshape(num_heads, half, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
