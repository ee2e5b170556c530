"""Number formats and kernel kinds, by the names the protocol uses for them."""

from __future__ import annotations

from sagellm_protocol.errors import InvalidArgumentError
from sagellm_protocol.model import ProtocolEnum


class DType(ProtocolEnum):
    """A number format of weights, activations or KV cache."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def bits(self) -> int:
        """Bits an element takes."""
        return _BITS[self.value]

    @property
    def itemsize(self) -> float:
        """Bytes an element takes; 0.5 for INT4."""
        return self.bits / 8

    def nbytes(self, num_elements: int) -> int:
        """Return the bytes that ``num_elements`` packed elements take, rounded up."""
        return (num_elements * self.bits + 7) // 8

    @classmethod
    def parse(cls, name: str) -> DType:
        """Return the format of ``name``: ours ("bf16") or torch's and numpy's ("bfloat16", "torch.float32", "half").

        Raises:
            InvalidArgumentError: for an unknown name; lists the known ones.
        """
        key = str(name).strip().lower().removeprefix("torch.")
        try:
            return cls(_ALIASES.get(key, key))
        except ValueError:
            known = ", ".join(member.value for member in cls)
            raise InvalidArgumentError(f"unknown dtype {name!r}; use one of {known}", field="dtype") from None


_BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "fp8": 8, "int8": 8, "int4": 4}
_ALIASES = {
    "bfloat16": "bf16",
    "f16": "fp16",
    "f32": "fp32",
    "float": "fp32",
    "float16": "fp16",
    "float32": "fp32",
    "float8": "fp8",
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8",
    "half": "fp16",
    "qint8": "int8",
}


class KernelKind(ProtocolEnum):
    """A kind of kernel that a backend may offer; a name of its op table."""

    LINEAR = "linear"
    QUANTIZED_LINEAR = "quantized_linear"
    EMBEDDING = "embedding"
    NORM = "norm"
    ROTARY = "rotary"
    ACTIVATION = "activation"
    ATTENTION = "attention"
    KV_CACHE = "kv_cache"
    MOE = "moe"
    SAMPLING = "sampling"
    COLLECTIVE = "collective"
