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
    "distinct_2": 0.75,
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
        ("distinct_2", "distinct_2", 0.59, 0.61),  # 0.8 * 0.75
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


@pytest.mark.parametrize("start", [0.8, 0.55])
def test_a_limit_that_always_cuts_most_answers_is_named_from_the_first_row_on(start: float) -> None:
    rows = [{"iteration": i + 1, "truncated_share": start} for i in range(8)]
    for upto in (1, 3, 8):
        (alarm,) = check(rows[:upto])
        assert (alarm.name, alarm.limit, alarm.severity) == ("truncated_share", 0.5, "warn")
        assert "sampling.max_new_tokens" in alarm.message
    assert check([{"iteration": 1, "truncated_share": 0.49}]) == []


def test_scores_that_were_all_alike_have_no_spread_to_measure_by() -> None:
    rows = [{"iteration": i + 1, "score_mean": 1.0, "score_std": 0.0} for i in range(3)]
    rows += [{"iteration": i + 1, "score_mean": 1.1, "score_std": 0.01} for i in range(3, 8)]
    assert check(rows) == []


@pytest.mark.parametrize(
    ("responses", "share", "fires"),
    [
        (8, 1 / 8, False),  # one of the 24 that the window has: 4 %, but one
        (8, 2 / 8, True),  # two of 24
        (100, 7 / 100, True),  # seven of 300: 2.3 %
        (100, 5 / 100, False),  # five of 300: 1.7 %
        (1, 1.0, False),  # one of three is a third, and no reason to stop
    ],
)
def test_a_single_broken_answer_is_no_alarm(responses: int, share: float, fires: bool) -> None:
    rows = [{"iteration": i, "response_length": 20.0, "tokens/generated": 20 * responses, "degenerate_share": 0.0}
            for i in range(5)]  # fmt: skip
    rows[-1]["degenerate_share"] = share
    assert [alarm.name for alarm in check(rows)] == ["degenerate_share"] * fires


@pytest.mark.parametrize(("length", "warn", "stop"), [(20.0, 15.0, 60.0), (64.0, 15.0, 60.0), (256.0, 60.0, 240.0)])
def test_long_answers_may_be_further_away(length: float, warn: float, stop: float) -> None:
    for count in (1, 5):
        rows = [{"iteration": i, "response_length": length, "kl_per_sequence": warn - 0.1} for i in range(count)]
        assert check(rows) == []
        rows = [row | {"kl_per_sequence": warn + 0.1} for row in rows]
        assert [(a.severity, a.limit) for a in check(rows)] == [("warn", warn)]
        rows = [row | {"kl_per_sequence": stop + 0.1} for row in rows]
        assert [(a.severity, a.limit) for a in check(rows)] == [("stop", stop)]


def test_growing_answers_do_not_raise_the_kl_limits() -> None:
    rows = [{"iteration": i, "response_length": 64.0, "kl_per_sequence": 1.0} for i in range(3)]
    rows += [{"iteration": i, "response_length": 110.0, "kl_per_sequence": 15.1} for i in range(3, 8)]
    assert [alarm.limit for alarm in check(rows)] == [15.0]


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
