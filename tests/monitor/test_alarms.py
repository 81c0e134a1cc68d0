from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from ppomax.monitor.alarms import Limits, check

HEALTHY = {
    "kl_per_sequence": 3.0,
    "response_length": 20.0,
    "perplexity": 4.0,
    "score_mean": 0.0,
    "score_std": 1.0,
    "entropy": 2.0,
    "degenerate_share": 0.0,
    "top_opening_share": 0.04,
    "top_closing_share": 0.04,
    "on_topic_share": 0.8,
    "truncated_share": 0.05,
    "clip_fraction": 0.1,
    "explained_variance": 0.3,
}


def history(key: str, value: Any, rows: int = 8) -> list[dict[str, Any]]:
    """Three healthy rows, then rows in which one measure has changed."""
    return [{"iteration": i + 1, **HEALTHY, **({key: value} if i >= 3 else {})} for i in range(rows)]


@pytest.mark.parametrize(
    ("name", "key", "over", "under"),
    [
        ("kl_per_sequence", "kl_per_sequence", 15.1, 14.9),
        ("kl_negative", "kl_per_sequence", -0.51, -0.49),
        ("behaviour_gap", "behaviour_gap", 0.11, 0.09),
        ("length_growth", "response_length", 36.1, 35.9),  # 1.8 * 20
        ("length_shrink", "response_length", 9.9, 10.1),  # 20 / 2
        ("perplexity", "perplexity", 2.39, 2.41),  # 0.6 * 4
        ("entropy", "entropy", 0.99, 1.01),  # 0.5 * 2
        ("score_std_growth", "score_std", 2.6, 2.4),
        ("score_std_fall", "score_std", 0.24, 0.26),
        ("score_rise", "score_mean", 3.1, 2.9),  # 0 + 3 * 1
        ("top_opening_share", "top_opening_share", 0.11, 0.095),
        ("top_closing_share", "top_closing_share", 0.11, 0.095),
        ("on_topic_share", "on_topic_share", 0.69, 0.71),
        ("degenerate_share", "degenerate_share", 0.021, 0.019),
        ("truncated_share", "truncated_share", 0.31, 0.29),
        ("clip_fraction", "clip_fraction", 0.36, 0.34),
        ("explained_variance", "explained_variance", -0.51, -0.49),
    ],
)
def test_each_rule_fires_beyond_its_limit_and_not_before(name: str, key: str, over: float, under: float) -> None:
    (alarm,) = check(history(key, over))
    assert (alarm.name, alarm.iteration, alarm.severity) == (name, 8, "warn")
    assert alarm.value == pytest.approx(over)
    assert ": " in alarm.message and ", limit " in alarm.message and len(alarm.message) > 80
    assert check(history(key, under)) == []


def test_one_bad_batch_is_noise() -> None:
    assert check(history("on_topic_share", 0.65, rows=4)) == []  # mean of 0.8, 0.8, 0.65 is 0.75
    assert check(history("on_topic_share", 0.65, rows=6))[0].name == "on_topic_share"


def test_relative_rules_wait_for_the_baseline_and_absolute_ones_do_not() -> None:
    rows = [{"iteration": i + 1, **HEALTHY, "kl_per_sequence": 20.0, "top_opening_share": 0.5} for i in range(3)]
    assert [alarm.name for alarm in check(rows)] == ["kl_per_sequence"]
    assert [alarm.name for alarm in check(rows[:1])] == ["kl_per_sequence"]


def test_a_phrase_share_that_is_high_from_the_start_is_not_a_collapse() -> None:
    # In a batch of 8 responses the smallest possible share is already 0.125.
    rows = [{"iteration": i + 1, "top_opening_share": 0.125} for i in range(8)]
    assert check(rows) == []
    rows[5:] = [{"iteration": i + 1, "top_opening_share": 0.25} for i in range(5, 8)]
    assert [alarm.name for alarm in check(rows)] == ["top_opening_share"]


def test_the_stop_limits_replace_the_warning() -> None:
    (drift,) = check(history("kl_per_sequence", 61.0))
    (broken,) = check(history("degenerate_share", 0.21))
    assert (drift.severity, drift.limit) == ("stop", 60.0)
    assert (broken.severity, broken.limit) == ("stop", 0.20)


@pytest.mark.parametrize("row", [{"value_loss": None, "nonfinite": ["value_loss"]}, {"value_loss": math.nan}])
def test_a_number_that_is_none_stops(row: dict[str, Any]) -> None:
    rows = history("entropy", 2.0)
    (alarm,) = check([*rows[:-1], rows[-1] | row])
    assert (alarm.name, alarm.severity) == ("nonfinite", "stop")
    assert "value_loss" in alarm.message


def test_training_rules_are_silent_while_only_the_critic_learns() -> None:
    rows = history("explained_variance", -5.0)
    assert check([row | {"phase": "critic"} for row in rows]) == []
    assert [alarm.name for alarm in check([row | {"phase": "policy"} for row in rows])] == ["explained_variance"]


def test_limits_can_be_set_and_missing_keys_are_skipped() -> None:
    rows = [{"iteration": 1, "kl_per_sequence": 3.0}]
    assert check(rows) == [] == check([])
    assert [alarm.name for alarm in check(rows, limits=Limits(kl_per_sequence=2.0))] == ["kl_per_sequence"]


def test_a_healthy_run_raises_nothing_at_any_iteration(make_ppo_rows: Callable[..., list[dict[str, Any]]]) -> None:
    rows = make_ppo_rows(iterations=24)
    assert [alarm for i in range(len(rows)) for alarm in check(rows[: i + 1])] == []
