"""What the optimiser minimises: each a sum over counted tokens divided by the `denom` that the caller passes in.

`denom` is the number of counted tokens of the whole minibatch, over all microbatches and ranks, so that micro-batch
size and process count change nothing. All tensors are [B, R] on response tokens, log-probs and entropies in nats.
Only the first argument carries a gradient; a masked entry, NaN included, has no influence and gradient 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppomax.rl.arguments import expect_mask, expect_positive, expect_shape
from ppomax.rl.kl import k3
from ppomax.rl.masked import masked_mean, masked_sum, zero_masked


def clipped_policy_loss(
    logprobs: Float[Tensor, "B R"],
    old_logprobs: Float[Tensor, "B R"],
    advantages: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    *,
    clip_ratio: float,
    denom: float,
    dual_clip: float | None = None,
    weights: Float[Tensor, "B R"] | None = None,
) -> Float[Tensor, ""]:
    """PPO's clipped surrogate as a loss.

        -sum w * S / denom,  S = min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A),  ratio = exp(log pi - log pi_old)

    `dual_clip` is c > 1: where A < 0, S = max(S, c * A), so that a ratio above c has no gradient; None and inf are
    plain PPO. `weights` is w (default 1): detached factors, such as `policy_objectives.importance_weights`.
    Source: "Secrets of RLHF I", PPO-clip; Schulman et al. (2017), arXiv 1707.06347, eq. 7; the dual clip is from
    Ye et al. (2020), arXiv 1912.09729.
    """
    expect_mask(mask, axes=2)
    expect_shape(mask.shape, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, weights=weights)
    expect_positive(clip_ratio=clip_ratio, denom=denom)
    if dual_clip is not None and not dual_clip > 1.0:
        raise ValueError(f"dual_clip: found {dual_clip}, expected a number > 1")
    advantages = zero_masked(advantages.detach(), mask)
    ratio = zero_masked(logprobs - old_logprobs.detach(), mask).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * advantages)
    if dual_clip is not None:
        # Where A >= 0 the floor is -inf, not c * A: c may be infinite and A zero.
        surrogate = torch.maximum(surrogate, torch.where(advantages < 0, dual_clip * advantages, -torch.inf))
    if weights is not None:
        surrogate = surrogate * zero_masked(weights.detach(), mask)
    return -masked_sum(surrogate, mask) / denom


def value_loss(
    values: Float[Tensor, "B R"],
    old_values: Float[Tensor, "B R"],
    returns: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    *,
    value_clip: float | None,
    denom: float,
) -> Float[Tensor, ""]:
    """The critic's squared error, without a factor 1/2.

        sum max((V - G)^2, (clip(V, V_old - c, V_old + c) - G)^2) / denom

    `value_clip` is c in reward units; None means the plain squared error. Source: "Secrets of RLHF I", eq. 16.
    """
    expect_mask(mask, axes=2)
    expect_shape(mask.shape, values=values, old_values=old_values, returns=returns)
    expect_positive(value_clip=value_clip, denom=denom)
    values, returns = zero_masked(values, mask), zero_masked(returns.detach(), mask)
    error = (values - returns).square()
    if value_clip is not None:
        old_values = zero_masked(old_values.detach(), mask)
        near = values.clamp(old_values - value_clip, old_values + value_clip)
        error = torch.maximum(error, (near - returns).square())
    return masked_sum(error, mask) / denom


def nll_loss(logprobs: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], *, denom: float) -> Float[Tensor, ""]:
    """Next-token cross-entropy, -sum log p / denom: for SFT, the ptx term and the reward model's LM term.

    Source: "Secrets of RLHF I", eq. 2 and 17, as losses.
    """
    expect_mask(mask, axes=2)
    expect_shape(mask.shape, logprobs=logprobs)
    expect_positive(denom=denom)
    return -masked_sum(logprobs, mask) / denom


def entropy_bonus(
    entropy: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], *, denom: float, clip: float | None = None
) -> Float[Tensor, ""]:
    """The entropy of the policy. A bonus: subtract it from the loss.

        sum_b min(sum_t H_bt, delta) / denom

    H_t is the exact entropy over the vocabulary. `clip` is delta, nats per response: a response above it has no
    gradient; None means no limit. Source: "Secrets of RLHF I", fig. 16 (there |mean H - 35|, whose clip never acts).
    """
    expect_mask(mask, axes=2)
    expect_shape(mask.shape, entropy=entropy)
    expect_positive(denom=denom, clip=clip)
    entropy_B = zero_masked(entropy, mask).sum(dim=1)
    return (entropy_B if clip is None else entropy_B.clamp(max=clip)).sum() / denom


@torch.no_grad()
def ratio_statistics(
    logprobs: Float[Tensor, "B R"], old_logprobs: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], *, clip_ratio: float
) -> dict[str, Tensor]:
    """How far the policy has moved from the one that sampled, over counted tokens, without gradient.

    `clip_fraction` (tokens with |ratio - 1| > eps), `approx_kl` (k3 of KL(old || new), nats) and `tokens` are sums:
    add them up over microbatches and ranks, then divide by `tokens`. `ratio_max`: combine by max; 0 if nothing counts.
    """
    expect_mask(mask, axes=2)
    expect_shape(mask.shape, logprobs=logprobs, old_logprobs=old_logprobs)
    expect_positive(clip_ratio=clip_ratio)
    logprobs, old_logprobs = zero_masked(logprobs, mask), zero_masked(old_logprobs, mask)
    ratio = (logprobs - old_logprobs).exp()
    return {
        "clip_fraction": masked_sum(((ratio - 1).abs() > clip_ratio).to(ratio.dtype), mask),
        "approx_kl": masked_sum(k3(old_logprobs, logprobs), mask),
        "ratio_max": zero_masked(ratio, mask).max(),
        "tokens": mask.sum().to(ratio.dtype),
    }


@torch.no_grad()
def explained_variance(
    values: Float[Tensor, "B R"], returns: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"]
) -> Float[Tensor, ""]:
    """1 - Var(G - V) / Var(G) over counted tokens, both biased: 1 is a perfect critic, 0 one no better than a constant.

    Not a sum: pass the whole batch. 0 where the returns do not vary beyond their own rounding.
    """
    expect_mask(mask, axes=2)
    expect_shape(mask.shape, values=values, returns=returns)
    values, returns = zero_masked(values, mask), zero_masked(returns, mask)
    varying = _variance(returns, mask)
    rounding = (torch.finfo(returns.dtype).eps * masked_mean(returns, mask)).square()
    explained = 1 - _variance(returns - values, mask) / varying
    return torch.where(varying > rounding, explained, torch.zeros_like(explained))


def _variance(x: Tensor, mask: Tensor) -> Tensor:
    centred = x - masked_mean(x, mask)
    # The mean of many equal numbers is off by some ulps: a second pass takes that out of the variance.
    return masked_mean((centred - masked_mean(centred, mask)).square(), mask)
