"""Weights in fewer bits: methods that turn a matrix into a `QuantizedTensor`, by name.

A method is one module with a function `quantize(weight [N, K]) -> QuantizedTensor`-like method and a line in
`METHODS`. They are the readable specification, in torch; the CPU backend has the two plain ones natively.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from sagellm_protocol import InvalidArgumentError

if TYPE_CHECKING:
    from sagellm_compression.quantization.base import QuantMethod

METHODS = {
    "int8": "sagellm_compression.quantization.int8:Int8",
    "int4": "sagellm_compression.quantization.int4:Int4",
    "int4-g64": "sagellm_compression.quantization.int4:Int4Group64",
    "int4-g128": "sagellm_compression.quantization.int4:Int4Group128",
    "int4-asym": "sagellm_compression.quantization.int4:Int4Asymmetric",
}
"""Name of a method -> module and class."""

__all__ = ["METHODS", "check_quant_method", "get_quant_method"]


def check_quant_method(name: str) -> None:
    """Raise `InvalidArgumentError` for a name that no method has."""
    if name not in METHODS:
        raise InvalidArgumentError(
            f"unknown quantization {name!r}: use none or one of {', '.join(METHODS)}", field="quantization"
        )


def get_quant_method(name: str) -> QuantMethod:
    """The method of that name; raises `InvalidArgumentError` for an unknown one."""
    check_quant_method(name)
    module, _, cls = METHODS[name].partition(":")
    method: QuantMethod = getattr(import_module(module), cls)()
    return method
