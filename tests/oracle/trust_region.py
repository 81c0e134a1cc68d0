"""TRPO's linear algebra with explicit matrices, in exact rational arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

from .masked import Row

Matrix = Sequence[Row]


def solve(matrix: Sequence[Sequence[Fraction]], b: Sequence[Fraction]) -> list[Fraction] | None:
    """x with F x = b by Gauss-Jordan elimination with exact fractions; None where F is singular."""
    n = len(b)
    rows = [[*map(Fraction, line), Fraction(b[i])] for i, line in enumerate(matrix)]
    for i in range(n):
        pivot = next((j for j in range(i, n) if rows[j][i]), None)
        if pivot is None:
            return None
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for j in range(n):
            if j != i and rows[j][i]:
                factor = rows[j][i]
                rows[j] = [x - factor * y for x, y in zip(rows[j], rows[i], strict=True)]
    return [row[n] for row in rows]


def _dot(x: Sequence[Fraction], y: Sequence[Fraction]) -> Fraction:
    return sum((a * b for a, b in zip(x, y, strict=True)), Fraction(0))


def _times(matrix: Sequence[Sequence[Fraction]], x: Sequence[Fraction]) -> list[Fraction]:
    return [_dot(line, x) for line in matrix]


def _krylov(matrix: Sequence[Sequence[Fraction]], b: list[Fraction], iterations: int) -> list[Fraction]:
    basis: list[list[Fraction]] = []
    best, power = [Fraction(0)] * len(b), b
    for _ in range(iterations):
        basis.append(power)
        images = [_times(matrix, v) for v in basis]
        inner = [[_dot(v, image) for image in images] for v in basis]
        weights = solve(inner, [_dot(v, b) for v in basis])
        if weights is None:
            break
        best = [_dot(weights, column) for column in zip(*basis, strict=True)]
        power = images[-1]
    return best


def conjugate_gradient(matrix: Matrix, b: Row, *, iterations: int | None = None) -> list[float]:
    """What conjugate gradients reach after `iterations` steps in exact arithmetic; the solution of F x = b by default.

    The m-th iterate minimises x^T F x / 2 - b^T x over span{b, F b, ..., F^{m-1} b}: found here by Gaussian elimination
    on that basis. Where the system is singular there (zero b, no curvature, space exhausted) the last iterate stays.
    Source: Hestenes and Stiefel 1952; Nocedal and Wright (2006), theorem 5.2.
    """
    exact = [[Fraction(x) for x in line] for line in matrix]
    steps = len(b) if iterations is None else iterations
    return [float(x) for x in _krylov(exact, [Fraction(x) for x in b], steps)]


def natural_step(gradient: Row, matrix: Matrix, *, max_kl: float, damping: float) -> list[float]:
    """x sqrt(2 max_kl / x^T (F + damping I) x), (F + damping I) x = g solved exactly; zero for a zero gradient.

    Source: Schulman et al. 2015 (arXiv 1502.05477), appendix C; "Secrets of RLHF I", eq. 13.
    """
    damped = [
        [Fraction(x) + (Fraction(damping) if i == j else 0) for j, x in enumerate(line)]
        for i, line in enumerate(matrix)
    ]
    direction = solve(damped, [Fraction(x) for x in gradient])
    if direction is None:
        raise ValueError("F + damping I is singular")
    curvature = _dot(direction, _times(damped, direction))
    if not curvature:
        return [0.0] * len(gradient)
    return [float(x) * math.sqrt(2 * max_kl / curvature) for x in direction]


def line_search(
    evaluate: Callable[[float], tuple[float, float]], *, max_kl: float, backtracks: int, shrink: float
) -> float:
    """The largest of shrink^0 .. shrink^{backtracks-1} with objective > objective(0) and kl <= max_kl; 0 if none.

    A number that is not finite is never accepted. Source: Schulman et al. 2015, appendix C.
    """
    start = evaluate(0.0)[0]
    accepted = []
    for fraction in (shrink**i for i in range(backtracks)):
        objective, kl = evaluate(fraction)
        if math.isfinite(objective) and math.isfinite(kl) and objective > start and kl <= max_kl:
            accepted.append(fraction)
    return max(accepted, default=0.0)
