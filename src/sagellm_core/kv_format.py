"""What the bytes of a KV block mean, and prefixes on their way between engines: `KVFormat` and `PrefixBlocks`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields

from sagellm_protocol import KVErrorCode, KVTransferError


@dataclass(frozen=True, slots=True)
class KVFormat:
    """All that must be equal on two engines for one to go on with the other's keys and values, to the bit."""

    layout: str  # layers, KV heads, numbers a head, tokens a block, type
    kernels: str  # what computes each op: other kernels round in other ways and order a block's numbers otherwise
    model: str  # fingerprint of the weights and of what was made of them
    bytes_per_block: int  # over all layers

    def check_equals(self, other: KVFormat) -> None:
        """Raise `KVTransferError` that says what differs."""
        for field in fields(self):
            here, there = getattr(self, field.name), getattr(other, field.name)
            if here != there:
                raise KVTransferError(
                    f"the KV blocks come from another {field.name} ({there}) than this engine's ({here}); hand over "
                    "between engines with the same model, dtypes, block_size and kernels",
                    retryable=False,
                    kv_code=KVErrorCode.LAYOUT_MISMATCH.value,
                    field=field.name,
                )


@dataclass(frozen=True, slots=True)
class PrefixBlocks:
    """The full KV blocks of the first tokens of a sequence; plain data, to be sent anywhere.

    `data` holds the blocks one after the other, `bytes_per_block` each; `checksum` is the SHA-256 of all else and them.
    """

    token_ids: tuple[int, ...]  # full blocks of them
    cache_salt: str | None
    lora_id: str | None
    format: KVFormat
    data: bytes
    checksum: str

    @classmethod
    def of(
        cls, token_ids: tuple[int, ...], cache_salt: str | None, lora_id: str | None, format: KVFormat, data: bytes
    ) -> PrefixBlocks:
        """The blocks with their checksum."""
        checksum = _checksum(token_ids, cache_salt, lora_id, format, data)
        return cls(token_ids, cache_salt, lora_id, format, data, checksum)

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values are here."""
        return len(self.token_ids)

    @property
    def num_blocks(self) -> int:
        """Blocks that they fill."""
        return len(self.data) // self.format.bytes_per_block

    def verify(self) -> None:
        """Raise `KVTransferError` unless the content is what it was."""
        if self.checksum != _checksum(self.token_ids, self.cache_salt, self.lora_id, self.format, self.data):
            raise KVTransferError(
                f"the checksum of {self.num_tokens} tokens' KV blocks is wrong: they were damaged on their way; send "
                "them again, or let the engine compute them",
                kv_code=KVErrorCode.CHECKSUM_MISMATCH.value,
            )


def _checksum(
    token_ids: tuple[int, ...], cache_salt: str | None, lora_id: str | None, format: KVFormat, data: bytes
) -> str:
    header = json.dumps([list(token_ids), cache_salt, lora_id, asdict(format), len(data)], sort_keys=True)
    digest = hashlib.sha256(header.encode("utf-8", "surrogatepass"))
    digest.update(data)
    return digest.hexdigest()
