"""Named recipes: functions that return a complete configuration.

`ppo-max` is the schema's defaults, with the paper's ptx loss; every other recipe says what it changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from ppomax.config.layers import nearest
from ppomax.config.schema import (
    CriticConfig,
    KLConfig,
    OptimConfig,
    PPOConfig,
    RewardConfig,
    ScoreConfig,
)
from ppomax.errors import SetupError

C = TypeVar("C")

PPO_RECIPES: dict[str, Callable[[], PPOConfig]] = {}
REWARD_RECIPES: dict[str, Callable[[], RewardConfig]] = {}


def _ppo(function: Callable[[], PPOConfig]) -> Callable[[], PPOConfig]:
    PPO_RECIPES[function.__name__.replace("_", "-")] = function
    return function


def _reward(function: Callable[[], RewardConfig]) -> Callable[[], RewardConfig]:
    REWARD_RECIPES[function.__name__.removeprefix("reward_").replace("_", "-")] = function
    return function


@_ppo
def ppo_max() -> PPOConfig:
    """PPO-max (paper 5.4): score normalised by history and clipped at 5, token KL 0.05, critic from the reward model
    and pre-trained, value clip, global gradient clip, ptx in the same step (0.1, needs ptx_data), one epoch."""
    return PPOConfig(ptx_weight=0.1)


@_ppo
def vanilla() -> PPOConfig:
    """PPO with none of the tricks: raw score, no KL, no ptx, critic from the policy with a fresh head, no
    pre-training, no value clip, no gradient clip, Monte Carlo advantages. The paper's figure 4: it collapses."""
    return PPOConfig(
        ptx_weight=None,
        kl=KLConfig(coefficient=None),
        score=ScoreConfig(normalise=False, clip=None),
        critic=CriticConfig(
            init="policy",
            pretrain_iterations=0,
            value_clip=None,
            optim=OptimConfig(lr=1.65e-6, max_grad_norm=None),
        ),
        optim=OptimConfig(lr=5e-7, max_grad_norm=None),
        gae_lambda=1.0,
    )


@_reward
def reward_paper() -> RewardConfig:
    """Eq. 2: ranking loss and LM loss on the preferred response, β_rm = 1."""
    return RewardConfig()


@_reward
def reward_instructgpt() -> RewardConfig:
    """Ranking loss alone (β_rm = 0), as InstructGPT and CPM."""
    return RewardConfig(lm_weight=None)


def recipe_named(name: str, recipes: Mapping[str, Callable[[], C]]) -> C:
    """The configuration of a recipe; an unknown name is an error that names the nearest."""
    if name not in recipes:
        raise SetupError(f"unknown recipe '{name}'{nearest(name, list(recipes))} Known: {', '.join(recipes)}")
    return recipes[name]()
