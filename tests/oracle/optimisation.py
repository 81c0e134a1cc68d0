"""One parameter's AdamW from its whole gradient history, the global gradient clip, the learning rate, convergence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from .masked import Batch, Row, flat


def adamw_step(
    parameter: float, gradients: Row, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> float:
    """The parameter after the step that `gradients[-1]` causes, `gradients` being g_1 .. g_t of all steps so far.

        m = (1 - b1) sum_i b1^{t-i} g_i / (1 - b1^t),  v = (1 - b2) sum_i b2^{t-i} g_i^2 / (1 - b2^t)
        theta - lr weight_decay theta - lr m / (sqrt(v) + eps)

    Source: Kingma and Ba 2015, algorithm 1, unrolled; Loshchilov and Hutter 2019 (arXiv 1711.05101): the decay is
    decoupled, and multiplied by the learning rate as in torch.
    """

    def average(values: Row, beta: float) -> float:
        t = len(values)
        return (1 - beta) * math.fsum(beta ** (t - 1 - i) * x for i, x in enumerate(values)) / (1 - beta**t)

    first, second = average(gradients, betas[0]), average([g * g for g in gradients], betas[1])
    return parameter - lr * weight_decay * parameter - lr * first / (math.sqrt(second) + eps)


def adamw(
    parameter: float, gradients: Row, rates: Row, *, betas: tuple[float, float], eps: float, weight_decay: float
) -> list[float]:
    """The parameter after each step, from gradients that do not depend on it; `rates[t]` is the rate of step t."""
    path = []
    for t, lr in enumerate(rates):
        parameter = adamw_step(parameter, gradients[: t + 1], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        path.append(parameter)
    return path


def gradient_norm(gradients: Batch) -> float:
    """The Euclidean norm over all entries of all parameters (trap 21: global)."""
    return math.sqrt(math.fsum(g * g for g in flat(gradients)))


def clip_gradient_norm(gradients: Batch, *, max_norm: float, eps: float = 0.0) -> list[list[float]]:
    """g min(1, max_norm / (norm + eps)): one factor for all parameters. torch has eps = 1e-6."""
    norm = gradient_norm(gradients)
    factor = min(1.0, max_norm / (norm + eps)) if norm + eps else 1.0
    return [[g * factor for g in row] for row in gradients]


def learning_rate(
    step: int, *, peak: float, total: int, warmup: float, floor: float, shape: str, decay_from: int | None = None
) -> float:
    """The rate of step `step`, counted from 0, of `total` steps. With k = step + 1 and n = round(warmup * total):

        k <= n:           peak k / n
        n < k <= total:   cosine  peak (floor + (1 - floor) (1 + cos(pi p)) / 2)
                          linear  peak (floor + (1 - floor) (1 - p)),    p = (k - n) / (total - n)
                          constant  peak
        k > total:        as at k = total (trap 22: flat, never rising again)

    Without warm-up the first step is at the peak: p = (k - 1) / (total - 1); a run of one step is at the floor.
    `decay_from` is the k at which p = 0.
    Source: "Secrets of RLHF I" (10 % warm-up, cosine to 10 % and flat after).
    """
    warm = round(warmup * total)
    k = min(step + 1, total)
    if k <= warm:
        return peak * k / warm
    start = max(warm, 1) if decay_from is None else decay_from
    progress = (k - start) / (total - start) if total > start else 1.0
    left = {
        "cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0
    }[shape]  # fmt: skip
    return peak * left if shape == "constant" else peak * (floor + (1 - floor) * left)


def has_converged(losses: Sequence[float], *, window: int, tolerance: float) -> bool:
    """mean(window before) - mean(last window) <= tolerance |mean(window before)|, all 2 window losses being finite.

    False with fewer than 2 window losses. Source: "Secrets of RLHF I", section 5.3.3 (critic pre-training).
    """
    recent = losses[-2 * window :]
    if len(recent) < 2 * window or not all(map(math.isfinite, recent)):
        return False
    before, after = (sum(map(Fraction, part)) / window for part in (recent[:window], recent[window:]))
    return before - after <= Fraction(tolerance) * abs(before)
