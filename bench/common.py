"""What the benchmarks share: contenders in turn, each in a process of its own; the machine in words; tables."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

QUICKSTART = files("ppomax.data") / "quickstart"
DIALOGUES, PROMPTS = QUICKSTART / "dialogues.jsonl", QUICKSTART / "prompts.jsonl"

Run = dict[str, Any]


def in_turn(module: str, contenders: Mapping[str, Sequence[str]], repeats: int) -> dict[str, list[Run]]:
    """Run every contender `repeats` times, one at a time and in turn: a, b, a, b.

    contenders: for each name the arguments that make `python -m module` run it alone. Its last line on stdout is what
    it measured, as JSON. A process of its own gives each a peak of memory of its own.
    """
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for repetition in range(repeats):
        for name, arguments in contenders.items():
            command = [sys.executable, "-m", module, *arguments]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{repetition + 1}/{repeats} {name}: {runs[name][-1]}", file=sys.stderr, flush=True)
    return runs


def write_rows(path: Path, rows: Iterable[Run]) -> str:
    """Rows as lines of JSON; returns the path as settings take it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def peak_gib(device: str) -> float:
    """The most memory that this process has held, GiB; on a GPU the GPU's."""
    if device == "cuda":
        import torch  # not for a process that only starts others

        return torch.cuda.max_memory_allocated() / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def processor() -> str:
    """The processor's name and number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    return f"{os.cpu_count()} cores {name} ({platform.machine()})"


def versions(*packages: str) -> str:
    """The packages with their installed versions."""
    return ", ".join(f"{package} {version(package)}" for package in packages)


def spread(values: Iterable[float]) -> str:
    """Largest over smallest; a dash for a single value."""
    values = list(values)
    return f"{max(values) / min(values):.2f}" if len(values) > 1 else "–"


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
