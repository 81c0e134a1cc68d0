"""What this machine lets a process have, or the control groups do that a container or a cluster's job runs in."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

CGROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def cores() -> int:
    """Cores' worth of time that this process may use at once."""
    return math.ceil(min(host_cores(), _cpu_quota()))


def host_cores() -> int:
    """Cores that this process may run on, two threads of one counted once, as torch does."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, psutil.cpu_count(logical=False) or allowed)


def memory_total() -> float:
    """Bytes of memory that this machine has, or that its control groups let this process have."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _memory_limits())])


def memory_available() -> float:
    """Bytes of memory that are free for this process."""
    return min([psutil.virtual_memory().available, *(limit - used for limit, used in _memory_limits())])


def limit_threads() -> None:
    """Take torch's threads back to what a control group lets run at once, unless the environment says how many.

    torch counts the machine's cores. Of 64 threads with time for four, most wait at every product for one without.
    """
    asked = any(name in os.environ for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))
    if not asked and torch.get_num_threads() > (quota := _cpu_quota()):
        torch.set_num_threads(math.ceil(quota))


def _cpu_quota() -> float:
    """Processors' worth of time; infinite where nothing limits it."""
    found = [_text(group, "cpu.max") for group in _groups("")]
    found += [f"{_text(g, 'cpu.cfs_quota_us')} {_text(g, 'cpu.cfs_period_us')}" for g in _groups("cpu")]
    quotas = (text.split() for text in found)
    return min((int(q[0]) / int(q[1]) for q in quotas if len(q) == 2 and q[0].isdigit()), default=math.inf)


def _memory_limits() -> list[tuple[float, float]]:
    """Limit and use in bytes, what can be dropped of files' contents left out, of every group that has a limit."""
    names = {
        "": ("max", "current", "inactive_file"),
        "memory": ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"),
    }
    found = []
    for controller, (limit, used, cached) in names.items():
        for group in _groups(controller):
            numbers = _text(group, f"memory.{limit}"), _text(group, f"memory.{used}")
            if all(number.isdigit() for number in numbers):
                stat = dict(line.split() for line in _text(group, "memory.stat").splitlines())
                found.append((float(numbers[0]), float(numbers[1]) - float(stat.get(cached, 0))))
    return found


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the control groups that hold this process, the innermost first; of version 2 for the controller ""."""
    for line in _text(OWN.parent, OWN.name).splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            root = CGROUPS / controller
            inner = root / path.lstrip("/")
            yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(root))


def _text(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
