"""The machine under the CPU backend: processors this process may use, instruction sets, memory.

Containers see the host's processors and memory in /proc; what they may use stands in the control group. All
readers take the root of the file system, so that tests can lay out machines of any kind. On systems without
/proc the numbers come from the standard library and psutil.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")

# Features that kernels may require, by the names /proc/cpuinfo has for them and the name we use.
_FEATURES = {
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "avx_vnni": "avx_vnni",
    "amx_bf16": "amx_bf16",
    "amx_int8": "amx_int8",
    "amx_tile": "amx_tile",
    "asimd": "neon",
    "asimdhp": "fp16",
    "asimddp": "dotprod",
    "bf16": "bf16",
    "i8mm": "i8mm",
    "sve": "sve",
}


@dataclass(frozen=True, slots=True)
class CpuTopology:
    """Processors as this process sees them."""

    model_name: str
    physical_cores: int  # among those that the affinity mask allows
    quota_cpus: float | None  # of the control group; None = no limit
    features: frozenset[str]

    @property
    def usable_threads(self) -> int:
        """Threads that can compute at full speed at once: physical cores, capped by the quota."""
        cores = self.physical_cores
        return cores if self.quota_cpus is None else max(1, min(cores, int(self.quota_cpus)))


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Memory in bytes; both figures respect the control group."""

    total_bytes: int
    available_bytes: int


def read_topology(root: Path = ROOT) -> CpuTopology:
    """The processors of this machine."""
    return CpuTopology(
        model_name=_model_name(root),
        physical_cores=_physical_cores(root, _allowed_cpus()),
        quota_cpus=_quota_cpus(root),
        features=_features(root),
    )


def read_memory(root: Path = ROOT) -> HostMemory:
    """Memory of this machine, or what the control group leaves of it."""
    total, available = _system_memory(root)
    for folder in _cgroup_folders(root, "memory"):
        limit = _read_number(folder / "memory.max", folder / "memory.limit_in_bytes")
        used = _read_number(folder / "memory.current", folder / "memory.usage_in_bytes")
        if limit is None or limit >= total:
            continue
        total = int(limit)
        available = min(available, max(0, int(limit - (used or 0) + _reclaimable(folder))))
    return HostMemory(total, available)


def _allowed_cpus() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _cpuinfo(root: Path) -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo."""
    text = _read_text(root / "proc/cpuinfo").split("\n\n", 1)[0]
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _model_name(root: Path) -> str:
    return _cpuinfo(root).get("model name") or platform.processor() or platform.machine() or "CPU"


def _features(root: Path) -> frozenset[str]:
    info = _cpuinfo(root)
    flags = (info.get("flags") or info.get("Features") or "").split()
    found = {_FEATURES[flag] for flag in flags if flag in _FEATURES}
    if platform.machine() in ("arm64", "aarch64"):
        found.add("neon")  # part of the base instruction set, also where no /proc tells
    return frozenset(found)


def _physical_cores(root: Path, allowed: set[int]) -> int:
    """Cores among the allowed processors; siblings of one core count once."""
    siblings = {
        _read_text(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").strip() for cpu in allowed
    }
    if siblings and "" not in siblings:
        return len(siblings)
    import psutil  # only where /sys does not tell: it would take a hundredth of a second of every start

    return min(len(allowed), psutil.cpu_count(logical=False) or len(allowed))


def _quota_cpus(root: Path) -> float | None:
    """The smallest CPU quota among this process's control group and its parents."""
    quotas = []
    for folder in _cgroup_folders(root, "cpu"):
        quota, _, period = _read_text(folder / "cpu.max").strip().partition(" ")
        quota = quota or _read_text(folder / "cpu.cfs_quota_us").strip()
        period = period or _read_text(folder / "cpu.cfs_period_us").strip()
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """This process's control group and its parents, innermost first; both versions of the file system."""
    base = root / "sys/fs/cgroup"
    folders: list[Path] = []
    for line in _read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            top = base
        elif controller in controllers.split(","):
            top = base / controllers if (base / controllers).is_dir() else base / controller
        else:
            continue
        inner = top / path.strip("/")
        folders += [folder for folder in (inner, *inner.parents) if folder == top or top in folder.parents]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def _system_memory(root: Path) -> tuple[int, int]:
    fields = dict(line.split(":", 1) for line in _read_text(root / "proc/meminfo").splitlines() if ":" in line)
    if "MemTotal" in fields and "MemAvailable" in fields:
        total, available = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
        return total, available
    import psutil

    memory = psutil.virtual_memory()
    return memory.total, memory.available


def _reclaimable(folder: Path) -> int:
    """Bytes of file cache that the kernel gives up when memory is short; counted as used by the control group."""
    for line in _read_text(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file") and value.isdigit():
            return int(value)
    return 0


def _read_number(*paths: Path) -> float | None:
    """The number in the first of the files that holds one; `max` and absence mean None."""
    for path in paths:
        text = _read_text(path).strip()
        if text.isdigit():
            return float(text)
    return None


def _read_text(path: Path) -> str:
    """The file's text; empty where it is missing or may not be read, as under /sys in many containers."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
