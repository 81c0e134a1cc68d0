"""Rollout → ScoredRollouts: every player reads the sampled ids, in the microbatches that training will use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppomax.data.batches import epoch_order
from ppomax.models.players import at_end, at_responses
from ppomax.rewards.mixture import score_texts, weighted_sum
from ppomax.rewards.model import RewardModel
from ppomax.stages.players import Players
from ppomax.types import Rollout, ScoredRollouts, TokenBatch, token_batch


@dataclass(frozen=True)
class Microbatch:
    """Some rows of a rollout as one padded batch.

    Scoring and training use the same ones, so that before the first update the ratio is exactly 1 in any precision.
    """

    rows: tuple[int, ...]
    batch: TokenBatch


@dataclass(frozen=True)
class TokenStatistics:
    """Float32 [B, R] of the sampling policy, for the log: exact entropy and log-probs at temperature 1."""

    entropy_BR: Tensor
    plain_logprobs_BR: Tensor


def plan_minibatches(
    rollout: Rollout, players: Players, *, minibatch: int, budget: int, seed: int, iteration: int
) -> list[list[Microbatch]]:
    """Seeded random minibatches of `minibatch` rows, each cut into microbatches of at most `budget` tokens.

    Samples of one prompt stand together, so that a packed pass reads their prompt once.
    """
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(rollout.prompt_ids):
        rows_of.setdefault(prompt, []).append(i)
    of_prompts = list(rows_of.values())
    order = [i for g in epoch_order(len(of_prompts), seed=seed, epoch=iteration) for i in of_prompts[g]]
    responses = rollout.responses()
    plan = []
    for start in range(0, len(order), minibatch):
        members = order[start : start + minibatch]
        groups = players.policy.microbatches(
            [rollout.prompt_ids[i] for i in members], [responses[i] for i in members], budget=budget
        )
        rows = [tuple(members[i] for i in group) for group in groups]
        plan.append([Microbatch(r, _batch(rollout, responses, r, players)) for r in rows])
    return plan


def _batch(rollout: Rollout, responses: list[list[int]], rows: Sequence[int], players: Players) -> TokenBatch:
    batch = token_batch(
        [rollout.prompt_ids[i] for i in rows], [responses[i] for i in rows], device=str(players.compute.device)
    )  # fmt: skip
    return players.trunk(batch)


@dataclass(frozen=True)
class Readings:
    """What the players that learn say about a rollout. Float32 [B, R], after_B [B]; full_kl_BR where asked for."""

    logprobs_BR: Tensor
    statistics: TokenStatistics
    values_BR: Tensor
    after_B: Tensor
    full_kl_BR: Tensor | None

    def bootstrap_B(self, rollout: Rollout, wanted: bool) -> Tensor:
        """V of the state that the length limit cut, 0 for other rows and where nothing is bootstrapped."""
        return torch.where(rollout.truncated_B & wanted, self.after_B, 0.0)


@torch.no_grad()
def read(
    players: Players, rollout: Rollout, plan: list[list[Microbatch]], *, temperature: float, full_kl: bool
) -> Readings:
    """Policy and critic, as they are now, on a rollout."""
    (B, R), clock = rollout.response_ids_BR.shape, players.clock
    logprobs, entropy, plain, values, exact_kl = (torch.zeros(B, R) for _ in range(5))
    after_B = torch.zeros(B)
    for micro in (m for group in plan for m in group):
        index, width = torch.tensor(micro.rows), micro.batch.response_width
        against = players.reference if full_kl else None
        with clock("score/policy", players.policy.work(micro.batch)):
            scores = players.policy(micro.batch, temperature=temperature, statistics=True, against=against)
        for target, source in (
            (logprobs, scores.logprobs_BT),
            (entropy, scores.entropy_BT),
            (plain, scores.plain_logprobs_BT),
            (exact_kl, scores.kl_BT),
        ):
            if source is not None:
                target[index, :width] = at_responses(source, micro.batch).cpu()
        if players.critic is not None:
            with clock("score/critic", players.critic.work(micro.batch)):
                values_BT = players.critic(micro.batch).values_BT
            values[index, :width] = at_responses(values_BT, micro.batch, before=True).cpu()
            after_B[index] = at_end(values_BT, micro.batch).cpu()
    return Readings(logprobs, TokenStatistics(entropy, plain), values, after_B, exact_kl if full_kl else None)


@torch.no_grad()
def score(
    players: Players, rollout: Rollout, plan: list[list[Microbatch]], texts: list[str], *, temperature: float,
    bootstrap: bool, full_kl: bool = False,
) -> tuple[ScoredRollouts, TokenStatistics]:  # fmt: skip
    """Old, reference and critic readings and every reward term of a rollout; nothing is shaped yet."""
    clock = players.clock
    components, dense_BR = score_texts(players.terms, rollout, texts, clock)
    readers = [t for t in players.terms if isinstance(t.reward, RewardModel) and t.reward.reads_ids]
    components |= {term.name: torch.zeros(len(rollout)) for term in readers}
    now = read(players, rollout, plan, temperature=temperature, full_kl=full_kl)
    reference_BR = torch.zeros_like(now.logprobs_BR)
    for micro in (m for group in plan for m in group):
        index, width = torch.tensor(micro.rows), micro.batch.response_width
        with clock("score/reference", players.reference.work(micro.batch)):
            logprobs_BT = players.reference(micro.batch, temperature=temperature).logprobs_BT
        reference_BR[index, :width] = at_responses(logprobs_BT, micro.batch).cpu()
        for term in readers:
            assert isinstance(term.reward, RewardModel)
            with clock(term.part, term.reward.scalar.work(micro.batch)):
                components[term.name][index] = term.reward.score_ids(micro.batch).cpu()
    scored = ScoredRollouts(
        rollout, now.logprobs_BR, reference_BR, now.values_BR, weighted_sum(players.terms, components), components,
        now.bootstrap_B(rollout, bootstrap), dense_BR, now.full_kl_BR,
    )  # fmt: skip
    return scored, now.statistics
