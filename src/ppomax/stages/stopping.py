"""Ctrl-C and SIGTERM: a run finishes its step, saves and stops; asked a second time, it stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from ppomax.errors import Interrupted

# What a stopped run ends with: 130 as shells expect of Ctrl-C; 0 for a scheduler, to which anything else is a failure.
_EXIT = {signal.SIGINT: 130, signal.SIGTERM: 0}


@dataclass
class Stop:
    """By which signal a run was asked to stop, if it was."""

    by: signal.Signals | None = None


def interrupted(by: int, what: str) -> Interrupted:
    """The end of a run that was asked to stop: `what` happened, how to go on, and the exit code."""
    go_on = "To go on: the same command with --resume (quickstart: the same command)"
    return Interrupted(f"{what}. {go_on}", code=_EXIT[signal.Signals(by)])


@contextmanager
def asking_to_stop(stop: Stop, *, say: Callable[[], None], grace: float | None, kept: str) -> Iterator[None]:
    """The first signal asks for a save. A second one, or the end of SIGTERM's grace in seconds, stops at once.

    say: tells the user that the first was heard. kept: where the work is that a run stopped at once still has.
    """
    over = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.by:
            raise KeyboardInterrupt
        stop.by = signal.Signals(number)
        if number == signal.SIGTERM and grace is not None:
            threading.Thread(target=_end_of_grace, args=(grace, over), daemon=True).start()
        say()

    handlers = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                handlers[number] = signal.signal(number, ask)
            except ValueError:  # not in the main thread: the caller's handlers stay
                break
        yield
    except KeyboardInterrupt:
        if stop.by != signal.SIGTERM:
            raise
        raise interrupted(stop.by, f"stopped at once; nothing after the last checkpoint in {kept} is kept") from None
    finally:
        over.set()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _end_of_grace(seconds: float, over: threading.Event) -> None:
    if not over.wait(seconds):
        os.kill(os.getpid(), signal.SIGTERM)
