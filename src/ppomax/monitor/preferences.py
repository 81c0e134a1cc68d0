"""What held-out pairs say about a reward model: accuracy, calibration, length, mistakes, and if PPO can trust it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppomax.monitor.statistics import histogram, win_rate

CONFIDENT = 0.9
# What the verdict asks for; each is named in the reason that it gives.
FEWEST_PAIRS = 100
FEWEST_OF_A_KIND = 20  # below it nothing is said of pairs of one length, nor of confident ones
LARGEST_CALIBRATION_ERROR = 0.1
MOST_CONFIDENT_MISTAKES = 0.1
LEAST_AGREEMENT = 0.75


@dataclass(frozen=True)
class JudgedPair:
    """A held-out pair as the reward model sees it; lengths in tokens. `group`: its prompt, which is resampled whole."""

    score_chosen: float
    score_rejected: float
    length_chosen: int
    length_rejected: int
    source: str
    group: Hashable

    @property
    def margin(self) -> float:
        """score(chosen) − score(rejected): > 0 where the pair is ranked rightly."""
        return self.score_chosen - self.score_rejected

    @property
    def right(self) -> float:
        """1 where ranked rightly, 0.5 for equal scores."""
        return 0.5 if self.margin == 0 else float(self.margin > 0)

    @property
    def confidence(self) -> float:
        """σ(|margin|): the probability that the Bradley-Terry model gives to its own choice."""
        return 1 / (1 + math.exp(-min(abs(self.margin), 500.0)))

    @property
    def longer(self) -> int:
        """Tokens by which the preferred response is the longer one."""
        return self.length_chosen - self.length_rejected


def summary_of(pairs: Sequence[JudgedPair], *, agreed: float | None = None) -> dict[str, Any]:
    """Everything that summary.json says about the held-out pairs; at least one pair.

    agreed: the share of pairs that a second reward model orders alike, where there is one.
    """
    sources = sorted({pair.source for pair in pairs})
    groups = calibration(pairs)
    summary = {
        "heldout_pairs": len(pairs),
        **accuracy(pairs),
        "accuracy_by_source": {name: _of_source([p for p in pairs if p.source == name]) for name in sources},
        "length_only_accuracy": _mean([0.5 if p.longer == 0 else float(p.longer > 0) for p in pairs]),
        "accuracy_if_longer_preferred": _mean([p.right for p in pairs if p.longer > 0]),
        "accuracy_if_shorter_preferred": _mean([p.right for p in pairs if p.longer < 0]),
        "longer_preferred_pairs": sum(p.longer > 0 for p in pairs),
        "shorter_preferred_pairs": sum(p.longer < 0 for p in pairs),
        "by_length": by_length(pairs),
        "calibration_error": calibration_error(groups),
        "calibration_error_by_chance": calibration_error_by_chance(pairs),
        "calibration": groups,
        "confident_mistakes": _mean([1 - p.right for p in pairs if p.confidence > CONFIDENT]),
        "confident_pairs": sum(p.confidence > CONFIDENT for p in pairs),
        "margin_histogram": histogram([p.margin for p in pairs]),
    }
    return {**summary, "fit_for_ppo": verdict(summary, agreed=agreed)}


def _of_source(pairs: Sequence[JudgedPair]) -> dict[str, Any]:
    return {"pairs": len(pairs), **accuracy(pairs)}


def accuracy(pairs: Sequence[JudgedPair]) -> dict[str, Any]:
    """`accuracy` (a tie counts half) and its 95% interval, of prompts (see win_rate)."""
    rate = win_rate(
        [p.score_chosen for p in pairs], [p.score_rejected for p in pairs], tie=0.0, groups=[p.group for p in pairs]
    )
    return {"accuracy": rate.win_rate, "accuracy_ci95": list(rate.ci95)}


def calibration(pairs: Sequence[JudgedPair], *, bins: int = 10) -> list[dict[str, float]]:
    """Equally large groups of pairs by confidence: `confidence` and `accuracy` (means) and how many `pairs`.

    A calibrated model is right in a share σ(|margin|) of the pairs with that margin. Source: Guo et al. (2017).
    """
    groups = _groups(sorted(pairs, key=lambda pair: pair.confidence), bins)
    return [{"confidence": _mean([p.confidence for p in g]), **_right(g)} for g in groups]


def calibration_error(groups: Sequence[Mapping[str, float]]) -> float:
    """Mean distance of accuracy and confidence over the groups, by pairs (expected calibration error)."""
    total = sum(group["pairs"] for group in groups)
    return sum(group["pairs"] * abs(group["accuracy"] - group["confidence"]) for group in groups) / total


def calibration_error_by_chance(pairs: Sequence[JudgedPair], *, bins: int = 10, draws: int = 500) -> float:
    """What a calibrated model's error stays below in 95 % of `draws`: labels drawn by its own confidences, one seed.

    Few pairs a group are seldom right in just the share that is expected, so that no error is 0. Pairs are drawn one by
    one, as if those of one prompt had nothing in common. Source: Vaicenavicius et al. (2019), consistency resampling.
    """
    random = np.random.default_rng(0)
    errors = np.zeros(draws)
    for group in _groups(sorted(pairs, key=lambda pair: pair.confidence), bins):
        confidence = np.array([p.confidence for p in group])
        right = random.random((draws, len(group))) < confidence
        errors += np.abs(right.sum(1) - confidence.sum()) / len(pairs)
    return float(np.quantile(errors, 0.95))


def by_length(pairs: Sequence[JudgedPair], *, bins: int = 5) -> list[dict[str, float]]:
    """Equally large groups by how much longer the preferred response is: mean `longer`, `accuracy`, `pairs`."""
    groups = _groups(sorted(pairs, key=lambda pair: pair.longer), bins)
    return [{"longer": _mean([p.longer for p in g]), **_right(g)} for g in groups]


def verdict(summary: Mapping[str, Any], *, agreed: float | None = None) -> dict[str, Any]:
    """`answer`: yes, with care, or no; `reasons`: sentences, those that speak against it first. agreed: see summary_of.

    Accuracy alone does not tell: a model that counts tokens can have 60%, and PPO would make answers longer.
    """
    found, low = summary["accuracy"], summary["accuracy_ci95"][0]
    counting = max(summary["length_only_accuracy"], 1 - summary["length_only_accuracy"])
    if low <= 0.5:
        against = [f"Accuracy {found:.0%} may be a guess: its interval begins at {low:.0%}."]
    elif low <= counting:
        against = [f"Accuracy {found:.0%} (from {low:.0%}) does not clearly beat counting tokens: {counting:.0%}."]
    else:
        against = []
    careful = _weaknesses(summary)
    if agreed is not None and agreed < LEAST_AGREEMENT:
        careful.append(
            f"The other reward model orders only {agreed:.0%} of the pairs alike: PPO climbs what is one's own."
        )
    answer = "no" if against else "with care" if careful else "yes"
    good = f"Accuracy {found:.0%}, {found - counting:+.0%} over counting tokens, and about as sure as it is right."
    return {"answer": answer, "reasons": [*against, *careful] or [good]}


def _weaknesses(summary: Mapping[str, Any]) -> list[str]:
    """What does not rule a reward model out, but will show in what PPO makes of it."""
    pairs, error, mistakes = (summary[key] for key in ("heldout_pairs", "calibration_error", "confident_mistakes"))
    by_chance = summary["calibration_error_by_chance"]
    found = []
    if pairs < FEWEST_PAIRS:
        found.append(f"Only {pairs} pairs were held out; {FEWEST_PAIRS} or more would say more.")
    for name, other in (("longer", "shorter"), ("shorter", "longer")):
        share = summary[f"accuracy_if_{name}_preferred"]
        if share < 0.5 and summary[f"{name}_preferred_pairs"] >= FEWEST_OF_A_KIND:
            found.append(
                f"Right in only {share:.0%} of the pairs whose {name} answer is better: PPO will write {other} ones."
            )
    if error > max(LARGEST_CALIBRATION_ERROR, by_chance):
        sure, right = _mean([group["confidence"] for group in summary["calibration"]]), summary["accuracy"]
        found.append(
            f"On average {sure:.0%} sure, but right in {right:.0%}: calibration error {error:.2f}, which is more than "
            f"chance ({by_chance:.2f})."
        )
    if mistakes > MOST_CONFIDENT_MISTAKES and summary["confident_pairs"] >= FEWEST_OF_A_KIND:
        found.append(f"Wrong in {mistakes:.0%} of the pairs of which it is at least {CONFIDENT:.0%} sure.")
    return found


def notable(pairs: Sequence[JudgedPair], each: int) -> dict[str, list[int]]:
    """Indices of the `wrong` pairs with the largest margins, of the surest `right` ones, and of the `close` calls."""
    order = sorted(range(len(pairs)), key=lambda i: pairs[i].margin)
    wrong = [i for i in order if pairs[i].margin < 0][:each]
    right = [i for i in reversed(order) if pairs[i].margin > 0][:each]
    rest = sorted(set(order) - set(wrong) - set(right), key=lambda i: abs(pairs[i].margin))
    return {"wrong": wrong, "right": right, "close": rest[:each]}


def agreement(pairs: Sequence[JudgedPair], other: Sequence[JudgedPair]) -> float:
    """Share of the pairs that two reward models rank alike; ties of either count half."""
    both = zip(pairs, other, strict=True)
    return _mean([0.5 if 0.5 in (a.right, b.right) else float(a.right == b.right) for a, b in both])


def _groups(ordered: list[JudgedPair], count: int) -> list[list[JudgedPair]]:
    parts = np.array_split(np.arange(len(ordered)), min(count, len(ordered)))
    return [[ordered[i] for i in part] for part in parts]


def _right(group: Sequence[JudgedPair]) -> dict[str, float]:
    return {"accuracy": _mean([p.right for p in group]), "pairs": float(len(group))}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
