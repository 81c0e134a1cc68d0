"""The update: minibatches → microbatches → one optimiser step each for policy and critic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from ppomax.config import PPOConfig
from ppomax.data.batches import epoch_order
from ppomax.engine import world
from ppomax.engine.averaging import MovingAverage
from ppomax.engine.optimiser import Optimiser, learning_rate
from ppomax.models.players import Scalar, at_responses
from ppomax.rl.objectives import nll_loss, ratio_statistics, value_loss
from ppomax.rl.shaping import normalise_advantages
from ppomax.stages.inputs import Tokens
from ppomax.stages.nonfinite import NONFINITE_IN_A_ROW, failed_update, failures_after
from ppomax.stages.objective import policy_loss
from ppomax.stages.players import Players
from ppomax.stages.scoring import Microbatch, Minibatch
from ppomax.stages.sft import packed, passes, rate
from ppomax.stages.trust_region import trust_region_step
from ppomax.types import Experience, to_device

WHITEN_EPS = 1e-8


@dataclass
class Totals:
    """Sums over an iteration's optimiser steps; `means` divides them."""

    sums: dict[str, float] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    passes: int = 0
    tokens: float = 0.0
    skipped: int = 0
    stopped_early: bool = False

    def add(self, name: str, value: float) -> None:
        """Add to a per-step sum."""
        self.sums[name] = self.sums.get(name, 0.0) + value

    def include(self, found: Totals) -> None:
        """Add what all processes found in their passes over one minibatch."""
        sums = world.summed({**found.sums, "tokens": found.tokens})
        self.tokens += sums.pop("tokens")
        self.passes += found.passes
        found.sums = sums
        for name, value in sums.items():
            self.add(name, value)
        for name, value in found.largest.items():
            self.largest[name] = max(self.largest.get(name, 0.0), world.largest(value))

    def means(self) -> dict[str, float]:
        """Per minibatch read for losses, per step for norms and rates, per token for clip fraction and KL."""
        tokens, passes = self.tokens, float(self.passes)
        counts = {"clip_fraction": tokens, "approx_kl": tokens, "policy_loss": passes, "value_loss": passes}
        means = {k: v / max(counts.get(k, float(self.steps)), 1) for k, v in self.sums.items()}
        return {**means, **self.largest, "skipped_steps": float(self.skipped)}


@dataclass(frozen=True)
class Optimisers:
    """One for each trained player, and the policy's moving average where it is on."""

    policy: Optimiser
    critic: Optimiser | None
    average: MovingAverage | None = None


@dataclass
class Steering:
    """What moves between iterations: η, β, how many iterations the critic's pre-training took (None: not over), and
    how many steps in a row had no finite gradient."""

    kl: float
    penalty: float
    pretrained: int | None = None
    failures: int = 0

    @classmethod
    def start(cls, config: PPOConfig) -> Steering:
        """The configured values."""
        return cls(config.kl.coefficient or 0.0, config.objective.penalty)

    def pretraining(self, iteration: int, config: PPOConfig) -> bool:
        """Whether only the critic learns in this iteration."""
        return iteration < (config.critic.pretrain_iterations if self.pretrained is None else self.pretrained)


def update(
    players: Players, optimisers: Optimisers, experience: Experience, plan: list[Minibatch], config: PPOConfig,
    *, iteration: int, ptx: Sequence[Tokens], steering: Steering | None = None,
) -> Totals:  # fmt: skip
    """Algorithm 1's last two lines. While the critic is pre-trained, the policy does not move."""
    steering = steering or Steering.start(config)
    pretraining = steering.pretraining(iteration, config)
    epochs = config.critic.pretrain_epochs if pretraining else config.epochs
    first, total = schedule_position(config, steering, iteration)
    totals = Totals()
    for epoch in range(epochs):
        for number, which in enumerate(epoch_order(len(plan), seed=config.seed, epoch=iteration * epochs + epoch)):
            step = first + epoch * len(plan) + number
            kl = _backward(players, experience, plan[which], config, steering, pretraining, totals)
            if config.objective.target_kl is not None and kl > config.objective.target_kl:
                totals.stopped_early = True
                _forget(optimisers)
                return totals
            if ptx and config.ptx_weight is not None and not pretraining:
                _backward_ptx(players, ptx, step, config, totals)
            with players.clock("train/step"):
                norms = _step(players, optimisers, experience, plan[which], config, pretraining, step, total, totals)
            totals.steps += 1
            steering.failures = failures_after(steering.failures, norms)
            totals.skipped += steering.failures > 0
            if steering.failures >= NONFINITE_IN_A_ROW:
                rows, sizes = plan[which].in_passes()
                raise failed_update(
                    iteration, optimisers.policy, optimisers.critic, experience.take(rows), sizes,
                    coefficients=(steering.kl, steering.penalty), pretraining=pretraining,
                    ptx=[] if pretraining else [asdict(row) for row in _ptx_rows(ptx, step, config)],
                )  # fmt: skip
    return totals


