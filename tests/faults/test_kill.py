"""kill -9, again and again, at random moments and in the middle of saves: real processes, a chain of resumptions."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from stages.processes import Command, rows_in

from faults.conftest import Words, expect_equal
from ppomax.cli import main
from ppomax.engine.checkpoint import checkpoint_number, checkpoints, latest_checkpoint
from ppomax.engine.durable import TEMPORARY

# What a process is doing when it is killed, and how likely the draw is: whatever it does; writing a checkpoint; having
# just given one its name (and deleting the one before); starting.
MOMENTS = {"any": 4, "save": 3, "renamed": 2, "start": 1}
SECONDS = {"any": 0.5, "save": 0.03, "renamed": 0.01, "start": 2.0}

CASES = [
    pytest.param("ppo", 5, ("--iterations", "14"), id="ppo, 5 kills"),
    pytest.param("ppo", 50, ("--iterations", "60"), id="ppo, 50 kills", marks=pytest.mark.faults),
    pytest.param("sft", 12, ("--epochs", "8"), id="sft, 12 kills", marks=pytest.mark.faults),
    pytest.param("reward", 12, ("--epochs", "8"), id="reward, 12 kills", marks=pytest.mark.faults),
]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("verb", "kills", "length"), CASES)
def test_killed_again_and_again_it_ends_as_if_it_never_had_been(
    verb: str, kills: int, length: tuple[str, ...], words: Words, uninterrupted: Callable[..., Path],
    command: type[Command], tmp_path: Path,
) -> None:  # fmt: skip
    whole = uninterrupted(verb, *length)
    draw, run_dir = random.Random(f"{verb} {kills}"), tmp_path / "run"
    arguments = [*words(verb, run_dir, *length), "--resume"]
    reached, happened = -1, Counter[str]()
    for attempt in range(kills):
        running = command(arguments, tmp_path / "log")
        moment = draw.choices([*MOMENTS], [*MOMENTS.values()])[0]
        _wait(running, run_dir, moment, reached)
        time.sleep(draw.random() * SECONDS[moment])
        assert running.process.is_alive(), f"it ended before it could be killed; give it more steps: {running.said()}"
        assert running.stop(signal.SIGKILL) == -9, running.said()
        newest, problems = latest_checkpoint(run_dir / "checkpoints")
        assert problems == [], f"kill {attempt} ({moment}) left a damaged checkpoint"
        saved = -1 if newest is None else checkpoint_number(newest)
        # Every row but the last one had been saved after.
        assert saved >= reached and saved >= rows_in(run_dir / "metrics.jsonl") - 2, f"kill {attempt} ({moment})"
        left = any(path.name.startswith(TEMPORARY) for path in (run_dir / "checkpoints").glob(".*"))
        happened.update([moment, *(["within a save"] if left else []), *(["progress"] if saved > reached else [])])
        reached = saved
    print(f"{verb}: {sum(happened[moment] for moment in MOMENTS)} kills: {dict(happened)}, saved up to {reached}")
    assert happened["within a save"] and happened["progress"]
    assert main(arguments) == 0
    expect_equal(verb, run_dir, whole)
    assert all(path.name[0] != "." for path in (run_dir / "checkpoints").iterdir())


def _wait(running: Command, run_dir: Path, moment: str, reached: int) -> None:
    """Until the process is where it is to be killed."""
    folder = run_dir / "checkpoints"

    def saving() -> bool:
        return any(path.name.startswith(f"{TEMPORARY}{unit}-") for path in _entries(folder) for unit in UNITS)

    def renamed() -> bool:
        return any(checkpoint_number(path) > reached for path in checkpoints(folder))

    ready = {"any": lambda: rows_in(run_dir / "metrics.jsonl") > reached + 1, "save": saving, "renamed": renamed}
    if moment in ready:
        running.wait_for(ready[moment])


UNITS = ("iteration", "step")


def _entries(folder: Path) -> list[Path]:
    try:
        return [*folder.iterdir()]
    except FileNotFoundError:
        return []
