"""Named recipes: functions that return a complete configuration.

`ppo-max` is the schema's defaults, with the paper's ptx loss; every other recipe says what it changes, and from where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ppomax.config.layers import nearest, overlay
from ppomax.config.ppo import CriticConfig, KLConfig, ObjectiveConfig, PPOConfig, ScoreConfig
from ppomax.config.schema import ModelConfig, OptimConfig, RewardConfig, SamplingConfig, SaveConfig, SFTConfig
from ppomax.errors import SetupError

C = TypeVar("C")

PPO_RECIPES: dict[str, Callable[[], PPOConfig]] = {}
REWARD_RECIPES: dict[str, Callable[[], RewardConfig]] = {}
SFT_RECIPES: dict[str, Callable[[], SFTConfig]] = {}
RECIPES: dict[str, dict[str, Callable[[], Any]]] = {"sft": SFT_RECIPES, "reward": REWARD_RECIPES, "ppo": PPO_RECIPES}


def _ppo(function: Callable[[], PPOConfig]) -> Callable[[], PPOConfig]:
    PPO_RECIPES[function.__name__.replace("_", "-")] = function
    return function


def _reward(function: Callable[[], RewardConfig]) -> Callable[[], RewardConfig]:
    REWARD_RECIPES[function.__name__.removeprefix("reward_").replace("_", "-")] = function
    return function


def _sft(function: Callable[[], SFTConfig]) -> Callable[[], SFTConfig]:
    SFT_RECIPES[function.__name__.removeprefix("sft_").replace("_", "-")] = function
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


@_ppo
def instructgpt() -> PPOConfig:
    """Ouyang et al. (2022): token KL 0.02 and ptx 27.8; the score is neither normalised nor clipped; critic from the
    reward model, no pre-training; final/ holds the moving average of the weights. The ptx term is a token mean."""
    return PPOConfig(
        ptx_weight=27.8,
        kl=KLConfig(coefficient=0.02),
        score=ScoreConfig(normalise=False, clip=None),
        critic=CriticConfig(pretrain_iterations=0),
        gae_lambda=0.95,
        ema=0.992,
    )


@_ppo
def cpm() -> PPOConfig:
    """After CPM's script: PPO-clip with token KL, GAE and value clip; no ptx, no score
    normalisation, no critic pre-training. Its reward model has no LM term (`reward --recipe instructgpt`)."""
    return PPOConfig(
        score=ScoreConfig(normalise=False, clip=None),
        critic=CriticConfig(pretrain_iterations=0),
        whiten_advantages=True,
        gae_lambda=0.95,
    )


@_ppo
def reinforce() -> PPOConfig:
    """Policy gradient on rewards-to-go minus the batch's mean return, one step per rollout batch, no critic."""
    return _without_critic(
        advantage="rewards_to_go", baseline="batch_mean", objective=ObjectiveConfig(kind="policy_gradient"),
        minibatch=128,
    )  # fmt: skip


@_ppo
def rloo() -> PPOConfig:
    """REINFORCE on whole returns minus the mean of the other responses to the prompt (Ahmadian et al., 2024): four
    responses per prompt, one step per rollout batch, no critic."""
    return _without_critic(
        advantage="whole_return", baseline="leave_one_out", objective=ObjectiveConfig(kind="policy_gradient"),
        samples_per_prompt=4, minibatch=128,
    )  # fmt: skip


@_ppo
def grpo() -> PPOConfig:
    """Returns in standard deviations of their prompt's group, PPO-clip, KL as a k3 term of the loss (Shao et al.,
    2024): eight responses per prompt, raw score, no critic."""
    return _without_critic(
        advantage="whole_return", baseline="group_normalise", samples_per_prompt=8,
        kl=KLConfig(coefficient=0.04, place="loss", estimator="k3"), score=ScoreConfig(normalise=False, clip=None),
    )  # fmt: skip


@_ppo
def trpo() -> PPOConfig:
    """PPO-max's rewards and critic, with a natural-gradient step inside a KL ball of 0.01 nats per token instead of the
    clipped surrogate (eq. 13). Float32, one step per rollout batch, no ptx; for small models."""
    return PPOConfig(
        objective=ObjectiveConfig(kind="trpo"), minibatch=128, compute=ModelConfig(dtype="float32")
    )  # fmt: skip


@_ppo
def ppo_penalty() -> PPOConfig:
    """PPO-max with the KL to the old policy as a price (β, steered to 0.01 nats per token) instead of the clip."""
    return PPOConfig(ptx_weight=0.1, objective=ObjectiveConfig(kind="penalty", penalty_target=0.01))


@_ppo
def paper_7b_en() -> PPOConfig:
    """The paper's English run: PPO-max with sampling batch 128, training batch 32, lr 5e-7 and 1.65e-6, gradient
    checkpointing; prompts of up to 1024 tokens, responses of up to 512 (the paper names neither length)."""
    return ppo_max().model_copy(update=_PAPER_7B)


@_ppo
def paper_7b_zh() -> PPOConfig:
    """The paper's Chinese run: as paper-7b-en; what differs is the data and the models (OpenChineseLLaMA)."""
    return ppo_max().model_copy(update=_PAPER_7B)


