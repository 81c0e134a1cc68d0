"""What scores of two systems' answers say: wins by source, the best of n, how well rewards and a judge agree."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ppomax.monitor.statistics import win_rate


def compare(
    after: Sequence[float], before: Sequence[float], tie: float, groups: Sequence[str], sources: Sequence[str]
) -> dict[str, Any]:
    """Win, tie, lose of `after` against `before`, overall and per source where there are several."""

    def rates(rows: Sequence[int]) -> dict[str, Any]:
        result = win_rate(
            [after[i] for i in rows], [before[i] for i in rows], tie=tie, groups=[groups[i] for i in rows]
        )
        means = {"mean_before": mean([before[i] for i in rows]), "mean_after": mean([after[i] for i in rows])}
        return {**asdict(result), "ci95": list(result.ci95), **means, "comparisons": len(rows)}

    everything = rates(range(len(after)))
    names = sorted(set(sources))
    if len(names) > 1:
        everything["by_source"] = {n: rates([i for i, s in enumerate(sources) if s == n]) for n in names}
    return everything


def best_of(
    rewards: Sequence[float], judged: Sequence[float], by_prompt: Mapping[str, list[int]], before: Sequence[float],
    groups: Sequence[str], compared: Sequence[int], n: int, tie: float,
) -> dict[str, Any]:  # fmt: skip
    """The baseline's best of n by the reward model, judged against the `compared` of its own samples.

    The candidates are the first n of the other samples: neither that which they are compared with is among them, nor
    does it matter how large the pool is for the sake of another n.
    """
    best = []
    for key, own in zip(groups, compared, strict=True):
        candidates = [i for i in by_prompt[key] if i != own][:n]
        best.append(judged[max(candidates, key=lambda i: rewards[i])])
    result = win_rate(best, before, tie=tie, groups=groups)
    return {**asdict(result), "ci95": list(result.ci95), "mean": mean(best)}


def pair_accuracy(
    rewards: Sequence[float], judged: Sequence[float], groups: Sequence[Sequence[int]], tie: float
) -> float:
    """Share of same-prompt pairs, whose judge scores differ by more than `tie`, that the rewards order alike."""
    agreed = total = 0.0
    for rows in groups:
        for a, b in itertools.combinations(rows, 2):
            if abs(judged[a] - judged[b]) > tie:
                agreement = (rewards[a] - rewards[b]) * (judged[a] - judged[b])
                agreed += 1.0 if agreement > 0 else 0.5 if agreement == 0 else 0.0
                total += 1
    return agreed / total if total else math.nan


def mean(values: Sequence[float]) -> float:
    """The mean of one value or more."""
    return sum(values) / len(values)
