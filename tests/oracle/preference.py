"""The reward model's ranking loss over pairs, its derivatives, and its accuracy."""

from __future__ import annotations

import math

from .masked import Row


def _log_sigmoid(x: float) -> float:
    """log(1 / (1 + e^-x)) = min(x, 0) - log(1 + e^-|x|)."""
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def _columns(chosen: Row, rejected: Row, margin: Row | None, weights: Row | None) -> list[tuple[float, float]]:
    """(score difference less the margin, weight) of each pair."""
    margins = margin if margin is not None else [0.0] * len(chosen)
    factors = weights if weights is not None else [1.0] * len(chosen)
    return [(good - bad - m, f) for good, bad, m, f in zip(chosen, rejected, margins, factors, strict=True)]


def ranking_loss(
    chosen: Row, rejected: Row, *, denom: float, margin: Row | None = None, weights: Row | None = None
) -> float:
    """-sum_i w_i log sigma(r(x, y_w) - r(x, y_l) - margin_i) / denom, denom counting pairs.

    Source: "Secrets of RLHF I", eq. 1 and 2; margin: Llama 2 (arXiv 2307.09288), eq. 2. Errata: eq. 1 prints
    + log sigma; a loss is its negative.
    """
    return -math.fsum(w * _log_sigmoid(x) for x, w in _columns(chosen, rejected, margin, weights)) / denom


def d_ranking_loss(
    chosen: Row, rejected: Row, *, denom: float, margin: Row | None = None, weights: Row | None = None
) -> list[float]:
    """d loss / d r(x, y_w)_i = -w_i sigma(-(difference_i)) / denom, since (log sigma)' = 1 - sigma = sigma(-.)."""
    return [-w * math.exp(_log_sigmoid(-x)) / denom for x, w in _columns(chosen, rejected, margin, weights)]


def d_ranking_loss_by_rejected(
    chosen: Row, rejected: Row, *, denom: float, margin: Row | None = None, weights: Row | None = None
) -> list[float]:
    """d loss / d r(x, y_l)_i: the opposite of the derivative by the chosen score."""
    return [-x for x in d_ranking_loss(chosen, rejected, denom=denom, margin=margin, weights=weights)]


def ranking_accuracy(chosen: Row, rejected: Row, *, weights: Row | None = None) -> float:
    """sum_i w_i ([chosen > rejected] + [equal] / 2) / sum_i w_i: a tie is half right; no margin."""
    factors = weights if weights is not None else [1.0] * len(chosen)
    hits = [1.0 if good > bad else 0.5 if good == bad else 0.0 for good, bad in zip(chosen, rejected, strict=True)]
    return math.fsum(f * hit for f, hit in zip(factors, hits, strict=True)) / math.fsum(factors)