def schedule_position(config: PPOConfig, steering: Steering, iteration: int) -> tuple[int, int]:
    """The number of the iteration's first step of the policy, and of all its steps."""
    start = config.critic.pretrain_iterations if steering.pretrained is None else steering.pretrained
    steps = config.rollout_batch // config.minibatch * config.epochs

    def before(end: int) -> int:
        return steps * sum(min(i + 1, config.buffer) for i in range(start, end))

    return before(iteration), before(start + config.iterations - config.critic.pretrain_iterations)


def _step(
    players: Players, optimisers: Optimisers, experience: Experience, minibatch: Minibatch, config: PPOConfig,
    pretraining: bool, step: int, total: int, totals: Totals,
) -> list[float]:  # fmt: skip
    """One step of each player that learns, on the gradients collected so far; their norms."""
    norms = {}
    if optimisers.critic is not None:
        optim = config.critic.optim
        lr = optim.lr if pretraining else learning_rate(step, total, **rate(optim))
        norms["critic"] = optimisers.critic.step(lr)
        totals.add("lr_critic", lr)
    if not pretraining and config.objective.kind == "trpo":
        part = experience.take(minibatch.rows)
        advantages_BR = _normalised(part, config)
        moved = trust_region_step(players.policy, optimisers.policy, part, minibatch, advantages_BR, config)
        norms["policy"] = moved.pop("grad_norm_policy")
        for name, value in moved.items():
            totals.add(name, value)
    elif not pretraining:
        lr = learning_rate(step, total, **rate(config.optim))
        norms["policy"] = optimisers.policy.step(lr)
        totals.add("lr_policy", lr)
    if not pretraining and optimisers.average is not None and math.isfinite(norms["policy"]):
        optimisers.average.update(optimisers.policy.masters)
    for role, norm in norms.items():
        totals.add(f"grad_norm_{role}", norm)
    return list(norms.values())


def _forget(optimisers: Optimisers) -> None:
    optimisers.policy.zero_grad()
    if optimisers.critic is not None:
        optimisers.critic.zero_grad()


def _normalised(part: Experience, config: PPOConfig) -> Tensor:
    """The minibatch's advantages [B, R], whitened and clipped where the configuration says so."""
    if config.whiten_advantages:
        mask = part.rollout.mask_BR
        return normalise_advantages(part.advantages_BR, mask, eps=WHITEN_EPS, clip=config.advantage_clip)
    if config.advantage_clip is not None:
        return part.advantages_BR.clamp(-config.advantage_clip, config.advantage_clip)
    return part.advantages_BR


def _backward(
    players: Players, experience: Experience, minibatch: Minibatch, config: PPOConfig, steering: Steering,
    pretraining: bool, totals: Totals,
) -> float:  # fmt: skip
    """Add the gradients of one minibatch: every term is a sum over tokens divided by the minibatch's tokens.

    Returns the policy's distance from the old one, nats per token.
    """
    part = experience.take(minibatch.rows)
    advantages_BR = _normalised(part, config)
    denom = float(part.rollout.mask_BR.sum())
    place = {row: i for i, row in enumerate(minibatch.rows)}
    clock, found, device = players.clock, Totals(passes=1), str(players.compute.device)
    for micro in minibatch.micros:
        rows, width = [place[row] for row in micro.rows], micro.batch.response_width
        piece = part.take(rows).cut(width, device)
        advantages = to_device(advantages_BR[rows, :width], device)
        if not pretraining and config.objective.kind != "trpo":
            with clock("train/policy", micro.work(players.policy, training=True)):
                _backward_policy(players, piece, micro, advantages, config, steering, denom, found)
        if players.critic is not None:
            with clock("train/critic", micro.work(players.critic, training=True)):
                clip = None if pretraining else config.critic.value_clip
                found.add("value_loss", _backward_critic(players.critic, piece, micro, clip, denom))
    totals.include(found)
    return found.sums.get("approx_kl", 0.0) / denom


