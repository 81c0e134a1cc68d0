"""The formulas of "Secrets of RLHF I" as slow scalar loops over plain lists, one unpadded response at a time.

Shares no code with ppomax.rl and uses no tensors, so that agreement between the two means something.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

Row = Sequence[float]


def td_residuals(rewards: Row, values: Row, gamma: float, bootstrap: float = 0.0) -> list[float]:
    """Eq. 8: delta_t = r_t + gamma V(s_{t+1}) - V(s_t)."""
    following = [*values[1:], bootstrap]
    return [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]


def gae(rewards: Row, values: Row, gamma: float, lam: float, bootstrap: float = 0.0) -> list[float]:
    """GAE as the literal double sum: A_t = sum_l (gamma lam)^l delta_{t+l}."""
    delta = td_residuals(rewards, values, gamma, bootstrap)
    n = len(delta)
    return [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]


def k_step_return(rewards: Row, values: Row, gamma: float, t: int, k: int, bootstrap: float = 0.0) -> float:
    """r_t + gamma r_{t+1} + ... + gamma^{k-1} r_{t+k-1} + gamma^k V(s_{t+k})."""
    states = [*values, bootstrap]
    return sum(gamma**i * rewards[t + i] for i in range(k)) + gamma**k * states[t + k]


def lambda_returns(rewards: Row, values: Row, gamma: float, lam: float, bootstrap: float = 0.0) -> list[float]:
    """Forward view: the exponentially weighted mean of all k-step returns, the last one taking the rest."""
    n = len(rewards)
    out = []
    for t in range(n):
        horizon = n - t
        weights = [(1 - lam) * lam ** (k - 1) for k in range(1, horizon)] + [lam ** (horizon - 1)]
        steps = [k_step_return(rewards, values, gamma, t, k, bootstrap) for k in range(1, horizon + 1)]
        out.append(sum(w * g for w, g in zip(weights, steps, strict=True)))
    return out


def monte_carlo(rewards: Row, gamma: float, bootstrap: float = 0.0) -> list[float]:
    """Eq. 11: sum_l gamma^l r_{t+l}, and the cut state's value after the end."""
    n = len(rewards)
    return [sum(gamma**k * rewards[t + k] for k in range(n - t)) + gamma ** (n - t) * bootstrap for t in range(n)]


def token_rewards(score: float, old: Row, reference: Row, eta: float, dense: Row | None = None) -> list[float]:
    """r_total(t) = [t = last] score + dense_t - eta (log pi_old - log pi_ref)."""
    out = [-eta * (o - p) for o, p in zip(old, reference, strict=True)]
    if dense is not None:
        out = [r + d for r, d in zip(out, dense, strict=True)]
    out[-1] += score
    return out


def normalise_and_clip(scores: Row, history: Row, clip: float | None) -> list[float]:
    """Eq. 18, with the moments of the whole history (population standard deviation)."""
    mean, std = statistics.fmean(history), statistics.pstdev(history)
    normal = [(s - mean) / std for s in scores]
    return normal if clip is None else [min(max(z, -clip), clip) for z in normal]


def k1(logprob: float, reference: float) -> float:
    """log(pi / ref)."""
    return logprob - reference


def k2(logprob: float, reference: float) -> float:
    """Half the squared log ratio."""
    return 0.5 * (logprob - reference) ** 2


def k3(logprob: float, reference: float) -> float:
    """ref/pi - 1 - log(ref/pi)."""
    return math.exp(reference) / math.exp(logprob) - 1 - (reference - logprob)


def clipped_policy_loss(logprobs: Row, old: Row, advantages: Row, epsilon: float) -> list[float]:
    """Per token, PPO-clip: -min(ratio A, clip(ratio) A)."""
    out = []
    for new, before, advantage in zip(logprobs, old, advantages, strict=True):
        ratio = math.exp(new) / math.exp(before)
        clipped = min(max(ratio, 1 - epsilon), 1 + epsilon)
        out.append(-min(ratio * advantage, clipped * advantage))
    return out


def value_loss(values: Row, old: Row, returns: Row, clip: float | None) -> list[float]:
    """Per token, eq. 16 with the value kept within `clip` of its old value: the larger squared error."""
    out = []
    for new, before, target in zip(values, old, returns, strict=True):
        error = (new - target) ** 2
        if clip is not None:
            near = min(max(new, before - clip), before + clip)
            error = max(error, (near - target) ** 2)
        out.append(error)
    return out


def explained_variance(values: Row, returns: Row) -> float:
    """1 - Var(returns - values) / Var(returns)."""
    errors = [g - v for v, g in zip(values, returns, strict=True)]
    return 1 - statistics.pvariance(errors) / statistics.pvariance(returns)


def whiten(xs: Row, eps: float) -> list[float]:
    """(x - mean) / sqrt(population variance + eps)."""
    mean, variance = statistics.fmean(xs), statistics.pvariance(xs)
    return [(x - mean) / math.sqrt(variance + eps) for x in xs]


def ranking_loss(chosen: Row, rejected: Row, margin: float = 0.0) -> list[float]:
    """Per pair, eq. 1 negated: -log sigmoid(chosen - rejected - margin)."""
    return [math.log(1 + math.exp(-(c - r - margin))) for c, r in zip(chosen, rejected, strict=True)]
