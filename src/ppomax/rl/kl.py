"""Per-token estimates of KL(pi || ref) from the log-probs of tokens that were sampled from pi.

In: log pi and log ref of the same tokens, [B, R], nats. Out: [B, R], nats. With d = log pi - log ref, all three
estimate the KL; k1 and k3 without bias, k2 up to third order in d. In a loss what counts is the gradient of the
estimate, which each function states. Padding passes through unmasked: in a loss, `zero_masked` both inputs first.
Source: Schulman (2020), "Approximating KL divergence", joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ppomax.rl.arguments import expect_shape


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
