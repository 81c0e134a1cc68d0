"""Returns and advantages: reversed loops over the response positions, vectorised over the rows.

Everywhere: rewards, values [B, R] in reward units; column r belongs to response token r; V(s_r) is the value before
token r. Each row of `mask` is a prefix of True; a row with no counted token returns 0. `bootstrap` [B] is V of the
state after the last counted token: 0 (the default) where the episode ended or the score was placed, the cut state's
value for a truncated row without a score. Never both.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppomax.rl.arguments import expect_mask, expect_shape, expect_unit_interval
from ppomax.rl.masked import zero_masked


def td_residuals(
    rewards: Float[Tensor, "B R"],
    values: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    *,
    gamma: float,
    bootstrap: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, "B R"]:
    """One-step temporal-difference errors.

        delta_t = r_t + gamma * V(s_{t+1}) - V(s_t)

    V after the last counted token is `bootstrap`. Masked entries return 0.
    Source: "Secrets of RLHF I", delta_t of eq. 8; Sutton & Barto (2018), eq. 6.5.
    """
    expect_mask(mask, axes=2)
    expect_shape(mask.shape, rewards=rewards, values=values)
    expect_shape(mask.shape[:1], bootstrap=bootstrap)
    expect_unit_interval(gamma=gamma)
    after_last = torch.zeros_like(values[:, 0]) if bootstrap is None else bootstrap
    next_values = torch.where(last_token(mask), after_last[:, None], torch.roll(values, -1, dims=1))
    return zero_masked(rewards + gamma * next_values - values, mask)


def gae(
    rewards: Float[Tensor, "B R"],
    values: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    *,
    gamma: float,
    gae_lambda: float,
    bootstrap: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, "B R"]:
    """Generalised advantage estimates.

        A_t = sum_{l>=0} (gamma * lambda)^l * delta_{t+l} = delta_t + gamma * lambda * A_{t+1}

    lambda = 0 gives delta; lambda = 1 gives Monte Carlo returns minus V. Masked entries return 0; nothing is whitened.
    Source: "Secrets of RLHF I", section on GAE; Schulman et al. (2016), arXiv 1506.02438, eq. 16.
    """
    expect_unit_interval(gae_lambda=gae_lambda)
    delta = td_residuals(rewards, values, mask, gamma=gamma, bootstrap=bootstrap)
    advantages = torch.empty_like(delta)
    following = torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        following = delta[:, t] + gamma * gae_lambda * following
        advantages[:, t] = following
    return advantages


def lambda_returns(
    advantages: Float[Tensor, "B R"], values: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"]
) -> Float[Tensor, "B R"]:
    """The critic's target from GAE: A_t + V_old(s_t), the lambda-weighted mean of all k-step returns.

    Pass the advantages as `gae` returns them, before any whitening, and the unnormalised old values.
    Masked entries return 0. Source: Sutton & Barto (2018), section 12.1.
    """
    expect_mask(mask, axes=2)
    expect_shape(mask.shape, advantages=advantages, values=values)
    return zero_masked(advantages + values, mask)


def monte_carlo(
    rewards: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    *,
    gamma: float,
    bootstrap: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, "B R"]:
    """Discounted rewards-to-go.

        G_t = r_t + gamma * G_{t+1} = sum_{l>=0} gamma^l * r_{t+l},  with G = bootstrap after the last counted token

    Masked entries return 0. Source: "Secrets of RLHF I", eq. 11 (with r_{t+l}) and 16.
    """
    expect_mask(mask, axes=2)
    expect_shape(mask.shape, rewards=rewards)
    expect_shape(mask.shape[:1], bootstrap=bootstrap)
    expect_unit_interval(gamma=gamma)
    returns = torch.empty_like(rewards)
    following = torch.zeros_like(rewards[:, 0]) if bootstrap is None else bootstrap
    for t in reversed(range(rewards.shape[1])):
        following = torch.where(mask[:, t], rewards[:, t] + gamma * following, following)
        returns[:, t] = following
    return zero_masked(returns, mask)


def last_token(mask: Bool[Tensor, "B R"]) -> Bool[Tensor, "B R"]:
    """True at the last counted token of each row, nowhere else; all False in a row with no counted token."""
    expect_mask(mask, axes=2)
    followed = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    return mask & ~followed
