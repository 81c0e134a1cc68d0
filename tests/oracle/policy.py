"""Losses of the policy on ragged batches, and their derivatives by each entry of the first argument, by hand.

All are sums over counted tokens divided by `denom` (errata: the paper's sums over trajectories, eq. 2, 12 and 17,
become token means) and are minimised: each is the negative of the objective that the paper maximises.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .kl import k3, log_softmax
from .masked import Batch, Row, flat


def _ratios(logprobs: Batch, old_logprobs: Batch) -> list[list[float]]:
    """pi(a_t | s_t) / pi_old(a_t | s_t)."""
    return [
        [math.exp(new - old) for new, old in zip(*pair, strict=True)]
        for pair in zip(logprobs, old_logprobs, strict=True)
    ]


def _ones(rows: Batch) -> list[list[float]]:
    return [[1.0] * len(row) for row in rows]


def _columns(*batches: Batch) -> list[list[tuple[float, ...]]]:
    """Row by row, the entries of several batches that belong to one token."""
    return [list(zip(*rows, strict=True)) for rows in zip(*batches, strict=True)]


def policy_gradient_loss(logprobs: Batch, advantages: Batch, *, denom: float) -> float:
    """-sum_t log pi(a_t | s_t) Phi_t / denom. Source: "Secrets of RLHF I", eq. 4-7 and 12."""
    return -math.fsum(x * phi for row in _columns(logprobs, advantages) for x, phi in row) / denom


def d_policy_gradient_loss(logprobs: Batch, advantages: Batch, *, denom: float) -> list[list[float]]:
    """d loss / d log pi_t = -Phi_t / denom."""
    return [[-phi / denom for _, phi in row] for row in _columns(logprobs, advantages)]


def surrogate_loss(logprobs: Batch, old_logprobs: Batch, advantages: Batch, *, denom: float) -> float:
    """-sum_t ratio_t A_t / denom. Source: "Secrets of RLHF I", eq. 13 (TRPO's objective)."""
    return -math.fsum(r * a for row in _columns(_ratios(logprobs, old_logprobs), advantages) for r, a in row) / denom


def d_surrogate_loss(logprobs: Batch, old_logprobs: Batch, advantages: Batch, *, denom: float) -> list[list[float]]:
    """d loss / d log pi_t = -ratio_t A_t / denom, since d exp(x - c) / dx = exp(x - c)."""
    return [[-r * a / denom for r, a in row] for row in _columns(_ratios(logprobs, old_logprobs), advantages)]


def _clipped(ratio: float, advantage: float, clip_ratio: float, dual_clip: float | None) -> float:
    inside = min(max(ratio, 1 - clip_ratio), 1 + clip_ratio)
    lower = min(ratio * advantage, inside * advantage)
    return max(lower, dual_clip * advantage) if dual_clip is not None and advantage < 0 else lower


def _clipped_slope(ratio: float, advantage: float, clip_ratio: float, dual_clip: float | None) -> float:
    """ratio A where the ratio itself decides, else 0; at an edge, the side that still moves.

    A > 0: flat above 1 + eps. A < 0: flat below 1 - eps, and above c with a dual clip. (Above 1 + eps with A < 0,
    and below 1 - eps with A > 0, the minimum is the unclipped term: the way back stays open.)
    """
    if advantage >= 0:
        return ratio * advantage if ratio <= 1 + clip_ratio else 0.0
    below, above = ratio < 1 - clip_ratio, dual_clip is not None and ratio > dual_clip
    return 0.0 if below or above else ratio * advantage


def clipped_policy_loss(
    logprobs: Batch, old_logprobs: Batch, advantages: Batch, *,
    clip_ratio: float, denom: float, dual_clip: float | None = None, weights: Batch | None = None,
) -> float:  # fmt: skip
    """-sum_t w_t min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) / denom; where A < 0, max(that, c A) under dual clip c.

    Source: "Secrets of RLHF I", PPO-clip; Schulman et al. 2017, eq. 7; dual clip: Ye et al. 2020 (arXiv 1912.09729).
    """
    columns = _columns(_ratios(logprobs, old_logprobs), advantages, weights or _ones(advantages))
    return -math.fsum(w * _clipped(r, a, clip_ratio, dual_clip) for row in columns for r, a, w in row) / denom


def d_clipped_policy_loss(
    logprobs: Batch, old_logprobs: Batch, advantages: Batch, *,
    clip_ratio: float, denom: float, dual_clip: float | None = None, weights: Batch | None = None,
) -> list[list[float]]:  # fmt: skip
    """d loss / d log pi_t = -w_t ratio_t A_t / denom where the ratio decides, else 0 (see `_clipped_slope`)."""
    columns = _columns(_ratios(logprobs, old_logprobs), advantages, weights or _ones(advantages))
    return [[-w * _clipped_slope(r, a, clip_ratio, dual_clip) / denom for r, a, w in row] for row in columns]


def policy_kink_distance(
    logprobs: Batch, old_logprobs: Batch, *, clip_ratio: float, dual_clip: float | None = None
) -> list[list[float]]:
    """How far each ratio is from the nearest edge of the clipped surrogate, where no derivative exists."""
    edges = [1 - clip_ratio, 1 + clip_ratio, *([] if dual_clip is None else [dual_clip])]
    return [[min(abs(r - edge) for edge in edges) for r in row] for row in _ratios(logprobs, old_logprobs)]


def penalised_policy_loss(
    logprobs: Batch, old_logprobs: Batch, advantages: Batch, *,
    kl_coefficient: float, denom: float, kl: Batch | None = None,
) -> float:  # fmt: skip
    """-sum_t ratio_t A_t / denom + beta sum_t KL_t / denom, KL_t of KL(old || new).

    KL_t is `kl` where given (exact), else ratio - 1 - log ratio, which is k3 of (old, new): its mean over tokens drawn
    from old is KL(old || new).
    Source: "Secrets of RLHF I", PPO-penalty (after eq. 13); Schulman et al. 2017, section 4.
    """
    pairs = zip(flat(old_logprobs), flat(logprobs), strict=True)
    penalties = [k3(old, new) for old, new in pairs] if kl is None else flat(kl)
    return surrogate_loss(logprobs, old_logprobs, advantages, denom=denom) + (
        kl_coefficient * math.fsum(penalties) / denom
    )


def d_penalised_policy_loss(
    logprobs: Batch, old_logprobs: Batch, advantages: Batch, *,
    kl_coefficient: float, denom: float, kl: Batch | None = None,
) -> list[list[float]]:  # fmt: skip
    """d loss / d log pi_t = (-ratio A + beta (ratio - 1)) / denom; the second term is absent where `kl` is given."""
    beta = kl_coefficient if kl is None else 0.0
    columns = _columns(_ratios(logprobs, old_logprobs), advantages)
    return [[(-r * a + beta * (r - 1)) / denom for r, a in row] for row in columns]


def d_penalised_policy_loss_by_kl(kl: Batch, *, kl_coefficient: float, denom: float) -> list[list[float]]:
    """d loss / d KL_t = beta / denom."""
    return [[kl_coefficient / denom] * len(row) for row in kl]


def nll_loss(logprobs: Batch, *, denom: float) -> float:
    """-sum_t log p_t / denom: SFT, the RM's LM term, ptx.

    Source: "Secrets of RLHF I", eq. 2 and 17. Errata: eq. 2 adds + beta E[log p'] to a minimised loss; it is minus, and
    token means replace sums over a sequence.
    """
    return -math.fsum(flat(logprobs)) / denom


def d_nll_loss(logprobs: Batch, *, denom: float) -> list[list[float]]:
    """d loss / d log p_t = -1 / denom."""
    return [[-1 / denom] * len(row) for row in logprobs]


def entropy(logits: Row) -> float:
    """H = -sum_i p_i log p_i in nats, exact over the vocabulary (trap 18)."""
    return -math.fsum(math.exp(x) * x for x in log_softmax(logits))


def d_entropy(logits: Row) -> list[float]:
    """d H / d z_i = -p_i (log p_i + H)."""
    total = entropy(logits)
    return [-math.exp(x) * (x + total) for x in log_softmax(logits)]


def entropy_bonus(entropies: Batch, *, denom: float, clip: float | None = None) -> float:
    """sum_b min(sum_t H_bt, clip) / denom: a bonus, so the caller subtracts it from a loss.

    Source: "Secrets of RLHF I", fig. 16; the threshold is on the response's summed entropy (our reading).
    """
    limit = math.inf if clip is None else clip
    return math.fsum(min(math.fsum(row), limit) for row in entropies) / denom


def d_entropy_bonus(entropies: Batch, *, denom: float, clip: float | None = None) -> list[list[float]]:
    """d bonus / d H_bt = 1 / denom while the row's sum is below the clip, 0 above it (1/2 of it in a tie)."""
    limit = math.inf if clip is None else clip
    sums = [math.fsum(row) for row in entropies]
    slopes = [1.0 if total < limit else 0.5 if total == limit else 0.0 for total in sums]
    return [[slope / denom] * len(row) for slope, row in zip(slopes, entropies, strict=True)]


def importance_weights(old_logprobs: Batch, behaviour_logprobs: Batch, *, cap: float) -> list[list[float]]:
    """w_t = min(pi_old / behaviour, cap): truncated importance sampling of what the sampler really sampled with."""
    return [[min(ratio, cap) for ratio in row] for row in _ratios(old_logprobs, behaviour_logprobs)]


class RatioStatistics(NamedTuple):
    """Sums over counted tokens (divide by their number for fractions and means), and a maximum."""

    clipped: float
    approx_kl: float
    ratio_max: float


def ratio_statistics(logprobs: Batch, old_logprobs: Batch, *, clip_ratio: float) -> RatioStatistics:
    """clipped = #{|ratio - 1| > eps}, approx_kl = sum (ratio - 1 - log ratio), ratio_max = max ratio (0 of nothing).

    Source: trap 28; approx_kl estimates KL(old || new) (k3, Schulman 2020).
    """
    ratios = flat(_ratios(logprobs, old_logprobs))
    pairs = zip(flat(old_logprobs), flat(logprobs), strict=True)
    return RatioStatistics(
        clipped=float(sum(abs(r - 1) > clip_ratio for r in ratios)),
        approx_kl=math.fsum(k3(old, new) for old, new in pairs),
        ratio_max=max(ratios, default=0.0),
    )
