"""Signals of a run, and those of the processes that a reward forks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from ppomax.stages.stopping import Stop, asking_to_stop, ending_at_sigterm

FORK = multiprocessing.get_context("fork")


def listening(log: Path) -> tuple[Stop, AbstractContextManager[None]]:
    """A run's handlers; whoever hears a signal by them writes its process id to the log."""

    def say() -> None:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")

    stop = Stop()
    return stop, asking_to_stop(stop, say=say, grace=None, kept="checkpoints")


@pytest.mark.parametrize("delay", [0.0, 0.0, 0.0, 0.001, 0.01, 0.1])
@pytest.mark.parametrize("alone", [True, False])
def test_a_fork_ends_at_sigterm_at_whatever_moment(alone: bool, delay: float, tmp_path: Path) -> None:
    stop, handlers = listening(tmp_path / "log")
    with handlers if alone else ending_at_sigterm():
        fork = FORK.Process(target=time.sleep, args=(60,))
        fork.start()
        time.sleep(delay)
        fork.terminate()
        fork.join(20)
        found = fork.exitcode
        fork.kill()
    assert found == -signal.SIGTERM
    assert stop.by is None and not (tmp_path / "log").exists()


def test_pools_of_a_reward_come_to_their_end(tmp_path: Path) -> None:
    stop, handlers = listening(tmp_path / "log")
    with handlers:
        for _ in range(10):
            with FORK.Pool(2) as pool:
                assert pool.map(len, ["a", "bb"]) == [1, 2]
    assert stop.by is None and not (tmp_path / "log").exists()


def _answer(answers: multiprocessing.SimpleQueue[str]) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    answers.put("works on")
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        answers.put("ends")


def test_a_fork_works_on_at_ctrl_c_says_nothing_and_ends_at_the_second(tmp_path: Path) -> None:
    _, handlers = listening(tmp_path / "log")
    with handlers:
        answers = FORK.SimpleQueue()
        fork = FORK.Process(target=_answer, args=(answers,))
        fork.start()
        assert [answers.get(), answers.get()] == ["works on", "ends"]
        fork.join()
    assert not (tmp_path / "log").exists()


def test_the_run_itself_hears_as_before_after_a_fork(tmp_path: Path) -> None:
    stop, handlers = listening(tmp_path / "log")
    with handlers:
        fork = FORK.Process(target=len, args=("",))
        fork.start()
        fork.join()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.by == signal.SIGTERM
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert (tmp_path / "log").read_text() == f"{os.getpid()}\n"
    with pytest.raises(KeyboardInterrupt), ending_at_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
