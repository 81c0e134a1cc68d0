"""The critic's loss on ragged batches, its derivative by hand, and how much of the returns it explains."""

from __future__ import annotations

import math

from .masked import Batch, flat, variance


def _clipped_value(value: float, old: float, clip: float) -> float:
    return old + min(max(value - old, -clip), clip)


def _columns(values: Batch, returns: Batch, old_values: Batch | None) -> list[list[tuple[float, float, float]]]:
    olds = values if old_values is None else old_values
    return [list(zip(*rows, strict=True)) for rows in zip(values, returns, olds, strict=True)]


def value_loss(
    values: Batch, returns: Batch, *, denom: float, old_values: Batch | None = None, clip: float | None = None
) -> float:
    """sum_t max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / denom; no factor 1/2; without c only the first.

    Source: "Secrets of RLHF I", eq. 16 and section 5.3.1 (value clip); the max of the errors: trap 17.
    """
    limit = math.inf if clip is None else clip
    return (
        math.fsum(
            max((v - r) ** 2, (_clipped_value(v, old, limit) - r) ** 2)
            for row in _columns(values, returns, old_values)
            for v, r, old in row
        )
        / denom
    )


def _slope(value: float, target: float, old: float, clip: float) -> float:
    """2 (V - R) where V is within the clip or its own error is larger; 0 where the clipped one is; V - R in a tie."""
    if abs(value - old) <= clip:
        return 2 * (value - target)
    own, clipped = abs(value - target), abs(_clipped_value(value, old, clip) - target)
    return 2 * (value - target) * (1.0 if own > clipped else 0.5 if own == clipped else 0.0)


def d_value_loss(
    values: Batch, returns: Batch, *, denom: float, old_values: Batch | None = None, clip: float | None = None
) -> list[list[float]]:
    """d loss / d V_t = slope / denom, see `_slope`."""
    limit = math.inf if clip is None else clip
    return [[_slope(v, r, old, limit) / denom for v, r, old in row] for row in _columns(values, returns, old_values)]


def value_kink_distance(values: Batch, returns: Batch, *, old_values: Batch, clip: float) -> list[list[float]]:
    """How far each V is from a point without a derivative: an edge of the clip, or equal errors outside."""
    out = []
    for row in _columns(values, returns, old_values):
        distances = []
        for v, r, old in row:
            edge = abs(abs(v - old) - clip)
            tie = abs(abs(v - r) - abs(_clipped_value(v, old, clip) - r)) if abs(v - old) > clip else math.inf
            distances.append(min(edge, tie))
        out.append(distances)
    return out


def explained_variance(values: Batch, returns: Batch) -> float:
    """1 - Var(R - V) / Var(R) over all counted tokens; nan where the returns do not vary (no value is right then)."""
    total = variance(flat(returns))
    errors = [r - v for r, v in zip(flat(returns), flat(values), strict=True)]
    return 1 - variance(errors) / total if total else math.nan
