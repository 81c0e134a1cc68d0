"""TRPO's step on flat parameter vectors [N]: maximise a surrogate inside a ball of KL(old || new).

The Fisher matrix F (the Hessian of that KL at the old policy) is only ever seen as a product v -> F v. The gradient is
that of the objective to maximise, so that parameters + fraction * step ascends. Nothing here knows a model, and every
result is detached; autograd stays on, since a product may be two backward passes.
Source: Schulman et al. (2015), arXiv 1502.05477, appendix C; "Secrets of RLHF I", eq. 13.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ppomax.rl.arguments import (
    expect_count,
    expect_finite,
    expect_not_negative,
    expect_positive,
    expect_shape,
    expect_unit_interval,
    expect_vector,
)

Product = Callable[[Tensor], Tensor]


def conjugate_gradient(
    product: Product, b: Float[Tensor, " N"], *, iterations: int, tolerance: float
) -> Float[Tensor, " N"]:
    """Solves F x = b for a symmetric positive semidefinite F, starting at x = 0.

    Stops after `iterations` products, or once the residual |b - F x| <= tolerance * |b|, tolerance in [0, 1]. A
    breakdown (b zero or not finite, a direction of curvature <= 0, an overflow) returns the iterate so far, never NaN.
    Source: Hestenes & Stiefel (1952).
    """
    expect_vector(b=b)
    expect_count(iterations=iterations)
    expect_unit_interval(tolerance=tolerance)
    residual = direction = b = b.detach()
    x = torch.zeros_like(b)
    squared = squared_b = float(b @ b)
    for _ in range(iterations):
        if not (math.isfinite(squared) and squared > tolerance**2 * squared_b):
            break
        curved = _apply(product, direction)
        curvature = float(direction @ curved)
        if not (math.isfinite(curvature) and curvature > 0.0):
            break
        length = squared / curvature
        reached = x + length * direction
        if not reached.isfinite().all():
            break
        x = reached
        residual = residual - length * curved
        before, squared = squared, float(residual @ residual)
        direction = residual + (squared / before) * direction
    return x


def natural_step(
    gradient: Float[Tensor, " N"],
    product: Product,
    *,
    max_kl: float,
    iterations: int,
    damping: float,
    tolerance: float,
) -> Float[Tensor, " N"]:
    """The natural gradient, as long as the trust region allows to second order.

        x = (F + damping * I)^-1 g,  step = sqrt(2 * max_kl / (x^T (F + damping * I) x)) * x

    With damping 0 the quadratic model of the KL, step^T F step / 2, is exactly `max_kl` (nats); with damping it is
    less. A gradient that is zero or not finite gives a zero step. Source: Schulman et al. (2015), appendix C.
    """
    expect_positive(max_kl=max_kl)
    expect_finite(max_kl=max_kl)
    expect_not_negative(damping=damping)

    def damped(v: Tensor) -> Tensor:
        return _apply(product, v) + damping * v

    x = conjugate_gradient(damped, gradient, iterations=iterations, tolerance=tolerance)
    curvature = float(x @ damped(x))
    if not (math.isfinite(curvature) and curvature > 0.0):
        return torch.zeros_like(gradient)
    return math.sqrt(2.0 * max_kl / curvature) * x


def line_search(
    evaluate: Callable[[float], tuple[float, float]],
    step: Float[Tensor, " N"],
    *,
    max_kl: float,
    backtracks: int,
    shrink: float,
) -> float:
    """The largest fraction of the step that improves the true objective inside the true trust region, else 0.0.

        fraction = shrink^i for the first i in 0 .. backtracks - 1 with objective > objective(0) and kl <= max_kl

    `evaluate(fraction)` returns objective and KL(old || new) at parameters + fraction * step, and `evaluate(0.0)` is
    the start. A value that is not finite is never accepted; a step that is zero or not finite is not even evaluated.
    The parameters are the caller's: set them to the returned fraction. Source: Schulman et al. (2015), appendix C.
    """
    expect_vector(step=step)
    expect_positive(max_kl=max_kl)
    expect_count(backtracks=backtracks)
    if not 0.0 < shrink < 1.0:
        raise ValueError(f"shrink: found {shrink}, expected a number in (0, 1)")
    if not (step.isfinite().all() and step.any()):
        return 0.0
    start = float(evaluate(0.0)[0])
    if not math.isfinite(start):
        return 0.0
    for i in range(backtracks):
        objective, kl = map(float, evaluate(shrink**i))
        if math.isfinite(objective) and objective > start and math.isfinite(kl) and kl <= max_kl:
            return shrink**i
    return 0.0


def _apply(product: Product, v: Tensor) -> Tensor:
    curved = product(v).detach()
    expect_shape(v.shape, product=curved)
    return curved
