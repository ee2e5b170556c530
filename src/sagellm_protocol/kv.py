"""KV cache memory as others name it: what is allocated, held and moved. Tensors stay inside the backend."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sagellm_protocol.dtypes import DType
from sagellm_protocol.errors import ErrorCode
from sagellm_protocol.fields import Identifier
from sagellm_protocol.ids import new_transfer_id
from sagellm_protocol.model import ProtocolEnum, ProtocolModel


class KVErrorCode(ProtocolEnum):
    """What went wrong with KV memory, finer than an ErrorCode; stands in an error's context as ``kv_code``."""

    OUT_OF_BLOCKS = "out_of_blocks"
    BLOCK_NOT_FOUND = "block_not_found"
    BLOCK_IN_USE = "block_in_use"
    DOUBLE_FREE = "double_free"
    LAYOUT_MISMATCH = "layout_mismatch"
    CHECKSUM_MISMATCH = "checksum_mismatch"
    TRANSFER_TIMEOUT = "transfer_timeout"
    TRANSFER_FAILED = "transfer_failed"

    @property
    def error_code(self) -> ErrorCode:
        """The protocol's code for this failure."""
        return _ERROR_CODES[self.value]


_ERROR_CODES = {
    "out_of_blocks": ErrorCode.RESOURCE_EXHAUSTED,
    "block_not_found": ErrorCode.NOT_FOUND,
    "block_in_use": ErrorCode.INVALID_ARGUMENT,
    "double_free": ErrorCode.INVALID_ARGUMENT,
    "layout_mismatch": ErrorCode.INVALID_ARGUMENT,
    "checksum_mismatch": ErrorCode.KV_TRANSFER_FAILED,
    "transfer_timeout": ErrorCode.KV_TRANSFER_FAILED,
    "transfer_failed": ErrorCode.KV_TRANSFER_FAILED,
}


class KVAllocateParams(ProtocolModel):
    """What a caller asks for when it allocates KV memory."""

    num_tokens: int = Field(ge=1, description="Tokens the memory must hold.")
    dtype: DType = DType.FP16
    request_id: Identifier | None = None
    device: str | None = Field(
        default=None, description='Device name, e.g. "cpu" or "cuda:0"; None is the backend\'s own.'
    )
    block_size: int | None = Field(default=None, ge=1, description="Tokens a block; None is the backend's own.")


class KVBlock(ProtocolModel):
    """A piece of KV memory that a backend handed out; give it back with ``kv_block_free``."""

    block_id: int = Field(ge=0, description="Unique among the live blocks of its backend.")
    num_tokens: int = Field(ge=1, description="Tokens it holds.")
    dtype: DType
    nbytes: int = Field(ge=0, description="Bytes it takes on its device.")
    device: str = "cpu"


class KVHandle(ProtocolModel):
    """Names the KV cache of one request on one engine: which blocks, in order, and how many tokens they hold."""

    request_id: Identifier
    engine_id: str = ""
    block_ids: tuple[int, ...] = ()
    num_tokens: int = Field(default=0, ge=0)
    block_size: int = Field(default=16, ge=1)
    dtype: DType = DType.FP16
    device: str = "cpu"


class KVTransferMetadata(ProtocolModel):
    """All that the receiving side of a KV transfer must know before the bytes arrive.

    The layout fields must equal the receiver's own; the checksum covers the bytes in the order of ``block_ids``.
    """

    transfer_id: Identifier = Field(default_factory=new_transfer_id)
    request_id: Identifier
    source_engine_id: str = ""
    target_engine_id: str = ""
    connector: str = Field(default="local", description='How the bytes travel: "local", "shm" or "tcp".')
    role: Literal["producer", "consumer"] = "consumer"
    address: str | None = Field(default=None, description="Where the producer listens, in the connector's own form.")
    block_ids: tuple[int, ...] = Field(default=(), description="The producer's blocks, in order of position.")
    num_tokens: int = Field(default=0, ge=0, description="Tokens whose KV is moved.")
    block_size: int = Field(default=16, ge=1)
    num_layers: int = Field(default=0, ge=0)
    num_kv_heads: int = Field(default=0, ge=0)
    head_dim: int = Field(default=0, ge=0)
    dtype: DType = DType.FP16
    nbytes: int = Field(default=0, ge=0)
    checksum: str | None = None
