"""Devices and the clusters made of them: `hardware.yaml` of this package, and files of the user in the same form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from sagellm_protocol import InvalidArgumentError, NotFoundError
from sagellm_protocol.model import EdgeModel

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(gt=0, le=1)]
_MAX_DEVICES = 4096


class Device(EdgeModel):
    """One accelerator; the head of `hardware.yaml` says what the figures mean."""

    name: str = Field(min_length=1)
    aliases: list[str] = Field(default_factory=list)
    memory_gib: _Positive
    bandwidth_gb_s: _Positive
    tflops: dict[str, _Positive] = Field(min_length=1)
    link_gb_s: _Positive
    network_gb_s: _Positive
    devices_per_node: int = Field(ge=1)
    compute: _Share
    memory: _Share
    op_us: _Positive
    sharpness: float = Field(ge=1, le=64)
    link: _Share
    link_us: _Positive
    price: float = Field(default=0.0, ge=0)
    source: str = Field(min_length=1, description="Where the figures come from.")

    def flops(self, dtype: str) -> float:
        """Operations a second at the peak; types that the device does not multiply are widened to bfloat16."""
        peaks: Mapping[str, float] = self.tflops
        widest = peaks.get("bfloat16") or peaks.get("float16") or max(peaks.values())
        return 1e12 * peaks.get(dtype, widest)


@dataclass(frozen=True, slots=True)
class Cluster:
    """`num_devices` of one kind, in nodes."""

    device: Device
    num_devices: int

    def __str__(self) -> str:
        return f"{self.num_devices}x{self.device.name}"


def load_devices(*files: str | Path) -> dict[str, Device]:
    """All known devices by name and alias, in capitals; later files add to and replace what earlier ones say.

    Raises `NotFoundError` for a file that isn't there, `InvalidArgumentError` for one that is wrong, naming the field.
    """
    devices: dict[str, Device] = {}
    table = resources.files(__package__).joinpath("hardware.yaml")
    for name, text in (("hardware.yaml", table.read_text("utf-8")), *((str(file), _read(file)) for file in files)):
        for device in _parse(text, name):
            for known_as in (device.name, *device.aliases):
                devices[known_as.upper()] = device
    return devices


def parse_cluster(text: str, devices: Mapping[str, Device]) -> Cluster:
    """`8xH200`, or `H200` for one; `InvalidArgumentError` for anything else."""
    match = re.fullmatch(r"(?:(\d+)\s*[x*×]\s*)?([A-Za-z][\w-]*)", text.strip())
    if match is None:
        raise InvalidArgumentError(f"{text!r} names no devices; write a number and a kind, as 8xH200", field="gpus")
    num_devices, name = int(match[1] or 1), match[2].upper()
    if not 1 <= num_devices <= _MAX_DEVICES:
        raise InvalidArgumentError(f"{text!r}: the number of devices must be 1 to {_MAX_DEVICES}", field="gpus")
    if name not in devices:
        known = ", ".join(sorted({device.name for device in devices.values()}))
        raise InvalidArgumentError(
            f"unknown device {match[2]!r}; known are {known}; --hardware FILE adds others", field="gpus"
        )
    return Cluster(devices[name], num_devices)


def _read(file: str | Path) -> str:
    try:
        return Path(file).read_text("utf-8")
    except OSError as error:
        raise NotFoundError(f"{file} can't be read ({error.strerror}); check the path", field="hardware") from error
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"{file} is no UTF-8 text; write YAML", field="hardware") from error


def _parse(text: str, name: str) -> list[Device]:
    try:
        data: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidArgumentError(f"{name} is no YAML: {error}", field="hardware") from error
    entries = data.get("devices") if isinstance(data, dict) else None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise InvalidArgumentError(
            f"{name}: `devices` must map names to figures, see the built-in table", field="devices"
        )
    devices = []
    for key, entry in entries.items():
        try:
            devices.append(Device(**{"name": str(key), **entry}))
        except (ValidationError, InvalidArgumentError) as error:
            raise InvalidArgumentError(f"{name}: device {key}: {error}", field="hardware") from error
    return devices
