"""What containers and clusters let a process have is read from its control groups, of either version."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from ppomax.engine import machine
from ppomax.engine.machine import cores, limit_threads, memory_available, memory_total
from ppomax.models.load import resolve_compute

GIB = 2**30
Write = Callable[[dict[str, str]], None]


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes files below a root of control groups, and `own`, which says where in it the process is."""
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "OWN", tmp_path / "own")
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64), raising=False)
    memory = psutil.virtual_memory()._replace(total=64 * GIB, available=48 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / (name if name == "own" else f"cgroup/{name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")

    yield write
    torch.set_num_threads(before)


VERSION_2 = {"own": "0::/", "cpu.max": "400000 100000", "memory.max": str(8 * GIB), "memory.current": str(3 * GIB),
             "memory.stat": f"anon 5\ninactive_file {GIB}"}  # fmt: skip
VERSION_1 = {"own": "7:memory:/job\n4:cpu,cpuacct:/job\n1:name=systemd:/", "cpu/job/cpu.cfs_quota_us": "350000",
             "cpu/job/cpu.cfs_period_us": "100000", "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000",
             "memory/job/memory.limit_in_bytes": str(8 * GIB), "memory/job/memory.usage_in_bytes": str(3 * GIB),
             "memory/job/memory.stat": f"cache 5\ntotal_inactive_file {GIB}",
             "memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": str(GIB)}  # fmt: skip
# Inside a container of version 1, whose group is the root of what it sees, under a path of the machine outside.
INSIDE = {"own": "7:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc"} | {
    name.replace("/job/", "/"): text for name, text in VERSION_1.items() if "/job/" in name
}
# A job below a user's slice: the narrowest limit counts, wherever it stands.
NESTED = {"own": "0::/slice/job", "slice/job/cpu.max": "max 100000", "slice/cpu.max": "400000 100000",
          "slice/job/memory.max": str(8 * GIB), "slice/job/memory.current": str(2 * GIB), "slice/memory.max": "max",
          "slice/memory.current": str(6 * GIB)}  # fmt: skip


@pytest.mark.parametrize("files", [VERSION_2, VERSION_1, INSIDE, NESTED])
def test_the_limits_of_a_container_count(files: dict[str, str], groups: Write) -> None:
    groups(files)
    assert cores() == 4
    assert memory_total() == 8 * GIB
    assert memory_available() == 6 * GIB


def test_an_outer_group_that_is_nearly_full_leaves_little(groups: Write) -> None:
    groups({**NESTED, "slice/memory.max": str(7 * GIB)})
    assert (memory_total(), memory_available()) == (7 * GIB, GIB)


@pytest.mark.parametrize("files", [{}, {"own": "0::/"}, {"own": "0::/", "cpu.max": "max 100000", "memory.max": "max"}])
def test_without_limits_the_machine_counts(files: dict[str, str], groups: Write) -> None:
    groups(files)
    assert cores() == 64
    assert (memory_total(), memory_available()) == (64 * GIB, 48 * GIB)


def test_torch_has_no_more_threads_than_may_run_at_once(groups: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    groups(VERSION_2)
    torch.set_num_threads(16)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "16")
            resolve_compute("cpu", "float32")
            assert torch.get_num_threads() == 16
    resolve_compute("cpu", "float32")
    assert torch.get_num_threads() == 4
    groups({"cpu.max": "50000 100000"})
    limit_threads()
    assert torch.get_num_threads() == 1
    groups({"cpu.max": "max 100000"})
    limit_threads()
    assert torch.get_num_threads() == 1


def test_a_real_group_is_found() -> None:
    """Version 1 or 2, where this test may make one."""
    name = f"ppomax-test-{os.getpid()}"
    for folder, quota, text in (
        (Path("/sys/fs/cgroup/cpu") / name, "cpu.cfs_quota_us", "50000"),
        (Path("/sys/fs/cgroup") / name, "cpu.max", "50000 100000"),
    ):
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / quota).write_text(text)
            code = (
                f"with open('{folder}/cgroup.procs', 'w') as file: file.write('0')\n"
                "from ppomax.engine.machine import cores\nprint(cores())"
            )
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            if "cgroup.procs" in done.stderr or "OSError" in done.stderr:
                continue
            assert done.stdout == "1\n", done.stderr
            return
        except OSError:
            continue
        finally:
            folder.rmdir()
    pytest.skip("no control group can be made here")