_COMPUTE_SMALL = ModelConfig(train_layers=10, tokens_per_microbatch=2048)
_COMPUTE_7B = ModelConfig(dtype="bfloat16", gradient_checkpointing=True)
_PAPER_7B: dict[str, object] = {
    "iterations": 2_500,  # four optimiser steps each: 10,000
    "max_prompt_tokens": 1024,
    "sampling": SamplingConfig(max_new_tokens=512),
    "compute": _COMPUTE_7B,
}


def _without_critic(**settings: object) -> PPOConfig:
    return PPOConfig(critic=CriticConfig(init=None, pretrain_iterations=0), **settings)  # type: ignore[arg-type]


@_ppo
def small() -> PPOConfig:
    """PPO-max for models of some hundred million parameters on a processor, as in the quickstart: the upper ten layers,
    lr 1.5e-4 (critic 3e-4), 64 responses an iteration, four to a prompt. Reward model: `reward --recipe small`."""
    return PPOConfig(
        iterations=20, rollout_batch=64, samples_per_prompt=4, minibatch=16, gae_lambda=0.95, ema=0.9,
        optim=OptimConfig(lr=1.5e-4), critic=CriticConfig(optim=OptimConfig(lr=3e-4)), save=SaveConfig(every=5),
        compute=_COMPUTE_SMALL,
    )  # fmt: skip


@_reward
def reward_small() -> RewardConfig:
    """For a processor, as in the quickstart: the upper ten layers, lr 3e-4, two epochs, LM term 0.1."""
    return RewardConfig(
        epochs=2, tokens_per_batch=2560, lm_weight=0.1, eval_every=25, optim=OptimConfig(lr=3e-4),
        compute=_COMPUTE_SMALL,
    )  # fmt: skip


@_sft
def sft_small() -> SFTConfig:
    """For a processor, as in the quickstart: the upper ten layers, lr 2e-4, two epochs."""
    return SFTConfig(optim=OptimConfig(lr=2e-4), compute=_COMPUTE_SMALL)


@_reward
def reward_paper() -> RewardConfig:
    """Eq. 2: ranking loss and LM loss on the preferred response, β_rm = 1."""
    return RewardConfig()


@_reward
def reward_instructgpt() -> RewardConfig:
    """Ranking loss alone (β_rm = 0), as InstructGPT and CPM."""
    return RewardConfig(lm_weight=None)


@_reward
def reward_paper_7b_en() -> RewardConfig:
    """The paper's English reward model: 1000 steps of about 170 pairs (160k pairs, 1.06 epochs), lr 5e-6. Of HH-RLHF,
    tagged #source=helpful and #source=harmless, a test of 700 + 300 prompts and 7.5k more to watch."""
    return _reward_7b(tokens_per_batch=80_000, test={"helpful": 700, "harmless": 300}, heldout=7_500)


@_reward
def reward_paper_7b_zh() -> RewardConfig:
    """The paper's Chinese reward model: as paper-7b-en on 30k pairs, a test of 2,400 + 600 prompts, 4,600 + 1,400 to
    watch. The steps are one epoch: the paper's 1000 would be five or more."""
    return _reward_7b(
        tokens_per_batch=80_000, max_steps=None, test={"helpful": 2_400, "harmless": 600},
        heldout={"helpful": 4_600, "harmless": 1_400},
    )  # fmt: skip


def _reward_7b(**settings: object) -> RewardConfig:
    # 4 to 128 pairs are the paper's bounds for each of its eight processes.
    return RewardConfig(
        **{
            "max_steps": 1_000,
            "min_prompts": 32,
            "max_prompts": 1_024,
            "eval_every": 100,
            "compute": _COMPUTE_7B,
            **settings,
        }  # type: ignore[arg-type]
    )


@_sft
def sft_paper() -> SFTConfig:
    """The paper's fine-tuning: two epochs, lr 9.5e-6, cosine to a tenth of it; batches of 16 for small data."""
    return SFTConfig()


@_sft
def sft_paper_7b_en() -> SFTConfig:
    """The paper's scale: a million dialogues, 1,024 a step, gradient checkpointing; dialogues of up to 2,048 tokens."""
    return SFTConfig(batch_size=1_024, max_length=2_048, heldout=1_000, eval_every=100, compute=_COMPUTE_7B)


@_sft
def sft_paper_7b_zh() -> SFTConfig:
    """As paper-7b-en; what differs is the data and the model (OpenChineseLLaMA)."""
    return sft_paper_7b_en()


def recipe(name: str, **settings: Any) -> Any:
    """The configuration of a recipe, `verb/name` as in `ppomax recipes`, with settings laid over it as flags are.

        recipe("ppo/small", policy="runs/sft/final", critic={"init": "policy"})

    Raises SetupError for an unknown recipe or key, and for a value that cannot be.
    """
    known = {f"{verb}/{short}": make for verb, recipes in RECIPES.items() for short, make in recipes.items()}
    return overlay(recipe_named(name, known), settings, origin=f"recipe {name}")


def recipe_named(name: str, recipes: Mapping[str, Callable[[], C]]) -> C:
    """The configuration of a recipe; an unknown name is an error that names the nearest."""
    if name not in recipes:
        raise SetupError(f"unknown recipe '{name}'{nearest(name, list(recipes))} Known: {', '.join(recipes)}")
    return recipes[name]()
