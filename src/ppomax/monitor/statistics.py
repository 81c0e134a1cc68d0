"""Comparing two systems on the same prompts, and the two summaries that reports draw."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from ppomax.types import DataError

_RESAMPLES = 2000


@dataclass(frozen=True)
class WinRate:
    """Shares of wins, ties and losses of system a; `win_rate` = win + tie / 2 with a 95% interval."""

    win: float
    tie: float
    lose: float
    win_rate: float
    ci95: tuple[float, float]


def win_rate(
    scores_a: Sequence[float], scores_b: Sequence[float], *, tie: float, groups: Sequence[Hashable]
) -> WinRate:
    """How often a beats b, N comparisons; a tie is a difference of at most `tie` score units.

    The interval is the percentile bootstrap over `groups` (one prompt each: samples of one prompt resemble each other,
    so resampling rows would make it too narrow), 2,000 resamples, always the same seed. Two groups are added, one that
    a wins and one that it loses: where all groups agree, a bootstrap alone sees no spread. With fewer than two groups
    the interval is (0, 1). Sources: Efron & Tibshirani (1993), ch. 13; Agresti & Coull (1998) for the added groups.
    """
    a, b = np.asarray(scores_a, dtype=np.float64), np.asarray(scores_b, dtype=np.float64)
    if not len(a) == len(b) == len(groups) or len(a) == 0:
        raise DataError(
            f"win_rate: found {len(a)} and {len(b)} scores and {len(groups)} groups, expected equal counts above 0"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        row = int(np.flatnonzero(~(np.isfinite(a) & np.isfinite(b)))[0])
        raise DataError(f"win_rate: row {row} has scores {a[row]} and {b[row]}, expected finite numbers")
    wins, losses = a - b > tie, b - a > tie
    points = np.where(wins, 1.0, np.where(losses, 0.0, 0.5))
    win, lose = float(wins.mean()), float(losses.mean())
    rate = float(points.mean())
    return WinRate(win, float((~wins & ~losses).mean()), lose, rate, _interval(points, rate, groups))


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's r of two equally long lists; NaN where one of them does not vary."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape:
        raise DataError(f"correlation: found {x.size} and {y.size} values, expected equal counts")
    if x.size < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def histogram(
    values: Sequence[float], *, bins: int = 24, limits: tuple[float, float] | None = None
) -> dict[str, list[float]]:
    """`{"edges": bins + 1 numbers, "counts": bins numbers}`, as metrics rows and summaries carry it.

    Values outside `limits` (default: smallest to largest) count in the outermost bins; non-finite ones are dropped.
    """
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    if limits is None:
        limits = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    low, high = limits
    least = 4 * bins * float(np.spacing(max(abs(low), abs(high))))  # bins that float64 can tell apart
    if high - low < least:
        limits = (low - max(least, 0.5), high + max(least, 0.5))
    counts, edges = np.histogram(np.clip(finite, *limits), bins=bins, range=limits)
    return {"edges": [float(e) for e in edges], "counts": [float(c) for c in counts]}


def _interval(points: np.ndarray, rate: float, groups: Sequence[Hashable]) -> tuple[float, float]:
    index = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    if len(index) < 2:
        return (0.0, 1.0)
    member = np.array([index[group] for group in groups])
    sums, sizes = np.bincount(member, weights=points), np.bincount(member)
    typical = sizes.mean()
    sums, sizes = np.append(sums, [typical, 0.0]), np.append(sizes, [typical, typical])
    random = np.random.default_rng(0)
    means = np.empty(_RESAMPLES)
    for i in range(_RESAMPLES):
        drawn = random.integers(len(sums), size=len(sums))
        means[i] = sums[drawn].sum() / sizes[drawn].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return min(float(low), rate), max(float(high), rate)
