"""What befalls one of two processes that torchrun started: killed, hung, or asked to stop."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from stages.toy import distance, metrics, weights

from faults.conftest import Words
from ppomax.cli import main

LENGTH = ("--iterations", "6", "--save.keep", "9")


class Launched:
    """`torchrun --nproc-per-node 2 -m ppomax ...` and the processes that it starts."""

    def __init__(self, words: list[str], log: Path) -> None:
        self.log = log
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        with log.open("w") as said:
            self.launcher = subprocess.Popen(
                [*launcher, "-m", "ppomax", *words],
                stdout=said,
                stderr=said,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def rank(self, number: int) -> psutil.Process:
        """The process of that number."""
        for child in psutil.Process(self.launcher.pid).children(recursive=True):
            if child.environ().get("RANK") == str(number):
                return child
        raise AssertionError(f"no process {number}: {self.log.read_text()}")

    def wait_for(self, happened: Callable[[], bool], seconds: float = 200) -> None:
        """Wait until something has happened while the launcher runs."""
        end = time.monotonic() + seconds
        while not happened():
            assert self.launcher.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.01)

    def end(self, seconds: float = 120) -> int:
        """Wait for the launcher's end; returns its exit code."""
        return self.launcher.wait(seconds)


@pytest.fixture
def launch(words: Words, tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """A PPO run in two processes; nothing of it outlives the test."""
    started: list[Launched] = []

    def start(*more: str) -> Launched:
        log = tmp_path / f"log-{len(started)}"
        started.append(Launched(words("ppo", tmp_path / "run", *LENGTH, *more), log))
        return started[-1]

    yield start
    for one in started:
        if one.launcher.poll() is None:
            for process in [*psutil.Process(one.launcher.pid).children(recursive=True), one.launcher]:
                process.kill()
        one.launcher.wait()


def saved(folder: Path, number: int) -> Callable[[], bool]:
    return lambda: (folder / "run" / "checkpoints" / f"iteration-{number}").exists()


def expect_the_same(words: Words, uninterrupted: Callable[..., Path], run_dir: Path) -> None:
    """The rest of the run, in one process, ends where one process would have got to alone."""
    assert main(words("ppo", run_dir, *LENGTH, "--resume")) == 0
    whole = uninterrupted("ppo", *LENGTH)
    assert len(metrics(run_dir)) == len(metrics(whole)) == 6
    assert [r["score_mean"] for r in metrics(run_dir)] == pytest.approx(
        [r["score_mean"] for r in metrics(whole)], abs=1e-3
    )
    assert distance(weights(whole / "final"), weights(run_dir / "final")) < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), pytest.param(("--save.background",), marks=pytest.mark.faults)], ids=str)
def test_a_killed_process_ends_the_others_and_the_run_goes_on(
    options: tuple[str, ...],
    launch: Callable[..., Launched],
    words: Words,
    uninterrupted: Callable[..., Path],
    tmp_path: Path,
) -> None:
    running = launch(*options)
    running.wait_for(saved(tmp_path, 1))
    other = running.rank(0)
    running.rank(1).kill()
    assert running.end() != 0
    assert not other.is_running() or other.status() == psutil.STATUS_ZOMBIE
    assert not (tmp_path / "run" / "summary.json").exists()
    expect_the_same(words, uninterrupted, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("launcher_too", [False, True])  # which then hands the signal on: each process hears it twice
def test_sigterm_to_both_processes_saves_together_and_ends_well(
    launcher_too: bool,
    launch: Callable[..., Launched],
    words: Words,
    uninterrupted: Callable[..., Path],
    tmp_path: Path,
) -> None:
    running = launch()
    running.wait_for(saved(tmp_path, 0))
    for number in (0, 1):  # as a scheduler does: to every process of the job
        running.rank(number).send_signal(signal.SIGTERM)
    if launcher_too:
        running.launcher.send_signal(signal.SIGTERM)
    assert (running.end() == 0) is not launcher_too, running.log.read_text()
    assert "and saved in" in running.log.read_text()
    assert not (tmp_path / "run" / "summary.json").exists()
    expect_the_same(words, uninterrupted, tmp_path / "run")


@pytest.mark.faults
def test_the_others_give_up_on_a_process_that_hangs(launch: Callable[..., Launched], tmp_path: Path) -> None:
    running = launch("--compute.wait-minutes", "0.1", "--iterations", "500")
    running.wait_for(saved(tmp_path, 0))
    hung = running.rank(1)
    hung.suspend()
    try:
        said = running.log.read_text
        running.wait_for(lambda: "not all of 2 processes arrived" in said() or "did not answer" in said(), 120)
    finally:
        hung.resume()
    assert running.end() != 0
    assert re.search("Of 2 processes 1 did not answer within 5 s|Ranks 1 failed to pass", said()), said()
