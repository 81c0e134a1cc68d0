"""Ctrl-C and SIGTERM: a run finishes its step, saves and stops; asked a second time, it stops at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from ppomax.errors import Interrupted

# Seconds in which a second SIGTERM may be the launcher's copy of the first.
ECHO = 10.0
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
    over, no_grace, own = threading.Event(), threading.Event(), os.getpid()
    heard = 0.0

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        if stop.by:
            # A scheduler that signals the whole job reaches the launcher too, which hands the signal on.
            echo = number == stop.by == signal.SIGTERM and _launched() and time.monotonic() - heard < ECHO
            if echo and not no_grace.is_set():
                return
            raise KeyboardInterrupt
        stop.by, heard = signal.Signals(number), time.monotonic()
        if os.getpid() != own:  # a fork of a reward hears its terminal's Ctrl-C too; what it does is still asked for
            return
        if number == signal.SIGTERM and grace is not None:
            threading.Thread(target=_end_of_grace, args=(grace, over, no_grace), daemon=True).start()
        say()

    try:
        with _handling(ask, signal.SIGINT, signal.SIGTERM):
            yield
    except KeyboardInterrupt:
        if stop.by != signal.SIGTERM:
            raise
        raise interrupted(stop.by, f"stopped at once; nothing after the last checkpoint in {kept} is kept") from None
    finally:
        over.set()


@contextmanager
def ending_at_sigterm() -> Iterator[None]:
    """SIGTERM where nothing is saved: a KeyboardInterrupt with the signal's number, so that what is open is closed."""

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    with _handling(end, signal.SIGTERM):
        yield


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> Iterator[None]:
    before = {}
    try:
        for number in numbers:
            try:
                before[number] = signal.signal(number, handler)
            except ValueError:  # not in the main thread: the caller's handlers stay
                break
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _launched() -> bool:
    """Whether this is one of several processes; engine/world.py knows too, but brings torch along."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _end_of_grace(seconds: float, over: threading.Event, no_grace: threading.Event) -> None:
    if not over.wait(seconds):
        no_grace.set()
        os.kill(os.getpid(), signal.SIGTERM)


# A pool of processes ends its forks by SIGTERM and waits for them: each has to end, at whatever moment it comes.


# What this thread's fork blocked before: None where the handler is not ours.
_forking = threading.local()


def _before_fork() -> None:
    ours = getattr(signal.getsignal(signal.SIGTERM), "__module__", "") == __name__
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}) if ours else None


def _after_fork_in_parent() -> None:
    if _forking.mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _after_fork_in_child() -> None:
    if _forking.mask is not None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
)  # fmt: skip
