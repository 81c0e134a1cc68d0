"""`ppomax VERB ...` in a process of its own, to be stopped by real signals.

Processes are forked from a server that has imported torch once and never computed, so that each starts at once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["pytest", "ppomax.cli", "ppomax.stages.quickstart", "stages.processes"])


class Command:
    """A running command line; `log` gets its stdout and stderr."""

    running: ClassVar[list[Command]] = []

    def __init__(self, words: Sequence[str], log: Path) -> None:
        self.log = log
        self.process = _CONTEXT.Process(target=_run, args=(list(words), str(log)))
        self.process.start()
        Command.running.append(self)

    def wait_for(self, happened: Callable[[], bool], seconds: float = 240) -> None:
        """Wait until something has happened while the command runs; a command that ends before is a failure."""
        end = time.monotonic() + seconds
        while not happened():
            assert self.process.is_alive(), (
                f"ended with {self.process.exitcode} before it could be stopped: {self.said()}"
            )
            assert time.monotonic() < end, f"nothing happened for {seconds} s: {self.said()}"
            time.sleep(0.002)

    def stop(self, number: signal.Signals) -> int:
        """Send a signal, wait for the end; returns the exit code (minus the signal's number if it was killed by it)."""
        self.signal(number)
        return self.end()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self, seconds: float = 240) -> int:
        """Wait for the end; returns the exit code."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s: {self.said()}"
        return self.process.exitcode

    def said(self) -> str:
        """What it has printed."""
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    @classmethod
    def end_all(cls) -> None:
        """Kill what is still running."""
        for command in cls.running:
            if command.process.is_alive():
                command.process.kill()
            command.process.join()
        cls.running.clear()


def rows_in(path: Path) -> int:
    """Complete lines of a file, 0 if there is none."""
    with suppress(FileNotFoundError):  # a run that starts over may delete it at any moment
        return path.read_bytes().count(b"\n")
    return 0


def _run(words: list[str], log: str) -> None:
    import torch

    from ppomax.cli import main

    torch.set_num_threads(1)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.exit(main(words))
