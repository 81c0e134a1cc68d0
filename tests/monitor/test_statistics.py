from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppomax.monitor.statistics import correlation, histogram, win_rate
from ppomax.types import DataError


def test_win_rate_counts_ties_by_half() -> None:
    # differences 0.5 (win), 0.05 (tie: not above the limit), -0.2 (lose), 0.0 (tie)
    result = win_rate([1.0, 0.25, 0.1, 0.3], [0.5, 0.2, 0.3, 0.3], tie=0.0501, groups="abcd")
    assert (result.win, result.tie, result.lose) == (0.25, 0.5, 0.25)
    assert result.win_rate == 0.5


def test_win_rate_of_swapped_systems_adds_up_to_one() -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 40)).tolist()
    groups = [i // 4 for i in range(40)]
    there, back = (win_rate(x, y, tie=0.2, groups=groups) for x, y in ((a, b), (b, a)))
    assert there.win_rate + back.win_rate == pytest.approx(1)
    assert there.ci95 == pytest.approx([1 - back.ci95[1], 1 - back.ci95[0]], abs=0.02)
    assert there.ci95[0] < there.win_rate < there.ci95[1]


def test_interval_is_of_groups_and_not_of_rows() -> None:
    # 200 prompts decide everything; repeating each answer 5 times adds no information.
    outcome = [float(i % 2) for i in range(200)]
    single = win_rate(outcome, [0.5] * 200, tie=0, groups=range(200))
    repeated = win_rate(outcome * 5, [0.5] * 1000, tie=0, groups=list(range(200)) * 5)
    assert repeated.ci95 == pytest.approx(single.ci95)
    # The binomial standard error is sqrt(0.25 / 200) = 0.0354, and 1.96 of them to each side.
    assert single.ci95[1] - single.ci95[0] == pytest.approx(2 * 1.96 * 0.0354, abs=0.01)


@pytest.mark.parametrize("groups", [2, 5, 40])
def test_a_clean_sweep_is_not_certain(groups: int) -> None:
    """With one lost and one won group more, the resampled wins are binomial: n + 2 draws of (n + 1) / (n + 2)."""
    n, names = groups + 2, [i // 3 for i in range(3 * groups)]
    lost = [math.comb(n, k) * (1 / n) ** k * (1 - 1 / n) ** (n - k) for k in range(n + 1)]
    most_lost = next(k for k in range(n) if sum(lost[: k + 1]) >= 0.975)
    all_won = win_rate([1.0] * 3 * groups, [0.0] * 3 * groups, tie=0, groups=names)
    assert all_won.ci95 == (pytest.approx(1 - most_lost / n), 1.0)
    none_won = win_rate([0.0] * 3 * groups, [1.0] * 3 * groups, tie=0, groups=names)
    assert none_won.ci95 == (0.0, pytest.approx(most_lost / n))


@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_nineteen_in_twenty_intervals_hold_the_true_rate(rate: float) -> None:
    random, held = np.random.default_rng(0), 0
    for _ in range(200):
        of_prompt = random.beta(4 * rate, 4 * (1 - rate), size=30)  # prompts differ, samples of one resemble each other
        wins = random.random((30, 4)) < of_prompt[:, None]
        low, high = win_rate(wins.ravel().tolist(), [0.5] * 120, tie=0, groups=[i // 4 for i in range(120)]).ci95
        held += low <= rate <= high
    assert 0.90 <= held / 200 <= 0.995


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=12), st.integers(1, 4))
def test_the_interval_contains_the_rate(scores: list[float], per_group: int) -> None:
    found = win_rate(scores, [1.0] * len(scores), tie=0, groups=[i // per_group for i in range(len(scores))])
    assert 0 <= found.ci95[0] <= found.win_rate <= found.ci95[1] <= 1
    assert found.ci95[0] < found.ci95[1]


def test_interval_is_deterministic_and_open_for_a_single_group() -> None:
    a = [0.1, 0.9, 0.4, 0.8]
    assert win_rate(a, [0.5] * 4, tie=0, groups="aabb") == win_rate(a, [0.5] * 4, tie=0, groups="aabb")
    assert win_rate(a, [0.5] * 4, tie=0, groups="aaaa").ci95 == (0.0, 1.0)


def test_win_rate_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(DataError, match="2 and 1 scores and 2 groups"):
        win_rate([1.0, 2.0], [1.0], tie=0, groups="ab")
    with pytest.raises(DataError, match="row 1 has scores nan"):
        win_rate([1.0, math.nan], [1.0, 1.0], tie=0, groups="ab")


def test_correlation() -> None:
    assert correlation([1, 2, 3], [-1, -2, -3]) == pytest.approx(-1)
    # means 2 and 7/3: covariance 1.0 over sqrt(2 * 14/3)
    assert correlation([1, 2, 3], [1, 4, 2]) == pytest.approx(1 / math.sqrt(2 * 14 / 3))
    assert math.isnan(correlation([1, 1], [1, 2]))
    with pytest.raises(DataError, match="3 and 2"):
        correlation([1, 2, 3], [1, 2])


def test_histogram_counts_every_finite_value() -> None:
    assert histogram([-9, 0.5, 1.5, 1.9, 9, math.nan], bins=2, limits=(0, 2)) == {
        "edges": [0.0, 1.0, 2.0],
        "counts": [2.0, 3.0],
    }
    assert sum(histogram([3, 3, 3])["counts"]) == 3
    assert sum(histogram([])["counts"]) == 0
    assert sum(histogram([-1e30] * 8)["counts"]) == 8  # bins that float64 could not tell apart
    assert histogram([5, 5], bins=2) == {"edges": [4.5, 5.0, 5.5], "counts": [0.0, 2.0]}
