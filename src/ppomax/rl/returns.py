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

from ppomax.rl.arguments import expect_count, expect_mask, expect_shape, expect_unit_interval
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
    return zero_masked(rewards + gamma * _following(values, mask, bootstrap) - values, mask)


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
    return discounted_sums(delta, factor=gamma * gae_lambda)


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
    rewards = zero_masked(rewards, mask)
    if bootstrap is not None:
        rewards = rewards + gamma * zero_masked(bootstrap[:, None].expand(mask.shape), last_token(mask))
    return discounted_sums(rewards, factor=gamma)


def whole_return(
    rewards: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    *,
    gamma: float,
    bootstrap: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, " B"]:
    """The return of each whole response, R(tau).

        R = sum_{l=0}^{n-1} gamma^l * r_l + gamma^n * bootstrap,  n = counted tokens of the row

    gamma = 1 is the finite-horizon undiscounted return, gamma < 1 the discounted one. A row with no counted token
    returns 0. Source: "Secrets of RLHF I", policy gradient methods, where R(tau) is the weight Phi_t of every token.
    """
    return monte_carlo(rewards, mask, gamma=gamma, bootstrap=bootstrap)[:, 0]


def k_step_returns(
    rewards: Float[Tensor, "B R"],
    values: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    *,
    k: int,
    gamma: float,
    bootstrap: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, "B R"]:
    """Temporal-difference returns over k steps.

        G_t = r_t + gamma * r_{t+1} + ... + gamma^{k-1} * r_{t+k-1} + gamma^k * V(s_{t+k})

    Fewer than k steps before the end: all of them, then `bootstrap` discounted by the steps really taken, so k >= R is
    Monte Carlo. Masked entries return 0. Takes min(k, R) passes over the batch.
    Source: "Secrets of RLHF I", TD-k return; Sutton & Barto (2018), eq. 7.1.
    """
    expect_count(k=k)
    expect_mask(mask, axes=2)
    expect_shape(mask.shape, rewards=rewards, values=values)
    if k >= mask.shape[1]:
        return monte_carlo(rewards, mask, gamma=gamma, bootstrap=bootstrap)
    expect_shape(mask.shape[:1], bootstrap=bootstrap)
    expect_unit_interval(gamma=gamma)
    returns = values
    for _ in range(k):
        returns = rewards + gamma * _following(returns, mask, bootstrap)
    return zero_masked(returns, mask)


def k_step_advantages(
    rewards: Float[Tensor, "B R"],
    values: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    *,
    k: int,
    gamma: float,
    bootstrap: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, "B R"]:
    """Advantages over k steps: the k-step return minus V(s_t).

        A_t = sum_{l=0}^{min(k, n-t)-1} gamma^l * delta_{t+l},  n = counted tokens of the row

    k = 1 is delta; k >= R is Monte Carlo minus V. Masked entries return 0. Takes min(k, R) passes over the batch.
    Source: "Secrets of RLHF I", eq. 8 (the sum ends at k - 1, not k); Schulman et al. (2016), arXiv 1506.02438, eq. 14.
    """
    expect_count(k=k)
    delta = td_residuals(rewards, values, mask, gamma=gamma, bootstrap=bootstrap)
    if k >= mask.shape[1]:
        return discounted_sums(delta, factor=gamma)
    advantages = delta
    for _ in range(k - 1):
        advantages = delta + gamma * _following(advantages, mask)
    return zero_masked(advantages, mask)


def discounted_sums(x: Float[Tensor, "B R"], *, factor: float) -> Float[Tensor, "B R"]:
    """Discounted sums from each position to the end of the width.

        S_t = x_t + factor * S_{t+1},  with S = 0 after the last position

    There is no mask: zero the padding first.
    """
    # One position after the other in memory: a column of [B, R] touches a cache line per row.
    sums = list(x.T.contiguous())
    for t in reversed(range(len(sums) - 1)):
        sums[t] = sums[t] + factor * sums[t + 1]
    return torch.stack(sums, dim=1)


def last_token(mask: Bool[Tensor, "B R"]) -> Bool[Tensor, "B R"]:
    """True at the last counted token of each row, nowhere else; all False in a row with no counted token."""
    expect_mask(mask, axes=2)
    followed = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    return mask & ~followed


def _following(x: Tensor, mask: Tensor, after_last: Tensor | None = None) -> Tensor:
    """x_{t+1} in column t, and `after_last` (default 0) at the last counted token. Masked entries hold anything."""
    after_last = torch.zeros_like(x[:, 0]) if after_last is None else after_last
    return torch.where(last_token(mask), after_last[:, None], torch.roll(x, -1, dims=1))
