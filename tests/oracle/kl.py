"""KL divergences in nats: estimates at the sampled token, exact sums over a vocabulary, adaptive coefficients."""

from __future__ import annotations

import math

from .masked import Batch, Row, flat


def log_softmax(logits: Row) -> list[float]:
    """log p_i = z_i - log sum_j exp z_j, about the largest z."""
    top = max(logits)
    log_total = top + math.log(math.fsum(math.exp(z - top) for z in logits))
    return [z - log_total for z in logits]


def k1(logprob: float, reference: float) -> float:
    """log p - log q at a token drawn from p: unbiased for KL(p || q), of either sign. Source: Schulman 2020, "k1"."""
    return logprob - reference


def k2(logprob: float, reference: float) -> float:
    """(log p - log q)^2 / 2: biased, never negative. Source: Schulman 2020, "Approximating KL Divergence", k2."""
    return (logprob - reference) ** 2 / 2


def k3(logprob: float, reference: float) -> float:
    """q/p - 1 - log(q/p) at a token drawn from p: unbiased for KL(p || q), never negative. Source: as k2."""
    return math.expm1(reference - logprob) - (reference - logprob)


def d_k1(logprob: float, reference: float) -> float:
    """d k1 / d log p = 1."""
    return 1.0


def d_k2(logprob: float, reference: float) -> float:
    """d k2 / d log p = log p - log q."""
    return logprob - reference


def d_k3(logprob: float, reference: float) -> float:
    """d k3 / d log p = 1 - q/p. (In a loss this is not the gradient of KL(p || q): trap 14.)"""
    return -math.expm1(reference - logprob)


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
DERIVATIVES = {"k1": d_k1, "k2": d_k2, "k3": d_k3}


def kl_loss(logprobs: Batch, reference_logprobs: Batch, *, estimator: str, denom: float) -> float:
    """sum_t estimator(log pi_t, log pi_ref,t) / denom. Errata: token means, not sums over trajectories (eq. 12, 17)."""
    pairs = zip(flat(logprobs), flat(reference_logprobs), strict=True)
    return math.fsum(ESTIMATORS[estimator](p, q) for p, q in pairs) / denom


def d_kl_loss(logprobs: Batch, reference_logprobs: Batch, *, estimator: str, denom: float) -> list[list[float]]:
    """d kl_loss / d log pi_t = estimator'(log pi_t, log pi_ref,t) / denom."""
    slope = DERIVATIVES[estimator]
    return [
        [slope(p, q) / denom for p, q in zip(*pair, strict=True)]
        for pair in zip(logprobs, reference_logprobs, strict=True)
    ]


def full_kl(logits_p: Row, logits_q: Row) -> float:
    """KL(p || q) = sum_i p_i (log p_i - log q_i), exact over the vocabulary."""
    pairs = zip(log_softmax(logits_p), log_softmax(logits_q), strict=True)
    return math.fsum(math.exp(p) * (p - q) for p, q in pairs)


def d_full_kl(logits_p: Row, logits_q: Row) -> list[float]:
    """d KL / d z_p,i = p_i (log p_i - log q_i - KL).

    From dp_j / dz_i = p_j ([i = j] - p_i): sum_j dp_j/dz_i (log p_j - log q_j) + sum_j dp_j/dz_i, the last being 0.
    """
    total = full_kl(logits_p, logits_q)
    pairs = zip(log_softmax(logits_p), log_softmax(logits_q), strict=True)
    return [math.exp(p) * (p - q - total) for p, q in pairs]


def d_full_kl_by_q(logits_p: Row, logits_q: Row) -> list[float]:
    """d KL / d z_q,i = q_i - p_i, from d log q_j / d z_i = [i = j] - q_i."""
    return [math.exp(q) - math.exp(p) for p, q in zip(log_softmax(logits_p), log_softmax(logits_q), strict=True)]


def adaptive_coefficient(
    coefficient: float, observed_kl: float, *, target: float, horizon: float, samples: int
) -> float:
    """c (1 + e n / horizon), e = clip(KL / target - 1, -0.2, 0.2). Source: Ziegler et al. 2019 (arXiv 1909.08593)."""
    error = max(-0.2, min(0.2, observed_kl / target - 1))
    return coefficient * (1 + error * samples / horizon)


def penalty_coefficient(coefficient: float, observed_kl: float, *, target: float) -> float:
    """beta / 2 if KL < target / 1.5; 2 beta if KL > 1.5 target; else beta. ValueError if the KL is not finite.

    Source: Schulman et al. 2017 (arXiv 1707.06347), section 4; "Secrets of RLHF I", PPO-penalty.
    """
    if not math.isfinite(observed_kl):
        raise ValueError(f"observed_kl is {observed_kl}")
    if observed_kl < target / 1.5:
        return coefficient / 2
    return coefficient * 2 if observed_kl > target * 1.5 else coefficient
