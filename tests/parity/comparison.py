"""One toy run, carried out twice: by ppomax's own steps and by the slow reference, on the same sampled ids."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from stages.conftest import Toys, Trained
from stages.toy import FLOAT32, TOP_LAYER, ppo_config, prepared, write_rows
from torch import Tensor

from parity.reference import AdamWSettings, Estimates, Response, Run, Settings, Step, snapshot
from ppomax.config import CriticConfig, KLConfig, OptimConfig, PPOConfig, SamplingConfig, ScoreConfig
from ppomax.data.batches import epoch_order
from ppomax.models.embedded import embedded_directory
from ppomax.rollout.collect import response_texts
from ppomax.stages.estimate import estimate, seen
from ppomax.stages.ppo_setup import Job
from ppomax.stages.scoring import Minibatch, plan_minibatches, score
from ppomax.stages.update import update
from ppomax.types import Experience, ScoredRollouts

# AdamW's eps is large so that it does not enlarge the rounding of tiny gradients (as in golden/record.py). Bounds are
# such that they bind: of the gradient norm, of the score, of the ratio and of V.
OPTIM = OptimConfig(lr=2e-2, warmup=0.34, eps=1e-3, weight_decay=0.1, max_grad_norm=0.15)
SHORT = OPTIM.model_copy(update={"warmup": 0.25})
CASES: dict[str, dict[str, Any]] = {
    "one pass": {},
    "every row alone": {"compute": FLOAT32.model_copy(update={"tokens_per_microbatch": 16})},
    "padded": {"packs": False},
    "padded, a few rows": {"compute": FLOAT32.model_copy(update={"tokens_per_microbatch": 200}), "packs": False},
    "two minibatches": {
        "minibatch": 8, "epochs": 2, "iterations": 2, "optim": SHORT,
        "critic": CriticConfig(pretrain_iterations=1, optim=SHORT),
    },
    "shared trunk": {"compute": TOP_LAYER},
    "adapters": {
        "compute": FLOAT32.model_copy(update={"tokens_per_microbatch": 200, "lora_rank": 2, "lora_alpha": 32.0})
    },
    "whitened": {"whiten_advantages": True},
    "bootstrap": {"score": ScoreConfig(clip=1.0, truncated="bootstrap")},
    "temperature 0.7": {"sampling": SamplingConfig(max_new_tokens=16, temperature=0.7)},
    "all at once": {
        "compute": TOP_LAYER.model_copy(update={"tokens_per_microbatch": 200}), "minibatch": 8, "epochs": 2,
        "whiten_advantages": True, "score": ScoreConfig(clip=1.0, truncated="bootstrap"), "gamma": 0.95,
        "sampling": SamplingConfig(max_new_tokens=16, temperature=0.7),
    },
}  # fmt: skip
# One of several turns: both answers count.
DIALOGUES = [
    [("user", "apple river?"), ("assistant", "river apple.")],
    [("user", "stone?"), ("assistant", "A stone.")],
    [("user", "green tree?"), ("assistant", "tree green."), ("user", "night?"), ("assistant", "bread night glass.")],
]


@dataclass(frozen=True)
class Iteration:
    """One iteration on both sides; before and after: every parameter of policy and critic, around the update."""

    plan: list[Minibatch]
    lengths: list[int]
    truncated: list[bool]
    scored: ScoredRollouts
    experience: Experience
    rewards_BR: Tensor
    means: dict[str, float]
    estimates: Estimates
    steps: list[Step]
    ours: tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]
    theirs: tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]


@dataclass(frozen=True)
class Comparison:
    """A finished case: iteration 0 pre-trains the critic, iteration 1 is a complete one."""

    config: PPOConfig
    job: Job
    run: Run
    iterations: list[Iteration]


@dataclass(frozen=True)
class Models:
    """What the cases start from: all layers trained, and then the upper one alone a little more; data."""

    trained: Trained
    trained_above: Trained
    toys: Toys


def configuration(case: str, folder: Path, models: Models) -> PPOConfig:
    """PPO-max with a reward model, ptx, and a reference that is not the policy's start, so that the KL is not 0."""
    whole = CASES[case].get("compute", FLOAT32).train_layers is None
    start, reference = (models.trained, "tiny") if whole else (models.trained_above, models.trained.sft)
    messages = [{"messages": [{"role": r, "content": c} for r, c in dialogue]} for dialogue in DIALOGUES]
    settings: dict[str, Any] = {
        "reward": (start.reward,), "reference": reference, "iterations": 7, "minibatch": 16, "samples_per_prompt": 2,
        "sampling": SamplingConfig(max_new_tokens=16), "kl": KLConfig(), "score": ScoreConfig(clip=1.0),
        "critic": CriticConfig(pretrain_iterations=1, optim=OPTIM), "optim": OPTIM,
        "compute": FLOAT32.model_copy(update={"tokens_per_microbatch": 100_000}),
        "ptx_data": (write_rows(folder / "ptx.jsonl", messages),), "ptx_weight": 0.3, "ptx_batch": len(DIALOGUES),
    }  # fmt: skip
    changes = {name: value for name, value in CASES[case].items() if name != "packs"}
    return ppo_config(folder / "run", start.sft, models.toys.prompts, **{**settings, **changes})


