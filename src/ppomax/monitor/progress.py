"""A progress bar with rate and time left; plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class LastingConsole(Console):
    """A console whose reader may go (`| tee` on Ctrl-C): from then on it is silent, and the work goes on."""

    def on_broken_pipe(self) -> None:
        """rich ends the program here."""
        self.quiet = True


class Advance(Protocol):
    """Moves the bar by `amount`; `note` is a short text shown beside it, such as the current score."""

    def __call__(self, amount: int = 1, note: str = "") -> None: ...


@contextmanager
def progress(
    label: str, total: int, *, done: int = 0, unit: str = "steps", file: TextIO | None = None, quiet: bool = False
) -> Iterator[Advance]:
    """`with progress("ppo", 100) as advance:` shows a bar on a terminal.

    Elsewhere it prints a line at most every 10 seconds, and one at the end. `done` counts what was there before (a
    resumed run): it does not enter the rate. `file` is stderr unless given. quiet: show nothing.
    """
    if quiet:
        yield _nothing
        return
    console = LastingConsole(file=file or sys.stderr)
    shown = _bar if console.is_terminal else _lines
    with shown(console, label, total, done, unit) as advance:
        yield advance


@contextmanager
def _bar(console: Console, label: str, total: int, done: int, unit: str) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
    )
    start, count = time.monotonic(), done
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(label, total=total, completed=done, rate="", note="")

        def advance(amount: int = 1, note: str = "") -> None:
            nonlocal count
            count += amount
            rate = _rate(count - done, time.monotonic() - start, unit)
            bars.update(task, advance=amount, rate=rate, note=note)

        yield advance


@contextmanager
def _lines(console: Console, label: str, total: int, done: int, unit: str) -> Iterator[Advance]:
    start = printed = time.monotonic()
    count, last_note = done, ""

    def show(now: float) -> None:
        elapsed = now - start
        left = (total - count) * elapsed / (count - done) if count > done else None
        ending = f"{_clock(elapsed)} elapsed" if count >= total or left is None else f"{_clock(left)} left"
        parts = [f"{label}: {count}/{total} {unit}", _rate(count - done, elapsed, unit), ending, last_note]
        with suppress(BrokenPipeError):  # nobody reads any longer
            print(", ".join(part for part in parts if part), file=console.file, flush=True)

    def advance(amount: int = 1, note: str = "") -> None:
        nonlocal count, printed, last_note
        count, last_note = count + amount, note
        now = time.monotonic()
        if now - printed >= _SECONDS_BETWEEN_LINES:
            printed = now
            show(now)

    try:
        yield advance
    finally:
        show(time.monotonic())


def _nothing(amount: int = 1, note: str = "") -> None:
    """Progress that nobody sees."""


def _rate(amount: int, elapsed: float, unit: str) -> str:
    if amount <= 0 or elapsed <= 0:
        return ""
    rate = amount / elapsed
    if rate >= 1:
        return f"{rate:,.1f} {unit}/s"
    return f"{1 / rate:,.1f} s per {unit.removesuffix('s')}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