def _backward_critic(critic: Scalar, piece: Experience, micro: Microbatch, clip: float | None, denom: float) -> float:
    """Add the critic's gradient of one microbatch; returns its loss."""
    values = at_responses(critic(micro.batch).values_BT, micro.batch, before=True)
    loss = micro.counts * value_loss(
        values, piece.old_values_BR, piece.returns_BR, micro.batch.mask_BR, value_clip=clip, denom=denom
    )  # fmt: skip
    loss.backward()
    return float(loss.detach())


def _backward_policy(
    players: Players, piece: Experience, micro: Microbatch, advantages_BR: Tensor, config: PPOConfig,
    steering: Steering, denom: float, found: Totals,
) -> None:  # fmt: skip
    """Add the policy's gradient of one microbatch, and what it found to `found`."""
    in_loss = steering.kl if config.kl.place == "loss" else 0.0
    scores = players.policy(
        micro.batch, temperature=config.sampling.temperature, entropy=config.objective.entropy_weight is not None,
        against=players.reference if in_loss and config.kl.estimator == "full" else None,
    )  # fmt: skip
    loss = micro.counts * policy_loss(
        scores, piece, micro.batch, advantages_BR, config, denom=denom, kl_coefficient=in_loss, penalty=steering.penalty
    )
    loss.backward()
    found.add("policy_loss", float(loss.detach()))
    logprobs = at_responses(scores.logprobs_BT.detach(), micro.batch)
    statistics = ratio_statistics(logprobs, piece.old_logprobs_BR, micro.batch.mask_BR, clip_ratio=config.clip_ratio)
    for name in ("clip_fraction", "approx_kl"):
        found.add(name, micro.counts * float(statistics[name]))
    found.tokens += micro.counts * float(statistics["tokens"])
    found.largest["ratio_max"] = max(found.largest.get("ratio_max", 0.0), float(statistics["ratio_max"]))


@torch.no_grad()
def distance_moved(players: Players, experience: Experience, plan: list[Minibatch], config: PPOConfig) -> float:
    """KL(old ‖ policy as it is now), nats per token, estimated by k3 on the rollout's tokens."""
    found = {"kl": 0.0, "tokens": 0.0}
    for micro in (m for group in plan for m in group.micros):
        piece = experience.take(micro.rows).cut(micro.batch.response_width, str(players.compute.device))
        scores = players.policy(micro.batch, temperature=config.sampling.temperature)
        logprobs, mask = at_responses(scores.logprobs_BT, micro.batch), micro.batch.mask_BR
        statistics = ratio_statistics(logprobs, piece.old_logprobs_BR, mask, clip_ratio=config.clip_ratio)
        found["kl"] += micro.counts * float(statistics["approx_kl"])
        found["tokens"] += micro.counts * float(statistics["tokens"])
    found = world.summed(found)
    return found["kl"] / max(found["tokens"], 1.0)


def _backward_ptx(players: Players, ptx: Sequence[Tokens], step: int, config: PPOConfig, totals: Totals) -> None:
    """Add λ_ptx times the gradient of the LM loss on this step's share of the ptx dialogues."""
    chosen = _ptx_rows(ptx, step, config)
    denom = float(sum(sum(row.mask[1:]) for row in chosen))
    assert config.ptx_weight is not None
    found = Totals()
    for group, weight in passes(players.policy, chosen, config.compute.tokens_per_microbatch):
        tokens, mask_BT = packed([chosen[i] for i in group], device=str(players.compute.device))
        work = players.policy.work(tokens, training=True, places=int(mask_BT.sum())).needed(weight)
        with players.clock("train/ptx", work):
            loss = weight * nll_loss(players.policy(tokens, mask_BT=mask_BT).logprobs_BT, mask_BT, denom=denom)
            (config.ptx_weight * loss).backward()
            found.add("ptx_loss", float(loss.detach()))
    totals.include(found)


def _ptx_rows(ptx: Sequence[Tokens], step: int, config: PPOConfig) -> list[Tokens]:
    """A step's share of the ptx dialogues: consecutive pieces of seeded permutations."""
    if not ptx or config.ptx_weight is None:
        return []
    size = config.ptx_batch or config.minibatch
    places = [divmod(position, len(ptx)) for position in range(step * size, (step + 1) * size)]
    orders = {epoch: epoch_order(len(ptx), seed=config.seed + 1, epoch=epoch) for epoch, _ in places}
    return [ptx[orders[epoch][within]] for epoch, within in places]
