"""What is said about a reward model's held-out pairs, on cases that can be counted by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ppomax.monitor.preferences import (
    JudgedPair,
    accuracy,
    agreement,
    by_length,
    calibration,
    calibration_error,
    calibration_error_by_chance,
    notable,
    summary_of,
    verdict,
)


def pair(margin: float, longer: int = 0, source: str = "a", group: int = 0) -> JudgedPair:
    return JudgedPair(1.0 + margin, 1.0, 10 + longer, 10, source, group)


def logit(share: float) -> float:
    return math.log(share / (1 - share))


def test_a_pair() -> None:
    assert [pair(m).right for m in (2.0, 0.0, -0.5)] == [1.0, 0.5, 0.0]
    assert pair(-logit(0.8)).confidence == pytest.approx(0.8)
    assert pair(-1e9).confidence == 1.0
    assert pair(1.0, longer=-3).longer == -3


def test_accuracy_counts_ties_half_and_resamples_prompts() -> None:
    pairs = [pair(1.0, group=0), pair(1.0, group=0), pair(0.0, group=1), pair(-1.0, group=2)]
    found = accuracy(pairs)
    assert found["accuracy"] == 2.5 / 4
    low, high = found["accuracy_ci95"]
    assert low < 2.5 / 4 < high
    # One prompt says nothing about others, however many pairs it has.
    assert accuracy([pair(1.0)] * 50)["accuracy_ci95"] == [0.0, 1.0]


def test_calibration_by_hand() -> None:
    pairs = [pair(logit(0.6)), pair(-logit(0.6)), pair(logit(0.9)), pair(logit(0.9))]
    low, high = calibration(pairs, bins=2)
    assert low == {"confidence": pytest.approx(0.6), "accuracy": 0.5, "pairs": 2.0}
    assert high == {"confidence": pytest.approx(0.9), "accuracy": 1.0, "pairs": 2.0}
    assert calibration_error([low, high]) == pytest.approx((2 * 0.1 + 2 * 0.1) / 4)
    assert len(calibration(pairs, bins=10)) == 4  # no empty groups


def test_a_calibrated_model_has_no_error() -> None:
    pairs = [pair(logit(0.75) * (1 if i % 4 else -1)) for i in range(400)]
    assert calibration_error(calibration(pairs, bins=1)) == pytest.approx(0.0, abs=1e-12)


def flagged(pairs: list[JudgedPair]) -> bool:
    return any("calibration error" in reason for reason in summary_of(pairs)["fit_for_ppo"]["reasons"])


@pytest.mark.parametrize(("stretch", "least", "most"), [(1.0, 0.0, 0.1), (4.0, 0.9, 1.0)])
def test_noise_of_few_pairs_is_no_miscalibration(stretch: float, least: float, most: float) -> None:
    """100 pairs whose true log-odds are margin / stretch: a calibrated model, and one four times as sure as it may be."""
    random = np.random.default_rng(7)
    shares = []
    for _ in range(60):
        odds = random.normal(0.8, 1.0, size=100)
        # The pair's label is right with probability sigmoid(odds); a wrong label turns the margin round.
        signs = np.where(random.random(100) < 1 / (1 + np.exp(-odds)), 1.0, -1.0)
        pairs = [pair(float(stretch * m * s), group=i) for i, (m, s) in enumerate(zip(odds, signs, strict=True))]
        shares.append(flagged(pairs))
    assert least <= np.mean(shares) <= most


def test_the_error_by_chance_is_that_of_one_coin() -> None:
    # One group of one pair that is 0.75 sure: right, error 0.25, in 3 of 4 draws, else 0.75; the 95 % quantile is 0.75.
    assert calibration_error_by_chance([pair(logit(0.75))]) == pytest.approx(0.75)
    # 1600 pairs in one group: the error is |mean of coins - 0.75|, sd 0.0108, below 1.96 sd in 95 %.
    many = calibration_error_by_chance([pair(logit(0.75), group=i) for i in range(1600)], bins=1)
    assert many == pytest.approx(1.96 * math.sqrt(0.75 * 0.25 / 1600), rel=0.15)


def test_groups_by_length_are_equally_large_and_ordered() -> None:
    pairs = [pair(1.0 if longer > 0 else -1.0, longer=longer) for longer in (9, -3, 4, -8)]
    assert by_length(pairs, bins=2) == [
        {"longer": -5.5, "accuracy": 0.0, "pairs": 2.0},
        {"longer": 6.5, "accuracy": 1.0, "pairs": 2.0},
    ]


def test_the_summary_of_a_model_that_counts_tokens() -> None:
    longer = [3, 2, 1, 4, 5, 2, 3, -1, -2, 0] * 10
    pairs = [pair(float(n), longer=n, group=i) for i, n in enumerate(longer)]
    summary = summary_of(pairs)
    assert summary["accuracy"] == summary["length_only_accuracy"] == 7.5 / 10
    assert (summary["accuracy_if_longer_preferred"], summary["accuracy_if_shorter_preferred"]) == (1.0, 0.0)
    assert summary["fit_for_ppo"]["answer"] == "no"
    assert any("counting tokens" in reason for reason in summary["fit_for_ppo"]["reasons"])
    assert any("whose shorter answer is better" in reason for reason in summary["fit_for_ppo"]["reasons"])


def test_the_pairs_of_each_kind_are_counted() -> None:
    pairs = [
        pair(m, longer=n, group=i) for i, (m, n) in enumerate([(4.0, 1), (-4.0, 2), (0.1, 3), (5.0, -1), (0.2, 0)])
    ]
    counted = summary_of(pairs)
    names = ("longer_preferred_pairs", "shorter_preferred_pairs", "confident_pairs")
    assert [counted[name] for name in names] == [3, 1, 3]


def test_confident_mistakes_are_among_the_confident_pairs_only() -> None:
    pairs = [pair(4.0, group=1), pair(-4.0, group=2), pair(-0.1, group=3), pair(-0.1, group=4)]
    assert summary_of(pairs)["confident_mistakes"] == 0.5


def test_sources_are_told_apart() -> None:
    pairs = [pair(1.0, source="helpful", group=1), pair(-1.0, source="harmless", group=2)]
    by_source = summary_of(pairs)["accuracy_by_source"]
    assert {name: entry["accuracy"] for name, entry in by_source.items()} == {"helpful": 1.0, "harmless": 0.0}


GOOD: dict[str, Any] = {
    "heldout_pairs": 500, "accuracy": 0.8, "accuracy_ci95": [0.76, 0.84], "length_only_accuracy": 0.55,
    "accuracy_if_longer_preferred": 0.85, "accuracy_if_shorter_preferred": 0.75, "calibration_error": 0.03,
    "longer_preferred_pairs": 20, "shorter_preferred_pairs": 20, "confident_pairs": 20, "calibration_error_by_chance": 0.05,
    "calibration": [{"confidence": 0.78, "accuracy": 0.8, "pairs": 500.0}], "confident_mistakes": 0.02,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "answer", "word"),
    [
        ({}, "yes", "+25% over counting tokens"),
        ({"accuracy_ci95": [0.49, 0.9]}, "no", "may be a guess"),
        ({"length_only_accuracy": 0.2}, "no", "counting tokens: 80%"),  # shorter is better: counting works as well
        ({"heldout_pairs": 40}, "with care", "Only 40 pairs"),
        ({"accuracy_if_shorter_preferred": 0.4}, "with care", "PPO will write longer ones"),
        ({"accuracy_if_longer_preferred": 0.4}, "with care", "PPO will write shorter ones"),
        ({"accuracy_if_shorter_preferred": math.nan}, "yes", "about as sure as it is right"),
        ({"accuracy_if_shorter_preferred": 0.4, "shorter_preferred_pairs": 19}, "yes", "about as sure"),
        ({"accuracy_if_longer_preferred": 0.4, "longer_preferred_pairs": 19}, "yes", "about as sure"),
        ({"calibration_error": 0.2}, "with care", "78% sure, but right in 80%"),
        ({"calibration_error": 0.2, "calibration_error_by_chance": 0.21}, "yes", "about as sure"),
        ({"calibration_error": 0.09}, "yes", "about as sure"),
        ({"confident_mistakes": 0.3}, "with care", "Wrong in 30%"),
        ({"confident_mistakes": 0.3, "confident_pairs": 19}, "yes", "about as sure"),
    ],
)
def test_the_verdict_and_its_reason(changes: dict[str, Any], answer: str, word: str) -> None:
    found = verdict({**GOOD, **changes})
    assert found["answer"] == answer
    assert len(found["reasons"]) == 1 and word in found["reasons"][0]


def test_notable_pairs_are_the_ends_and_the_middle() -> None:
    pairs = [pair(m) for m in (0.1, 5.0, -4.0, -0.2, 3.0, -6.0, 1.0, 0.0)]
    assert notable(pairs, 2) == {"wrong": [5, 2], "right": [1, 4], "close": [7, 0]}
    assert notable(pairs[:2], 2) == {"wrong": [], "right": [1, 0], "close": []}


def test_agreement_counts_ties_half() -> None:
    ours, theirs = [pair(1.0), pair(-1.0), pair(2.0), pair(0.0)], [pair(3.0), pair(1.0), pair(0.5), pair(1.0)]
    assert agreement(ours, theirs) == (1 + 0 + 1 + 0.5) / 4
