"""The parts of the time that are drawn: innermost ones, which together are the whole."""

from __future__ import annotations

import warnings

import pytest

from ppomax.monitor.plots import GREEN, shades, stacked_bars
from ppomax.monitor.time_parts import time_parts

ROWS = [
    {
        "seconds/other": 1.0, "seconds/train": 5.0, "seconds/train/critic": 4.0, "seconds/train/other": 1.0,
        "seconds/score": 3.0, "seconds/score/reward/rm": 2.5, "seconds/score/reward/tiny": 0.01,
        "seconds/score/policy": 0.4, "seconds/score/other": 0.09, "seconds/generate": 2.0, "seconds/total": 11.0,
    },
    {
        "seconds/other": 1.0, "seconds/train": 6.0, "seconds/train/critic": 4.0, "seconds/train/policy": 1.5,
        "seconds/train/other": 0.5, "seconds/generate": 2.0, "seconds/total": 9.0,
    },
]  # fmt: skip


def test_innermost_parts_in_the_order_of_an_iteration() -> None:
    parts = {label: values for label, values, _ in time_parts(ROWS)}
    assert [*parts] == [
        "generate", "score: policy", "score: reward/rm", "score: rest", "train: policy", "train: critic", "train: rest",
        "other",
    ]  # fmt: skip
    # What is tiny is in the rest of its group, and a row that lacks a part has none of it.
    assert parts["score: rest"] == pytest.approx([0.1, 0.0]) and parts["train: policy"] == [0.0, 1.5]
    assert [sum(column) for column in zip(*parts.values(), strict=True)] == pytest.approx([11.0, 9.0])


def test_every_part_has_a_colour_of_its_own() -> None:
    colours = [colour for _, _, colour in time_parts(ROWS)]
    assert len(set(colours)) == len(colours)
    assert shades(GREEN, 1) == [GREEN] and shades("#000000", 2) == ["#000000", "#b8b8b8"]


def test_rows_without_times_give_no_picture() -> None:
    assert time_parts([{"iteration": 0}]) == []
    assert stacked_bars([0.0], [], xlabel="iteration", ylabel="seconds") == ""


def test_a_reward_with_a_long_name_leaves_room_for_the_bars() -> None:
    name = "seconds/score/reward/package.module:" + "a_very_long_name_" * 6 + "end"
    row = {**ROWS[0], name: 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib says so where a legend leaves no room
        drawn = stacked_bars([0, 1], time_parts([row] * 2), xlabel="iteration", ylabel="seconds")
    assert "score: r…" in drawn and "long_name_end" in drawn


def test_one_bar_and_thousands_of_bars_can_be_drawn() -> None:
    for count in (1, 3000):
        drawn = stacked_bars(range(count), time_parts(ROWS[:1] * count), xlabel="iteration", ylabel="seconds")
        assert "score: reward/rm" in drawn and len(drawn) < 300_000
