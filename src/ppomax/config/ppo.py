"""PPO's schema: one group of settings for each part of an iteration. `None` means off."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from ppomax.config.schema import ModelConfig, OptimConfig, SamplingConfig, SaveConfig, Schema

Baseline = Literal["critic", "batch_mean", "leave_one_out", "group_mean", "group_normalise"]


class KLConfig(Schema):
    """The constraint towards the reference."""

    coefficient: float | None = Field(
        default=0.05, gt=0, description="η: weight of the KL between policy and reference; None: off."
    )
    place: Literal["reward", "loss"] = Field(
        default="reward",
        description="reward: subtracted from the reward of every token; loss: a term of the loss.",
    )
    estimator: Literal["k1", "k2", "k3", "full"] = Field(
        default="k1",
        description="k1: log-ratio at the sampled token; k2, k3: Schulman's; full: exact over the vocabulary. In the"
        " reward only k1 descends KL(policy ‖ reference): the others price a state, hardly the choice made in it. In"
        " the loss k2 and full do, k3 descends the other direction, k1 nothing at all (refused).",
    )
    target: float | None = Field(
        default=None,
        gt=0,
        description="Nats per response that the coefficient is steered to (Ziegler et al., 2019); None: fixed.",
    )
    horizon: float = Field(default=10_000, gt=0, description="Responses over which the steering acts.")


class ScoreConfig(Schema):
    """Reparameterisation of the score (paper 5.3.1)."""

    normalise: bool = Field(
        default=True, description="Subtract the mean and divide by the std of all scores so far (eq. 18)."
    )
    by_source: bool = Field(
        default=False, description="Normalise every source (helpful, harmless) by a history of its own."
    )
    clip: float | None = Field(
        default=5.0, gt=0, description="δ of eq. 18: bound of the score, after normalising if that is on; None: off."
    )
    scale: bool = Field(
        default=False,
        description="Reward scaling: divide token rewards by the rolling std of the discounted return, instead of"
        " normalising and clipping the score.",
    )
    missing_eos_penalty: float | None = Field(
        default=None,
        gt=0,
        description="Subtracted, as a term of its own, where the length limit cut the response; None: off.",
    )
    length_penalty: float | None = Field(
        default=None,
        gt=0,
        description="Subtracted, as a term of its own, for each token beyond length_free; None: off.",
    )
    length_free: int = Field(default=0, ge=0, description="Response tokens that cost nothing.")
    truncated: Literal["score", "bootstrap"] = Field(
        default="score",
        description="A response cut by the length limit is either scored (V after it is 0) or bootstrapped"
        " (no score, V of the cut state).",
    )


class CriticConfig(Schema):
    """The value function."""

    init: str | None = Field(
        default="reward",
        description="reward: from the reward model; policy: from the policy, with a fresh head; or a directory."
        " None: no critic (needs an advantage and a baseline without one).",
    )
    pretrain_iterations: int = Field(
        default=2, ge=0, description="First iterations that train the critic alone, at most; the policy does not move."
    )
    pretrain_epochs: int = Field(
        default=2, ge=1, description="Passes over each rollout batch while the critic is pre-trained."
    )
    pretrain_tolerance: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="End the pre-training before pretrain_iterations once the value loss falls by less than this share"
        " from one pair of iterations to the next and the critic explains some variance; None: all iterations.",
    )
    value_clip: float | None = Field(
        default=0.2, gt=0, description="Bound of V's move from its old value; None: plain MSE."
    )
    target: Literal["lambda_return", "monte_carlo"] = Field(
        default="lambda_return", description="Advantages + old values, or the discounted sum of rewards (eq. 16)."
    )
    optim: OptimConfig = OptimConfig(lr=1.65e-6)


class ObjectiveConfig(Schema):
    """What an update of the policy maximises."""

    kind: Literal["clip", "penalty", "surrogate", "policy_gradient", "trpo"] = Field(
        default="clip",
        description="clip: PPO-clip; penalty: ratio·A − β·KL(old ‖ new); surrogate: ratio·A; policy_gradient: log π·A;"
        " trpo: natural gradient within max_kl (float32, small models).",
    )
    dual_clip: float | None = Field(
        default=None, gt=1, description="c: bound of ratio·A where A < 0, as a multiple of A; None: off."
    )
    penalty: float = Field(default=1.0, gt=0, description="β of the penalty objective.")
    penalty_target: float | None = Field(
        default=None,
        gt=0,
        description="Nats per token that β is steered to: halved below target/1.5, doubled above 1.5·target.",
    )
    denominator: Literal["old", "reference"] = Field(
        default="old",
        description="The ratio's denominator. reference: importance sampling off (paper, trick 2).",
    )
    importance_cap: float | None = Field(
        default=None,
        gt=0,
        description="Weigh tokens by min(old / sampler's probability, cap): truncated importance sampling; None: off.",
    )
    target_kl: float | None = Field(
        default=None,
        gt=0,
        description="End an iteration's updates at this distance from the old policy, nats per token; None: off.",
    )
    entropy_weight: float | None = Field(
        default=None, gt=0, description="Weight of the entropy bonus, exact over the vocabulary; None: off."
    )
    entropy_clip: float | None = Field(
        default=None, gt=0, description="Bound of a response's summed entropy in the bonus, nats (fig. 16); None: off."
    )
    max_kl: float = Field(
        default=0.01,
        gt=0,
        description="trpo: trust region of each optimiser step, mean KL per token from where that step begins (not"
        " from the policy that sampled), nats.",
    )
    cg_iterations: int = Field(default=10, ge=1, description="trpo: conjugate-gradient iterations.")
    damping: float = Field(default=0.1, ge=0, description="trpo: added to the diagonal of the Fisher matrix.")
    backtracks: int = Field(default=10, ge=1, description="trpo: halvings of the step that are tried.")


class PPOConfig(Schema):
    """PPO on a language model: Algorithm 1 of the paper."""

    run_dir: Path = Field(default=Path("runs/ppo"), description="Where everything of this run is written.")
    policy: str = Field(default="runs/sft/final", description="The model to train, after SFT (paper, fig. 8).")
    reference: str | None = Field(
        default=None, description="The frozen model that the KL is taken to; None: the policy's start."
    )
    reward: tuple[str, ...] = Field(
        default=("runs/reward/final",),
        description="Reward-model directory, module:function, or several with weights: 0.7*DIR 0.3*pkg.mod:fn.",
    )
    prompts: tuple[str, ...] = Field(default=(), description="Prompts in any of the data formats; answers are ignored.")
    ptx_data: tuple[str, ...] = Field(default=(), description="Dialogues or plain text for the ptx loss.")
    ptx_weight: float | None = Field(default=None, gt=0, description="λ_ptx: weight of the ptx loss; None: off.")
    ptx_batch: int | None = Field(
        default=None, ge=1, description="ptx dialogues per optimiser step; None: as many as minibatch."
    )
    iterations: int = Field(default=100, ge=1, description="Rollout batches in all, critic pre-training included.")
    rollout_batch: int = Field(default=128, ge=1, description="Responses per iteration.")
    samples_per_prompt: int = Field(default=1, ge=1, description="Responses per prompt within a rollout batch.")
    minibatch: int = Field(default=32, ge=1, description="Responses per optimiser step.")
    epochs: int = Field(default=1, ge=1, description="Passes over a rollout batch.")
    buffer: int = Field(
        default=1,
        ge=1,
        description="Rollout batches that an iteration learns from: its own and those of the iterations before it. More"
        " than 1 need objective.importance_cap, whose weights make up for the older policy that sampled them.",
    )
    max_prompt_tokens: int = Field(
        default=512, ge=4, description="Old turns are dropped to fit; a prompt that can't is dropped."
    )
    advantage: Literal["gae", "k_step", "rewards_to_go", "whole_return"] = Field(
        default="gae",
        description="Φ_t: GAE or k-step advantages by the critic, or returns (from t on, or whole) minus the baseline.",
    )
    k: int = Field(default=1, ge=1, description="Rewards that a k-step advantage counts before V.")
    baseline: Baseline | float | None = Field(
        default="critic",
        description="Subtracted from returns: the critic's V, a mean over the batch or over the responses to a prompt"
        " (with or without the own one; group_normalise also divides by their std), a number, or None.",
    )
    gamma: float = Field(default=1.0, ge=0, le=1, description="γ: discount.")
    gae_lambda: float = Field(default=0.9, ge=0, le=1, description="λ of GAE.")
    clip_ratio: float = Field(default=0.2, gt=0, description="ε of the clipped surrogate.")
    whiten_advantages: bool = Field(default=False, description="Normalise advantages over each minibatch.")
    advantage_clip: float | None = Field(
        default=None, gt=0, description="Bound of the advantages after whitening; None: off."
    )
    ema: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Decay per step of a moving average of the policy, which final/ then holds; None: off.",
    )
    sampling: SamplingConfig = SamplingConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    kl: KLConfig = KLConfig()
    score: ScoreConfig = ScoreConfig()
    critic: CriticConfig = CriticConfig()
    optim: OptimConfig = Field(default=OptimConfig(lr=5e-7), description="The policy's optimiser.")
    reward_timeout: float | None = Field(
        default=None,
        gt=0,
        description="Seconds that a reward or judge function may take for a batch; after them the run ends with an"
        " error and goes on from its last checkpoint with --resume. None: no limit.",
    )
    judge: str | None = Field(
        default=None, description="module:function scored on every rollout for the log only; the policy never sees it."
    )
    stop_on_alarm: bool = Field(
        default=False, description="End the run, saved, when a collapse alarm of severity stop is raised."
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Keys prompts' order and every sequence's random stream.")
    compute: ModelConfig = ModelConfig()
    save: SaveConfig = SaveConfig(every=10)

    @property
    def needs_critic(self) -> bool:
        """Whether V enters the advantages."""
        return self.advantage in ("gae", "k_step") or self.baseline == "critic"
