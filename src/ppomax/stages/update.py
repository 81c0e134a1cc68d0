"""The update: minibatches → microbatches → one optimiser step each for policy and critic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ppomax.config import PPOConfig
from ppomax.data.batches import epoch_order
from ppomax.engine.optimiser import Optimiser, learning_rate
from ppomax.models.players import at_responses
from ppomax.rl.masked import whiten
from ppomax.rl.objectives import clipped_policy_loss, nll_loss, ratio_statistics, value_loss
from ppomax.stages.inputs import Tokens
from ppomax.stages.players import Players
from ppomax.stages.scoring import Microbatch
from ppomax.stages.sft import microbatches, packed, rate
from ppomax.types import Experience

WHITEN_EPS = 1e-8
NONFINITE_IN_A_ROW = 5


@dataclass
class Totals:
    """Sums over an iteration's optimiser steps; `means` divides them."""

    sums: dict[str, float] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    tokens: float = 0.0
    skipped: int = 0

    def add(self, name: str, value: float) -> None:
        """Add to a per-step sum."""
        self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """Per step for losses and norms, per token for clip fraction and KL."""
        per_token = ("clip_fraction", "approx_kl")
        means = {k: v / max(self.tokens if k in per_token else self.steps, 1) for k, v in self.sums.items()}
        return {**means, **self.largest, "skipped_steps": float(self.skipped)}


@dataclass(frozen=True)
class Optimisers:
    """One for each trained player."""

    policy: Optimiser
    critic: Optimiser


def update(
    players: Players, optimisers: Optimisers, experience: Experience, plan: list[list[Microbatch]], config: PPOConfig,
    *, iteration: int, ptx: Sequence[Tokens],
) -> Totals:  # fmt: skip
    """Algorithm 1's last two lines. While the critic is pre-trained, the policy does not move."""
    pretraining = iteration < config.critic.pretrain_iterations
    epochs = config.critic.pretrain_epochs if pretraining else config.epochs
    first = (iteration - config.critic.pretrain_iterations) * config.epochs * len(plan)
    total = (config.iterations - config.critic.pretrain_iterations) * config.epochs * len(plan)
    totals, failures = Totals(), 0
    for epoch in range(epochs):
        for number, which in enumerate(epoch_order(len(plan), seed=config.seed, epoch=iteration * epochs + epoch)):
            step = first + epoch * len(plan) + number
            _backward(players, experience, plan[which], config, pretraining, totals)
            if ptx and config.ptx_weight is not None and not pretraining:
                _backward_ptx(players, ptx, step, config, totals)
            rates = {"critic": config.critic.optim.lr}
            if not pretraining:
                rates = {
                    "policy": learning_rate(step, total, **rate(config.optim)),
                    "critic": learning_rate(step, total, **rate(config.critic.optim)),
                }
            norms = {role: getattr(optimisers, role).step(lr) for role, lr in rates.items()}
            for role, norm in norms.items():
                totals.add(f"grad_norm_{role}", norm)
                totals.add(f"lr_{role}", rates[role])
            totals.steps += 1
            finite = all(map(math.isfinite, norms.values()))
            failures = 0 if finite else failures + 1
            totals.skipped += not finite
            if failures >= NONFINITE_IN_A_ROW:
                raise FloatingPointError(
                    f"iteration {iteration}: the gradient was not finite in {failures} steps in a row; nothing was "
                    "changed by them. Lower the learning rate, or look at the scores in metrics.jsonl"
                )
    return totals


def _backward(
    players: Players, experience: Experience, minibatch: list[Microbatch], config: PPOConfig, pretraining: bool,
    totals: Totals,
) -> None:  # fmt: skip
    """Add the gradients of one minibatch: every term is a sum over tokens divided by the minibatch's tokens."""
    rows = [i for micro in minibatch for i in micro.rows]
    part = experience.take(rows)
    mask = part.rollout.mask_BR
    advantages = part.advantages_BR
    if config.whiten_advantages:
        advantages = whiten(advantages, mask, eps=WHITEN_EPS)
    if config.advantage_clip is not None:
        advantages = advantages.clamp(-config.advantage_clip, config.advantage_clip)
    denom = float(mask.sum())
    device, start = players.compute.device, 0
    for micro in minibatch:
        span, width = slice(start, start + len(micro.rows)), micro.batch.response_width
        start += len(micro.rows)
        old, values, returns, advantage = (
            x[span, :width].to(device)
            for x in (part.old_logprobs_BR, part.old_values_BR, part.returns_BR, advantages)
        )  # fmt: skip
        counted = micro.batch.mask_BR
        if not pretraining:
            scores = players.policy(micro.batch, temperature=config.sampling.temperature)
            logprobs = at_responses(scores.logprobs_BT, micro.batch)
            loss = clipped_policy_loss(
                logprobs, old, advantage, counted, clip_ratio=config.clip_ratio, denom=denom
            )  # fmt: skip
            loss.backward()
            totals.add("policy_loss", float(loss.detach()))
            statistics = ratio_statistics(logprobs.detach(), old, counted, clip_ratio=config.clip_ratio)
            for name in ("clip_fraction", "approx_kl"):
                totals.add(name, float(statistics[name]))
            totals.tokens += float(statistics["tokens"])
            totals.largest["ratio_max"] = max(totals.largest.get("ratio_max", 0.0), float(statistics["ratio_max"]))
        new_values = at_responses(players.critic(micro.batch).values_BT, micro.batch, before=True)
        clip = None if pretraining else config.critic.value_clip
        loss = value_loss(new_values, values, returns, counted, value_clip=clip, denom=denom)
        loss.backward()
        totals.add("value_loss", float(loss.detach()))


def _backward_ptx(players: Players, ptx: Sequence[Tokens], step: int, config: PPOConfig, totals: Totals) -> None:
    """Add λ_ptx times the gradient of the LM loss on this step's share of the ptx dialogues."""
    size = config.ptx_batch or config.minibatch
    chosen = []
    for position in range(step * size, (step + 1) * size):
        epoch, within = divmod(position, len(ptx))
        chosen.append(ptx[epoch_order(len(ptx), seed=config.seed + 1, epoch=epoch)[within]])
    denom = float(sum(sum(row.mask[1:]) for row in chosen))
    assert config.ptx_weight is not None
    for group in microbatches(players.policy, chosen, config.compute.tokens_per_microbatch):
        tokens, mask_BT = packed(group, device=str(players.compute.device))
        loss = nll_loss(players.policy(tokens, mask_BT=mask_BT).logprobs_BT, mask_BT, denom=denom)
        (config.ptx_weight * loss).backward()
        totals.add("ptx_loss", float(loss.detach()))
