"""Scored rollouts → rewards per token → advantages and returns: the choices of the paper's sections 3 and 5.3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ppomax.config import PPOConfig
from ppomax.rl.baselines import batch_mean, group_mean, group_normalise, leave_one_out, spread
from ppomax.rl.kl import k2, k3
from ppomax.rl.masked import zero_masked
from ppomax.rl.policy_objectives import importance_weights
from ppomax.rl.returns import gae, k_step_advantages, lambda_returns, monte_carlo, whole_return
from ppomax.rl.shaping import (
    Moments,
    length_penalty,
    missing_eos_penalty,
    normalise_and_clip,
    normalise_by_source,
    place_on_last_token,
    rolling_returns,
    scale_rewards,
    token_rewards,
    update_by_source,
)
from ppomax.types import Experience, ScoredRollouts


@dataclass(frozen=True)
class History:
    """Moments of everything so far: of all scores, of each source's scores, and of rolling returns (reward scaling)."""

    scores: Moments = field(default_factory=Moments)
    by_source: Mapping[str, Moments] = field(default_factory=dict)
    returns: Moments = field(default_factory=Moments)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` gives back an equal value."""
        by_source = {source: moments.to_dict() for source, moments in self.by_source.items()}
        return {"scores": self.scores.to_dict(), "by_source": by_source, "returns": self.returns.to_dict()}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> History:
        """The history that `to_dict` wrote."""
        by_source = {source: Moments.from_dict(moments) for source, moments in saved["by_source"].items()}
        return cls(Moments.from_dict(saved["scores"]), by_source, Moments.from_dict(saved["returns"]))


def seen(scored: ScoredRollouts, history: History, config: PPOConfig) -> History:
    """The history with this batch included; bootstrapped rows carry no score and stay out."""
    rollout, mask = scored.rollout, scored.rollout.mask_BR
    counted = torch.ones_like(rollout.truncated_B)
    if config.score.truncated == "bootstrap":
        counted = ~rollout.truncated_B
    scores = scored.score_B[counted].tolist()
    sources = [p.source for p, counts in zip(rollout.prompts, counted.tolist(), strict=True) if counts]
    returns = history.returns
    if config.score.scale:
        rolling_BR = rolling_returns(_unscaled(scored, config), mask, gamma=config.gamma)
        returns = returns.update(rolling_BR[mask & counted[:, None]].tolist())
    return History(history.scores.update(scores), update_by_source(history.by_source, scores, sources), returns)


def rewards_of(scored: ScoredRollouts, history: History, config: PPOConfig, *, kl_coefficient: float) -> Tensor:
    """Rewards per token [B, R], in this order: normalise, clip, penalties, place, minus KL."""
    rollout, mask, settings = scored.rollout, scored.rollout.mask_BR, config.score
    score_B, dense_BR = scored.score_B, scored.dense_BR
    if settings.scale:
        dense_BR = scale_rewards(_unscaled(scored, config), mask, history.returns)
        score_B = torch.zeros_like(score_B)
    elif settings.normalise and settings.by_source:
        sources = [prompt.source for prompt in rollout.prompts]
        # A source of which all responses were cut so far has no history with `truncated bootstrap`.
        moments = {source: Moments() for source in sources} | dict(history.by_source)
        score_B = normalise_by_source(score_B, sources, moments, clip=settings.clip)
    elif settings.normalise:
        score_B = normalise_and_clip(score_B, history.scores, clip=settings.clip)
    elif settings.clip is not None:
        score_B = score_B.clamp(-settings.clip, settings.clip)
    if settings.truncated == "bootstrap":
        score_B = torch.where(rollout.truncated_B, 0.0, score_B)
    if settings.missing_eos_penalty is not None:
        score_B = score_B + missing_eos_penalty(rollout.truncated_B, penalty=settings.missing_eos_penalty)
    if settings.length_penalty is not None:
        free = settings.length_free
        score_B = score_B + length_penalty(rollout.length_B, coefficient=settings.length_penalty, free=free)
    in_reward = kl_coefficient if config.kl.place == "reward" else 0.0
    return token_rewards(
        score_B, scored.old_logprobs_BR, scored.reference_logprobs_BR, mask, kl_coefficient=in_reward, dense=dense_BR,
        kl=_kl_estimate(scored, config),
    )  # fmt: skip


def estimate(
    scored: ScoredRollouts, history: History, config: PPOConfig, *, kl_coefficient: float | None = None
) -> tuple[Experience, Tensor]:
    """Rewards per token [B, R] → advantages and returns; nothing is whitened yet."""
    eta = (config.kl.coefficient or 0.0) if kl_coefficient is None else kl_coefficient
    rewards_BR = rewards_of(scored, history, config, kl_coefficient=eta)
    mask, values, gamma, bootstrap = scored.rollout.mask_BR, scored.values_BR, config.gamma, scored.bootstrap_B
    advantages_BR = advantages_of(rewards_BR, scored, config)
    if config.critic.target == "monte_carlo" or config.critic.init is None:
        returns_BR = monte_carlo(rewards_BR, mask, gamma=gamma, bootstrap=bootstrap)
    else:
        by_gae = advantages_BR if config.advantage == "gae" else gae(
            rewards_BR, values, mask, gamma=gamma, gae_lambda=config.gae_lambda, bootstrap=bootstrap
        )  # fmt: skip
        returns_BR = lambda_returns(by_gae, values, mask)
    weights = None
    if config.objective.importance_cap is not None:
        behaviour = scored.rollout.behaviour_logprobs_BR
        weights = importance_weights(scored.old_logprobs_BR, behaviour, mask, cap=config.objective.importance_cap)
    experience = Experience(
        scored.rollout, scored.old_logprobs_BR, values, advantages_BR, returns_BR, scored.reference_logprobs_BR, weights
    )  # fmt: skip
    return experience, rewards_BR


def advantages_of(rewards_BR: Tensor, scored: ScoredRollouts, config: PPOConfig) -> Tensor:
    """Φ [B, R] of the policy gradient (paper, section 3)."""
    mask, values, gamma, bootstrap = scored.rollout.mask_BR, scored.values_BR, config.gamma, scored.bootstrap_B
    if config.advantage == "gae":
        return gae(rewards_BR, values, mask, gamma=gamma, gae_lambda=config.gae_lambda, bootstrap=bootstrap)
    if config.advantage == "k_step":
        return k_step_advantages(rewards_BR, values, mask, k=config.k, gamma=gamma, bootstrap=bootstrap)
    whole_B = whole_return(rewards_BR, mask, gamma=gamma, bootstrap=bootstrap)
    group_B = _groups(scored)
    if config.baseline == "group_normalise":
        return spread(group_normalise(whole_B, group_B), mask)
    returns_BR = spread(whole_B, mask)
    if config.advantage == "rewards_to_go":
        returns_BR = monte_carlo(rewards_BR, mask, gamma=gamma, bootstrap=bootstrap)
    if config.baseline == "critic":
        # The whole return is what the first state's value predicts, the return from t on what V(s_t) does.
        baseline_BR = values if config.advantage == "rewards_to_go" else spread(values[:, 0], mask)
    elif config.baseline == "batch_mean":
        baseline_BR = spread(batch_mean(whole_B), mask)
    elif config.baseline == "leave_one_out":
        baseline_BR = spread(leave_one_out(whole_B, group_B), mask)
    elif config.baseline == "group_mean":
        baseline_BR = spread(group_mean(whole_B, group_B), mask)
    else:
        baseline_BR = torch.full_like(returns_BR, config.baseline or 0.0)
    return zero_masked(returns_BR - baseline_BR, mask)


def _unscaled(scored: ScoredRollouts, config: PPOConfig) -> Tensor:
    """Raw rewards [B, R] for reward scaling: the score in its place, plus dense rewards."""
    score_B = scored.score_B
    if config.score.truncated == "bootstrap":
        score_B = torch.where(scored.rollout.truncated_B, 0.0, score_B)
    placed_BR = place_on_last_token(score_B, scored.rollout.mask_BR)
    return placed_BR if scored.dense_BR is None else placed_BR + scored.dense_BR


def _kl_estimate(scored: ScoredRollouts, config: PPOConfig) -> Tensor | None:
    """The KL of every token by the chosen estimator; None: k1, which `token_rewards` takes itself."""
    if config.kl.estimator == "full":
        return scored.full_kl_BR
    estimators = {"k2": k2, "k3": k3}
    if config.kl.estimator not in estimators:
        return None
    return estimators[config.kl.estimator](scored.old_logprobs_BR, scored.reference_logprobs_BR)


def _groups(scored: ScoredRollouts) -> Tensor:
    """[B] which rows answer the same prompt."""
    numbers: dict[tuple[int, ...], int] = {}
    return torch.tensor([numbers.setdefault(ids, len(numbers)) for ids in scored.rollout.prompt_ids])