def reference_run(config: PPOConfig, job: Job) -> Run:
    """The slow reference with the settings of a configuration, and with the adapters of a job, which start by chance."""
    steps = config.rollout_batch // config.minibatch * config.epochs
    assert config.reference and config.kl.coefficient and config.score.clip
    assert config.critic.value_clip and config.ptx_weight
    settings = Settings(
        temperature=config.sampling.temperature, kl_coefficient=config.kl.coefficient, score_clip=config.score.clip,
        truncated=config.score.truncated, gamma=config.gamma, gae_lambda=config.gae_lambda,
        clip_ratio=config.clip_ratio, value_clip=config.critic.value_clip, whiten=config.whiten_advantages,
        ptx_weight=config.ptx_weight, pretrain_iterations=config.critic.pretrain_iterations,
        layers=config.compute.train_layers,
        policy_steps=(config.iterations - config.critic.pretrain_iterations) * steps,
    )  # fmt: skip
    optims = {"policy": config.optim, "critic": config.critic.optim}
    dialogues = [[{"role": r, "content": c} for r, c in dialogue] for dialogue in DIALOGUES]
    reference = str(embedded_directory(config.reference) or config.reference)
    return Run(
        settings, config.policy, reference, config.reward[0], dialogues,
        {name: _adamw(optim) for name, optim in optims.items()}, _adapters(job, config),
    )  # fmt: skip


def _adapters(job: Job, config: PPOConfig) -> dict[str, dict[str, tuple[Tensor, float]]]:
    if config.compute.lora_rank is None:
        return {}
    scale = config.compute.lora_alpha / config.compute.lora_rank
    models = {"policy": job.players.policy.model, "critic": job.players.critic.model}  # type: ignore[union-attr]
    return {
        player: {
            name: (layer.lora_A["default"].weight.detach(), scale)
            for name, layer in model.named_modules()
            if hasattr(layer, "lora_A")
        }
        for player, model in models.items()
    }


def compared(case: str, folder: Path, models: Models) -> Comparison:
    """Two iterations of a case on both sides."""
    config = configuration(case, folder, models)
    job = prepared(config)
    run = reference_run(config, job)
    for player in (job.players.policy, job.players.reference, job.players.critic, job.players.terms[0].reward.scalar):
        assert player.packs  # type: ignore[union-attr]
        player.packs = CASES[case].get("packs", True)  # type: ignore[union-attr]
    return Comparison(config, job, run, [_iteration(job, run, index) for index in range(2)])


def apart(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, Euclidean norms over all numbers of both."""
    assert found.shape == expected.shape and bool(expected.norm() > 0)
    return float((found - expected).norm() / expected.norm())


def moves(sides: tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]], player: str) -> dict[str, Tensor]:
    """What the update added to every parameter."""
    before, after = (side[player] for side in sides)
    return {name: after[name] - before[name] for name in before}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """All entries of the tensors, ordered by name."""
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def _iteration(job: Job, run: Run, index: int) -> Iteration:
    """What `stages.ppo.train` does in one iteration, and then the reference on the same ids."""
    config, players = job.config, job.players
    rollout = job.roll_out(index)
    plan = plan_minibatches(
        rollout, players, minibatch=config.minibatch, budget=config.compute.tokens_per_microbatch, seed=config.seed,
        iteration=index,
    )  # fmt: skip
    scored, _ = score(
        players, rollout, plan, response_texts(players.tokenizer, rollout), temperature=config.sampling.temperature,
        bootstrap=config.score.truncated == "bootstrap",
    )  # fmt: skip
    job.seen = seen(scored, job.seen, config)
    if index == 0:
        scored = job.scale_critic(scored)
    experience, rewards_BR = estimate(scored, job.seen, config)
    models = {"policy": players.policy.model, "critic": players.critic.model}  # type: ignore[union-attr]
    before = _parameters(models)
    totals = update(players, job.optimisers, experience, plan, config, iteration=index, ptx=job.ptx)
    ours = (before, _parameters(models))

    rows = zip(rollout.prompt_ids, rollout.responses(), rollout.truncated_B.tolist(), strict=True)
    responses = [Response(list(prompt), ids, truncated) for prompt, ids, truncated in rows]
    minibatches = [list(itertools.chain.from_iterable(micro.rows for micro in minibatch.micros)) for minibatch in plan]
    assert sorted(itertools.chain.from_iterable(minibatches)) == list(range(config.rollout_batch))
    assert {len(minibatch) for minibatch in minibatches} == {config.minibatch}
    estimates = run.estimate(responses, first=index == 0)
    models = {"policy": run.policy, "critic": run.critic}
    before = _parameters(models)
    epochs = config.critic.pretrain_epochs if index < config.critic.pretrain_iterations else config.epochs
    passes = [epoch_order(len(plan), seed=config.seed, epoch=index * epochs + epoch) for epoch in range(epochs)]
    steps = run.update(index, responses, estimates, [minibatches[which] for order in passes for which in order])
    return Iteration(
        plan, [len(r.ids) for r in responses], [r.truncated for r in responses], scored, experience, rewards_BR,
        totals.means(), estimates, steps, ours, (before, _parameters(models)),
    )  # fmt: skip


def _parameters(models: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    return {name: snapshot(model) for name, model in models.items()}


def _adamw(optim: OptimConfig) -> AdamWSettings:
    assert optim.schedule == "cosine" and optim.max_grad_norm
    return AdamWSettings(
        optim.lr, optim.warmup, optim.floor, optim.betas, optim.eps, optim.weight_decay, optim.max_grad_norm
    )
