"""Sums, means and places on ragged rows. The rows are unpadded, so that a mask cannot be got wrong here.

A row holds one float per response token; a batch is a list of rows, some perhaps empty. Means and variances are
computed in exact rational arithmetic: a standard deviation is 0 if and only if all entries are equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

Row = Sequence[float]
Batch = Sequence[Row]


def flat(rows: Batch) -> list[float]:
    """All counted entries, row after row."""
    return [x for row in rows for x in row]


def mean(values: Row) -> float:
    """sum x_i / n, rounded once; 0 of nothing."""
    return float(sum(map(Fraction, values)) / len(values)) if values else 0.0


def squared_deviations(values: Row) -> float:
    """m2 = sum (x_i - mean)^2 about the exact mean, rounded once; 0 of nothing."""
    if not values:
        return 0.0
    centre = sum(map(Fraction, values)) / len(values)
    return float(sum((Fraction(x) - centre) ** 2 for x in values))


def variance(values: Row) -> float:
    """The biased variance m2 / n (trap 4: the variance says which); 0 of nothing."""
    return squared_deviations(values) / len(values) if values else 0.0


def std(values: Row) -> float:
    """The biased standard deviation."""
    return math.sqrt(variance(values))


def zero_masked(rows: Batch, *, width: int) -> list[list[float]]:
    """The rows as a rectangle of `width` columns: 0 in every entry that does not count."""
    return [[row[t] if t < len(row) else 0.0 for t in range(width)] for row in rows]


def masked_sum(rows: Batch) -> float:
    """The sum over counted tokens."""
    return math.fsum(flat(rows))


def masked_mean(rows: Batch) -> float:
    """The sum over counted tokens by their number (not a mean of the rows' means); 0 where nothing counts."""
    return mean(flat(rows))


def last_token(length: int) -> list[bool]:
    """Marks the last of `length` response tokens, index length - 1 (trap 1); [] for an empty response."""
    return [t == length - 1 for t in range(length)]


def place_on_last_token(number: float, length: int) -> list[float]:
    """`number` at the last response token, 0 before it; an empty response has no place for it."""
    return [number if here else 0.0 for here in last_token(length)]


def spread(numbers: Row, lengths: Sequence[int]) -> list[list[float]]:
    """The row's number at each of its tokens: Phi_t = R(tau) for all t ("Secrets of RLHF I", eq. 4-7)."""
    return [[number] * length for number, length in zip(numbers, lengths, strict=True)]


def whiten(rows: Batch, *, eps: float) -> list[list[float]]:
    """(x - mean) / sqrt(var + eps), mean and biased variance over all counted tokens of the batch.

    Source: "Secrets of RLHF I", section 5.3.1 (advantage normalisation); epsilon inside the root.
    """
    values = flat(rows)
    centre, scale = mean(values), math.sqrt(variance(values) + eps)
    return [[(x - centre) / scale for x in row] for row in rows]


def normalise_advantages(advantages: Batch, *, eps: float, clip: float | None = None) -> list[list[float]]:
    """whiten(A), then min(max(., -clip), clip) per token. Source: "Secrets of RLHF I", section 5.3.1, fig. 6."""
    limit = math.inf if clip is None else clip
    return [[min(max(x, -limit), limit) for x in row] for row in whiten(advantages, eps=eps)]
