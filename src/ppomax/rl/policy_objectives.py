"""Policy losses beside PPO-clip: plain policy gradient, TRPO's surrogate, PPO-penalty, and the KL as a loss.

The conventions are those of `ppomax.rl.objectives`: [B, R] tensors on response tokens, in nats; sums over counted
tokens divided by `denom`; only the first argument carries a gradient; masked entries have no influence and gradient 0.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppomax.rl.arguments import expect_mask, expect_not_negative, expect_positive, expect_shape
from ppomax.rl.kl import k1, k2, k3
from ppomax.rl.masked import masked_sum, zero_masked

KLEstimator = Literal["k1", "k2", "k3"]


def policy_gradient_loss(
    logprobs: Float[Tensor, "B R"], advantages: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], *, denom: float
) -> Float[Tensor, ""]:
    """A loss whose gradient is the policy gradient, on tokens that the current policy sampled.

        -sum log pi(a_t | s_t) * Phi_t / denom

    `advantages` is Phi_t: the whole return, rewards-to-go, rewards-to-go minus a baseline, or an advantage.
    Source: "Secrets of RLHF I", eq. 4-6 and 12.
    """
    expect_mask(mask, axes=2)
    expect_shape(mask.shape, logprobs=logprobs, advantages=advantages)
    expect_positive(denom=denom)
    return -(zero_masked(logprobs, mask) * zero_masked(advantages.detach(), mask)).sum() / denom


def surrogate_loss(
    logprobs: Float[Tensor, "B R"],
    old_logprobs: Float[Tensor, "B R"],
    advantages: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    *,
    denom: float,
) -> Float[Tensor, ""]:
    """The unclipped surrogate as a loss: what TRPO minimises inside its trust region.

        -sum ratio * A / denom,  ratio = exp(log pi - log pi_old)

    At ratio 1 its gradient is the plain policy gradient. Without a trust region nothing bounds the ratio.
    Source: "Secrets of RLHF I", eq. 13; Schulman et al. (2015), arXiv 1502.05477, eq. 14.
    """
    expect_mask(mask, axes=2)
    expect_shape(mask.shape, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    expect_positive(denom=denom)
    ratio = zero_masked(logprobs - old_logprobs.detach(), mask).exp()
    return -(ratio * zero_masked(advantages.detach(), mask)).sum() / denom


def penalised_policy_loss(
    logprobs: Float[Tensor, "B R"],
    old_logprobs: Float[Tensor, "B R"],
    advantages: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    *,
    kl_coefficient: float,
    denom: float,
    kl: Float[Tensor, "B R"] | None = None,
) -> Float[Tensor, ""]:
    """PPO-penalty: the surrogate minus a price on the distance from the policy that sampled.

        -sum (ratio * A - beta * KL_t) / denom,  KL_t = KL(old || new) at s_t

    `kl_coefficient` is beta. `kl` is the exact KL_t, `kl.full_kl(old, new)`; it then carries a gradient too. Without
    it KL_t is estimated as ratio - 1 - log ratio: on tokens of the old policy, value and gradient are unbiased.
    Source: "Secrets of RLHF I", PPO-penalty; Schulman et al. (2017), arXiv 1707.06347, section 4.
    """
    surrogate = surrogate_loss(logprobs, old_logprobs, advantages, mask, denom=denom)
    expect_shape(mask.shape, kl=kl)
    expect_not_negative(kl_coefficient=kl_coefficient)
    if kl is None:
        # The pair is swapped: k3 estimates the KL from its first argument, which must be the one that sampled.
        kl = k3(zero_masked(old_logprobs.detach(), mask), zero_masked(logprobs, mask))
    return surrogate + kl_coefficient * masked_sum(kl, mask) / denom


def kl_loss(
    logprobs: Float[Tensor, "B R"],
    reference_logprobs: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    *,
    estimator: KLEstimator,
    denom: float,
) -> Float[Tensor, ""]:
    """The KL to the reference as a term of the loss, not of the reward.

        sum k(log pi, log ref) / denom

    On tokens that pi sampled, `k2` descends KL(pi || ref), `k3` descends KL(ref || pi), and `k1` has gradient 0 in
    expectation (`ppomax.rl.kl` says why). Source: Schulman (2020), joschu.net/blog/kl-approx.html.
    """
    expect_mask(mask, axes=2)
    expect_shape(mask.shape, logprobs=logprobs, reference_logprobs=reference_logprobs)
    expect_positive(denom=denom)
    estimators = {"k1": k1, "k2": k2, "k3": k3}
    if estimator not in estimators:
        raise ValueError(f"estimator: found {estimator!r}, expected one of {', '.join(get_args(KLEstimator))}")
    estimate = estimators[estimator](zero_masked(logprobs, mask), zero_masked(reference_logprobs.detach(), mask))
    return masked_sum(estimate, mask) / denom


@torch.no_grad()
def importance_weights(
    old_logprobs: Float[Tensor, "B R"],
    behaviour_logprobs: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    *,
    cap: float,
) -> Float[Tensor, "B R"]:
    """Truncated importance weights, for tokens sampled by another policy than the one the ratio divides by.

        w_t = min(exp(log pi_old - log mu), cap),  mu = the policy that sampled: stale, quantised, or at a temperature

    Without gradient; masked entries return 0. They correct each token given its state; the states stay those of mu. A
    finite `cap` trades bias for bounded variance.
    Source: Ionides (2008), "Truncated importance sampling"; Espeholt et al. (2018), arXiv 1802.01561 (rho-bar).
    """
    expect_mask(mask, axes=2)
    expect_shape(mask.shape, old_logprobs=old_logprobs, behaviour_logprobs=behaviour_logprobs)
    expect_positive(cap=cap)
    return zero_masked((old_logprobs - behaviour_logprobs).exp().clamp(max=cap), mask)
