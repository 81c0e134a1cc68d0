"""Work in the background: one piece at a time, and no failure is lost."""

from __future__ import annotations

import signal
import threading

import pytest
import torch

from ppomax.engine.background import Background, copied


def test_the_caller_goes_on_and_the_next_piece_waits_for_the_one_before() -> None:
    background, gate, done = Background(), threading.Event(), []
    background.start(lambda: (gate.wait(20), done.append(1)))
    background.settle(wait=False)
    assert done == []
    threading.Timer(0.05, gate.set).start()
    background.start(lambda: done.append(2))
    assert done[0] == 1
    background.settle()
    assert done == [1, 2]
    background.settle()


@pytest.mark.parametrize("look", [True, False])
def test_a_failure_is_raised_once_in_the_thread_that_looks(look: bool) -> None:
    background, failed = Background(), threading.Event()

    def fail() -> None:
        try:
            raise OSError("the disk is full")
        finally:
            failed.set()

    background.start(fail)
    if not look:
        with pytest.raises(OSError, match="the disk is full"):
            background.start(lambda: None)
    else:
        assert failed.wait(20)
        with pytest.raises(OSError, match="the disk is full"):
            while True:  # the thread may still be on its way out
                background.settle(wait=False)
    background.settle()


def test_who_is_interrupted_while_it_waits_can_wait_again() -> None:
    background, gate, done = Background(), threading.Event(), []
    background.start(lambda: (gate.wait(20), done.append(1)))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        timer = threading.Timer(0.2, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            background.settle()
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == []
    gate.set()
    background.settle()
    assert done == [1]


def test_copies_are_not_written_to() -> None:
    weight = torch.ones(3, requires_grad=True)
    copies = copied({"weight": weight})
    with torch.no_grad():
        weight.add_(1)
    assert copies["weight"].tolist() == [1, 1, 1] and not copies["weight"].requires_grad
