"""The clock: parts of parts add up, work is summed, and rates are what they say."""

from __future__ import annotations

import pytest

from ppomax.monitor import clock as module
from ppomax.monitor.clock import Clock
from ppomax.types import Work


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock on a time that moves by one second whenever it is asked for."""
    seconds = iter(range(1000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(seconds)))
    return Clock(peak=20.0)


def test_parts_and_their_rest_add_up(clock: Clock) -> None:
    with clock("score"):  # 1
        with clock("score/policy"):  # 2 to 3
            pass
        for _ in range(2):
            with clock("score/reward/a/b"):  # 4 to 5, 6 to 7
                pass
    with clock("train"):  # 9 to 10
        pass
    row = clock.row()  # 11, and began at 0
    assert row == {
        "seconds/score/policy": 1.0, "seconds/score/reward/a/b": 2.0, "seconds/score": 7.0, "seconds/score/other": 4.0,
        "seconds/train": 1.0, "seconds/other": 3.0, "seconds/total": 11.0, "peak_flops_per_second": 20.0,
    }  # fmt: skip


def test_work_is_summed_and_set_against_time_and_peak(clock: Clock) -> None:
    with clock("train"):
        for tokens in (6, 2):
            with clock("train/policy", Work(tokens, slots=8, flops=10)):
                pass
        with clock("train/step"):
            pass
    clock.count("generate/decode", Work(3, slots=3))
    row = clock.row()
    assert row["seconds/train"] == 7.0 and row["seconds/train/policy"] == 2.0
    assert row["tokens/train/policy"] == 8 and row["padding/train/policy"] == row["padding/train"] == 0.5
    assert row["flops/train/policy"] == row["flops/train"] == row["flops/total"] == 20
    assert row["flops_per_second/train/policy"] == 10.0 and row["utilisation/train/policy"] == 0.5
    assert row["flops_per_second/train"] == 20 / 7 and row["utilisation/train"] == 1 / 7
    assert row["padding/total"] == 1 - 11 / 19
    assert row["tokens/generate/decode"] == 3 and "flops/generate/decode" not in row


def test_an_iteration_begins_with_nothing(clock: Clock) -> None:
    with clock("train", Work(1, 1, 1)):
        pass
    clock.restart()
    assert clock.row() == {"seconds/total": 1.0, "seconds/other": 1.0, "peak_flops_per_second": 20.0}


def test_without_a_peak_there_is_no_utilisation() -> None:
    clock = Clock()
    with clock("train"), clock("train/policy", Work(1, 1, 1)):
        pass
    assert not [key for key in clock.row() if key.startswith(("utilisation", "peak"))]
    assert clock.row()["flops_per_second/train/policy"] > 0
