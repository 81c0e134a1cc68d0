"""pytest on a copy of src/, in a process of its own that is forked from one which has imported torch once.

Importing torch and transformers takes longer than most tests. Nothing of ppomax may be imported before the fork: the
child puts the copy first on its path, and `mutation.witness` insists that the copy is what it got.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from mutation.mutant import ROOT, Mutation, copied_source
from mutation.witness import COPY, MODULE, REPORT

SECONDS = 900  # for one process, on a busy machine
PYTEST = (
    "-x", "-q", "-p", "no:cacheprovider", "-p", "mutation.witness", "--timeout=0", "--hypothesis-seed=0",
    "-W", "ignore::pytest.PytestAssertRewriteWarning",
)  # fmt: skip
# What the tests import, apart from ppomax and themselves.
PRELOADED = (
    "hypothesis", "jaxtyping", "matplotlib", "pydantic", "rich.progress", "safetensors.torch", "scipy.stats", "torch",
    "torch.distributed.checkpoint", "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama", "transformers.generation", "tyro", "yaml",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How one pytest process ended: its exit code (None: out of time), the witness's report, and what it printed."""

    code: int | None
    report: dict[str, str | bool]
    said: str
    seconds: float

    @property
    def caught_by(self) -> str | None:
        """The test that noticed; None where a run was green, broken, or a test merely crashed."""
        return str(self.report["test"]) if self.code == 1 and self.report.get("noticed") else None

    @property
    def verdict(self) -> str:
        """The cell of the table."""
        if self.caught_by is not None:
            return self.caught_by.removeprefix("tests/")
        if self.code == 0:
            return "SURVIVED"
        if self.code is None:
            return f"NO VERDICT: not done after {SECONDS} s"
        return f"NO VERDICT: pytest ended with {self.code}; {self.report.get('error', 'no test failed')}"


@dataclass(frozen=True)
class Trial:
    """A pytest process in progress."""

    pid: int
    folder: tempfile.TemporaryDirectory[str]
    began: float

    @classmethod
    def start(cls, tests: Sequence[str], mutation: Mutation | None) -> Trial:
        """Run `tests` on a copy of src/ in which one mutation, or none, is planted."""
        began, folder = time.monotonic(), tempfile.TemporaryDirectory(prefix="ppomax-mutate-")
        copy = copied_source(Path(folder.name))
        if mutation is not None:
            mutation.plant(copy)
        pid = os.fork()
        if pid == 0:
            _run_pytest(Path(folder.name), copy, tests, mutation.module if mutation else "")
        return cls(pid, folder, began)

    def poll(self) -> Outcome | None:
        """How it ended; None while it runs."""
        seconds = time.monotonic() - self.began
        ended, status = os.waitpid(self.pid, os.WNOHANG)
        if not ended and seconds < SECONDS:
            return None
        if not ended:
            self.stop()
        report, said = Path(self.folder.name, "report.json"), Path(self.folder.name, "said")
        noted = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
        text = said.read_text(encoding="utf-8", errors="replace") if said.exists() else ""
        self.folder.cleanup()
        return Outcome(os.waitstatus_to_exitcode(status) if ended else None, noted, text, seconds)

    def stop(self) -> None:
        """Kill it, with what it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def preload() -> None:
    """Import what the tests need, once for all; on one thread, since a fork copies only the thread that calls it."""
    os.environ.update(
        OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1"
    )
    for name in PRELOADED:
        importlib.import_module(name)
    assert "ppomax" not in sys.modules


def trials(work: Sequence[tuple[Sequence[str], Mutation | None]], jobs: int) -> Iterator[Outcome]:
    """The outcome of each piece of work, in order, with at most `jobs` processes at a time."""
    waiting, running, done = deque(enumerate(work)), dict[int, Trial](), dict[int, Outcome]()
    try:
        for number in range(len(work)):
            while number not in done:
                while waiting and len(running) < jobs:
                    index, (tests, mutation) = waiting.popleft()
                    running[index] = Trial.start(tests, mutation)
                for index, trial in list(running.items()):
                    if (outcome := trial.poll()) is not None:
                        done[index] = outcome
                        del running[index]
                time.sleep(0.02)
            yield done.pop(number)
    finally:
        for trial in running.values():
            trial.stop()
            trial.folder.cleanup()


def _run_pytest(folder: Path, copy: Path, tests: Sequence[str], module: str) -> None:
    """The forked child's life; it never returns."""
    code = 70
    try:
        os.setpgid(0, 0)
        said = os.open(folder / "said", os.O_CREAT | os.O_WRONLY)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.chdir(ROOT)
        os.environ.update({
            COPY: str(copy), MODULE: module, REPORT: str(folder / "report.json"),
            "PYTHONPATH": os.pathsep.join((str(copy), str(ROOT / "tests"))),
            "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis"),
        })  # fmt: skip
        sys.path.insert(0, str(copy))
        code = int(pytest.main([*PYTEST, f"--basetemp={folder / 'tests'}", *tests]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
