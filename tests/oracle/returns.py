"""Returns and advantages of one unpadded response, each as its definition spells it: sums, no recursions.

`values[t]` is V(s_t), the value BEFORE token t. `bootstrap` is V of the state after the last token: 0 where the episode
ended or the score was placed, the critic's value where a truncated response is bootstrapped (trap 11).
"""

from __future__ import annotations

import math

from .masked import Row


def td_residuals(rewards: Row, values: Row, *, gamma: float, bootstrap: float = 0.0) -> list[float]:
    """delta_t = r_t + gamma V(s_{t+1}) - V(s_t), with V(s_n) = bootstrap.

    Source: "Secrets of RLHF I", eq. 8; Sutton and Barto (2018), eq. 6.5.
    """
    following = [*values, bootstrap][1:]
    return [r + gamma * after - before for r, before, after in zip(rewards, values, following, strict=True)]


def gae(rewards: Row, values: Row, *, gamma: float, gae_lambda: float, bootstrap: float = 0.0) -> list[float]:
    """A_t = sum_{l=0}^{n-1-t} (gamma lambda)^l delta_{t+l}, delta_t as above.

    Source: Schulman et al. 2016 (arXiv 1506.02438), eq. 16; "Secrets of RLHF I", section 3.2, GAE and its limits
    (eq. 11). Errata: eq. 11 prints delta_{t+1} under the sum; the index is t+l. High variance is at
    lambda = 1, where the notes say gamma = 1.
    """
    delta = td_residuals(rewards, values, gamma=gamma, bootstrap=bootstrap)
    return [
        math.fsum((gamma * gae_lambda) ** steps * delta[t + steps] for steps in range(len(delta) - t))
        for t in range(len(delta))
    ]


def k_step_returns(rewards: Row, values: Row, *, k: int, gamma: float, bootstrap: float = 0.0) -> list[float]:
    """R_t^k = r_t + gamma r_{t+1} + ... + gamma^{m-1} r_{t+m-1} + gamma^m V(s_{t+m}), m = min(k, n - t).

    Steps beyond the end do not exist; V(s_n) = bootstrap, discounted by the m steps really taken.
    Source: "Secrets of RLHF I", section 3.2 (TD-k return).
    """
    n, states = len(rewards), [*values, bootstrap]
    out = []
    for t in range(n):
        taken = min(k, n - t)
        terms = [gamma**step * rewards[t + step] for step in range(taken)]
        out.append(math.fsum([*terms, gamma**taken * states[t + taken]]))
    return out


def k_step_advantages(rewards: Row, values: Row, *, k: int, gamma: float, bootstrap: float = 0.0) -> list[float]:
    """A_t^k = sum_{l=0}^{min(k, n-t)-1} gamma^l delta_{t+l}.

    Source: "Secrets of RLHF I", eq. 8. Errata: the paper sums l = 1..k and the notes l = 0..k; right is l = 0..k-1.
    """
    delta = td_residuals(rewards, values, gamma=gamma, bootstrap=bootstrap)
    n = len(delta)
    return [math.fsum(gamma**step * delta[t + step] for step in range(min(k, n - t))) for t in range(n)]


def lambda_returns(
    rewards: Row, values: Row, *, gamma: float, gae_lambda: float, bootstrap: float = 0.0
) -> list[float]:
    """The lambda-weighted mean of the k-step returns; equals GAE + unnormalised V(s_t) (trap 13).

        G_t = (1 - lambda) sum_{k=1}^{N-1} lambda^{k-1} R_t^k + lambda^{N-1} R_t^N,   N = n - t

    Source: Sutton and Barto (2018), eq. 12.3.
    """
    n = len(rewards)
    by_k = [k_step_returns(rewards, values, k=k, gamma=gamma, bootstrap=bootstrap) for k in range(1, n + 1)]
    out = []
    for t in range(n):
        weights = [(1 - gae_lambda) * gae_lambda ** (k - 1) for k in range(1, n - t)] + [gae_lambda ** (n - t - 1)]
        out.append(math.fsum(weight * by_k[i][t] for i, weight in enumerate(weights)))
    return out


def monte_carlo(rewards: Row, *, gamma: float, bootstrap: float = 0.0) -> list[float]:
    """R_t = sum_{l=0}^{n-1-t} gamma^l r_{t+l} + gamma^{n-t} bootstrap: discounted rewards-to-go.

    Source: "Secrets of RLHF I", eq. 16 and Algorithm 1. Errata: eq. 11 prints r_{t+1} under the sum; it is r_{t+l}.
    """
    n = len(rewards)
    return [
        math.fsum([*(gamma**step * rewards[t + step] for step in range(n - t)), gamma ** (n - t) * bootstrap])
        for t in range(n)
    ]


def whole_return(rewards: Row, *, gamma: float, bootstrap: float = 0.0) -> float:
    """R(tau) = sum_{l=0}^{n-1} gamma^l r_l + gamma^n bootstrap; 0 for an empty response, whatever its bootstrap.

    gamma = 1 is the finite-horizon undiscounted return. Source: "Secrets of RLHF I", section 3.2.
    Errata: the notes call the return with gamma "infinite undiscounted"; it is discounted.
    """
    if not rewards:
        return 0.0
    return math.fsum([*(gamma**i * r for i, r in enumerate(rewards)), gamma ** len(rewards) * bootstrap])
