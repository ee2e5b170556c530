"""What a family of encoders is: a configuration turned into an `EncoderSpec`, and the names of its weights.

`MODELS` in `registry.py` names one `EncoderFamily` an architecture, as it does for decoders.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from .encoder_spec import EncoderSpec
from .hf_config import HFConfig
from .weights import Parameter, Part, WeightNames

__all__ = ["EncoderFamily", "EncoderNames", "encoder_plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderNames(WeightNames):
    """Names of an encoder's tensors, as in `WeightNames`; the defaults are those of BERT."""

    embedding: str = "embeddings.word_embeddings"
    positions: str = "embeddings.position_embeddings"
    token_types: str = "embeddings.token_type_embeddings"
    embedding_norm: str = "embeddings.LayerNorm"
    layer: str = "encoder.layer.{layer}."
    qkv: tuple[str, ...] = ("attention.self.query", "attention.self.key", "attention.self.value")
    o: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    mlp_norm: str = "output.LayerNorm"
    # What models are trained with, and what old files hold besides: the pooler, heads, buffers.
    ignored: tuple[str, ...] = (r"^pooler\.", r"^cls\.", r"^lm_head\.", r"\.position_ids$", r"\.token_type_ids$")


class EncoderFamily(ABC):
    """One family of encoders; stateless."""

    @abstractmethod
    def spec(self, config: HFConfig) -> EncoderSpec:
        """The specification that `config` describes; raises `InvalidArgumentError` or `UnsupportedError`."""

    def weight_names(self) -> EncoderNames:
        """Names of the family's checkpoints; BERT's unless overridden."""
        return EncoderNames()


def encoder_plan(spec: EncoderSpec, names: EncoderNames) -> dict[str, Parameter]:
    """Every parameter that an encoder of `spec` needs, by key, in the order in which it is built.

    Keys (i a layer): `embedding.weight`, `positions.weight`, `token_types.weight`, `embedding_norm.weight|bias`, and
    under `layers.<i>.`: `qkv`, `o`, `attention_norm`, `gate_up` or `up`, `down`, `mlp_norm`.
    """
    return {parameter.key: parameter for parameter in _parameters(spec, names)}


def _parameters(spec: EncoderSpec, names: EncoderNames) -> Iterator[Parameter]:
    width = spec.hidden_size
    tables = (
        ("embedding", names.embedding, spec.vocab_size),
        ("positions", names.positions, spec.position_rows),
        ("token_types", names.token_types, spec.type_vocab_size),
    )
    for key, source, num_rows in tables:
        if num_rows:
            yield Parameter(f"{key}.weight", (Part(f"{source}.weight", (num_rows, width)),))
    yield from _norm("embedding_norm", names.embedding_norm, width)
    for index in range(spec.num_layers):
        yield from _layer(f"layers.{index}.", names.layer.format(layer=index), spec, names)


def _layer(key: str, prefix: str, spec: EncoderSpec, names: EncoderNames) -> Iterator[Parameter]:
    width, mlp = spec.hidden_size, spec.mlp
    qkv = tuple(prefix + name for name in names.qkv)
    yield from _linear(f"{key}qkv", qkv, 3 * width, width, spec.attention_bias)
    yield from _linear(f"{key}o", (prefix + names.o,), width, width, spec.attention_bias)
    yield from _norm(f"{key}attention_norm", prefix + names.attention_norm, width)
    if mlp.gated:
        gate_up = tuple(prefix + name for name in names.gate_up)
        yield from _linear(f"{key}gate_up", gate_up, 2 * mlp.intermediate_size, width, mlp.bias)
    else:
        yield from _linear(f"{key}up", (prefix + names.up,), mlp.intermediate_size, width, mlp.bias)
    yield from _linear(f"{key}down", (prefix + names.down,), width, mlp.intermediate_size, mlp.bias)
    yield from _norm(f"{key}mlp_norm", prefix + names.mlp_norm, width)


def _linear(key: str, sources: tuple[str, ...], rows: int, columns: int, bias: bool) -> Iterator[Parameter]:
    """A linear layer of `rows` outputs, shared evenly between the sources, and `columns` inputs."""
    rows //= len(sources)
    yield Parameter(f"{key}.weight", tuple(Part(f"{source}.weight", (rows, columns)) for source in sources))
    if bias:
        yield Parameter(f"{key}.bias", tuple(Part(f"{source}.bias", (rows,)) for source in sources))


def _norm(key: str, source: str, width: int) -> Iterator[Parameter]:
    for part in ("weight", "bias"):
        yield Parameter(f"{key}.{part}", (Part(f"{source}.{part}", (width,)),))
