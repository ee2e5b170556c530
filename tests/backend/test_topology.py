"""The machine as the CPU backend reads it, on file systems laid out for the purpose."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sagellm_backend.cpu import topology
from sagellm_backend.cpu.topology import read_memory, read_topology

GIB = 2**30


class Machine:
    """A root folder with the files that Linux has."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, text: str) -> Machine:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return self

    def memory(self, total: int, available: int) -> Machine:
        text = f"MemTotal: {total // 1024} kB\nMemFree: 1 kB\nMemAvailable: {available // 1024} kB\n"
        return self.write("proc/meminfo", text)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    machine = Machine(tmp_path)
    machine.write("proc/cpuinfo", "model name\t: Fast 9000\nflags\t\t: fpu avx2 fma amx_tile\n\nmodel name\t: other\n")
    for cpu in range(4):  # two cores of two threads
        machine.write(f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{cpu % 2},{cpu % 2 + 2}\n")
    return machine.memory(64 * GIB, 40 * GIB)


def test_a_machine_without_limits(machine: Machine) -> None:
    found = read_topology(machine.root)
    assert (found.model_name, found.physical_cores) == ("Fast 9000", 2)
    assert found.features >= {"avx2", "fma", "amx_tile"}
    assert "fpu" not in found.features
    assert (found.quota_cpus, found.usable_threads) == (None, 2)
    memory = read_memory(machine.root)
    assert (memory.total_bytes, memory.available_bytes) == (64 * GIB, 40 * GIB)


def test_limits_of_a_container(machine: Machine) -> None:
    """Version 2: the own group sets no limit, its parent does; file cache counts as free."""
    machine.write("proc/self/cgroup", "0::/pod/main\n")
    machine.write("sys/fs/cgroup/pod/main/memory.max", "max\n").write("sys/fs/cgroup/pod/main/cpu.max", "max 100000\n")
    machine.write("sys/fs/cgroup/pod/memory.max", f"{8 * GIB}\n").write("sys/fs/cgroup/pod/cpu.max", "150000 100000\n")
    machine.write("sys/fs/cgroup/pod/memory.current", f"{5 * GIB}\n")
    machine.write("sys/fs/cgroup/pod/memory.stat", f"anon 1\ninactive_file {GIB}\n")
    memory = read_memory(machine.root)
    assert (memory.total_bytes, memory.available_bytes) == (8 * GIB, 4 * GIB)
    found = read_topology(machine.root)
    assert (found.quota_cpus, found.usable_threads) == (1.5, 1)


def test_limits_of_the_older_control_groups(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "4:memory:/box\n3:cpu,cpuacct:/box\n1:name=systemd:/\n")
    machine.write("sys/fs/cgroup/memory/box/memory.limit_in_bytes", f"{2 * GIB}\n")
    machine.write("sys/fs/cgroup/memory/box/memory.usage_in_bytes", f"{3 * GIB}\n")
    machine.write("sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us", "400000\n")
    machine.write("sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us", "100000\n")
    memory = read_memory(machine.root)
    assert (memory.total_bytes, memory.available_bytes) == (2 * GIB, 0)
    assert read_topology(machine.root).quota_cpus == 4.0


def test_limits_above_the_machine_mean_nothing(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/\n").write("sys/fs/cgroup/memory.max", str(2**63 - 1))
    assert read_memory(machine.root).total_bytes == 64 * GIB


def test_a_system_without_proc_is_still_described(tmp_path: Path) -> None:
    found, memory = read_topology(tmp_path), read_memory(tmp_path)
    assert found.model_name
    assert found.physical_cores >= 1
    assert 0 < memory.available_bytes <= memory.total_bytes


def test_this_machine() -> None:
    found, memory = read_topology(), read_memory()
    assert found.usable_threads >= 1
    assert found.features <= set(topology._FEATURES.values())
    assert 0 < memory.available_bytes <= memory.total_bytes
