"""KL divergences in nats: per-token estimates, the exact one over the vocabulary, and coefficients that follow a KL.

k1, k2, k3: from log pi and log ref, [B, R], of tokens that were sampled from pi. With d = log pi - log ref, all three
estimate KL(pi || ref); k1 and k3 without bias, k2 up to third order in d. In a loss what counts is the gradient of the
estimate, which each function states. Padding passes through unmasked: in a loss, `zero_masked` both inputs first.
Source: Schulman (2020), "Approximating KL divergence", joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ppomax.rl.arguments import expect_finite, expect_not_negative, expect_positive, expect_shape


def k1(logprobs: Float[Tensor, "B R"], reference_logprobs: Float[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """d. Unbiased, high variance, of either sign.

    Gradient: grad log pi, whose expectation under pi is 0, so k1 in a loss teaches nothing. Detached in the reward,
    where the score function carries the gradient, it is exact: that is the paper's KL_t.
    """
    expect_shape(logprobs.shape, reference_logprobs=reference_logprobs)
    return logprobs - reference_logprobs


def k2(logprobs: Float[Tensor, "B R"], reference_logprobs: Float[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """d^2 / 2. Biased, never negative, low variance.

    Gradient: d * grad log pi, whose expectation under pi is the gradient of KL(pi || ref): the one to use in a loss.
    """
    return 0.5 * k1(logprobs, reference_logprobs).square()


def k3(logprobs: Float[Tensor, "B R"], reference_logprobs: Float[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """exp(-d) - 1 + d. Unbiased, never negative, low variance: the one for metrics.

    Gradient: (1 - ref/pi) * grad log pi, whose expectation under pi is the gradient of KL(ref || pi), the other
    direction: k3 in a loss does not descend KL(pi || ref).
    """
    difference = k1(logprobs, reference_logprobs)
    # expm1 keeps the digits that exp(-d) - 1 loses near 0, where the result would turn negative.
    return torch.expm1(-difference) + difference


def full_kl(logits_p: Float[Tensor, "*axes V"], logits_q: Float[Tensor, "*axes V"]) -> Float[Tensor, "*axes"]:
    """The exact KL(p || q) over the vocabulary, the last axis, from logits or log-probs.

        sum_v p_v * (log p_v - log q_v),  p = softmax(logits_p), q = softmax(logits_q)

    In float32 at least. A token that p rules out (logit -inf) adds 0; one that only q rules out makes the KL infinite.
    Differentiable in both. Not below 0 but for rounding, and not clamped: a clamp would bias a mean of small KLs.
    """
    expect_shape(logits_p.shape, logits_q=logits_q)
    precision = torch.promote_types(torch.promote_types(logits_p.dtype, logits_q.dtype), torch.float32)
    log_p, log_q = logits_p.log_softmax(-1, dtype=precision), logits_q.log_softmax(-1, dtype=precision)
    possible = log_p > -torch.inf
    # Masked before the product: 0 * (-inf - log q) is NaN.
    difference = torch.where(possible, log_p - log_q, 0.0)
    return (log_p.exp() * difference).sum(dim=-1)


def adaptive_coefficient(
    coefficient: float, observed_kl: float, *, target: float, horizon: float, samples: float
) -> float:
    """The KL coefficient after `samples` more responses, moved in proportion to how far the KL is off its target.

        c * (1 + e * samples / horizon),  e = clip(observed / target - 1, -0.2, 0.2)

    `observed_kl` and `target`: the same kind of KL (per token or per sequence), in nats. `horizon`: in responses.
    samples >= 5 * horizon is refused: at e = -0.2 the coefficient would turn 0 or negative. Once an iteration at most.
    Source: Ziegler et al. (2019), arXiv 1909.08593, section 2.2.
    """
    expect_not_negative(coefficient=coefficient, samples=samples)
    expect_finite(observed_kl=observed_kl, target=target, horizon=horizon)
    expect_positive(target=target, horizon=horizon)
    if samples >= 5.0 * horizon:
        raise ValueError(f"samples: found {samples}, expected fewer than 5 * horizon = {5.0 * horizon}")
    error = min(max(observed_kl / target - 1.0, -0.2), 0.2)
    return coefficient * (1.0 + error * samples / horizon)


def penalty_coefficient(coefficient: float, observed_kl: float, *, target: float) -> float:
    """The coefficient of PPO-penalty for the next iteration: halved below the target's range, doubled above it.

        c / 2 if observed < target / 1.5;  2 * c if observed > 1.5 * target;  else c

    `observed_kl`: the mean KL(old || new) per token after the update, nats.
    Source: Schulman et al. (2017), arXiv 1707.06347, section 4.
    """
    expect_not_negative(coefficient=coefficient)
    expect_finite(observed_kl=observed_kl, target=target)
    expect_positive(target=target)
    if observed_kl < target / 1.5:
        return coefficient / 2.0
    return 2.0 * coefficient if observed_kl > 1.5 * target else coefficient
