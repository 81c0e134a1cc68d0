"""Rollout → ScoredRollouts: every player reads the sampled ids, in the microbatches that training will use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ppomax.data.batches import epoch_order
from ppomax.engine import world
from ppomax.models.players import Player, at_end, at_responses
from ppomax.rewards.mixture import score_texts, weighted_sum
from ppomax.rewards.model import RewardModel
from ppomax.stages.players import Players
from ppomax.types import Rollout, ScoredRollouts, TokenBatch, Work, token_batch


@dataclass(frozen=True)
class Microbatch:
    """Some rows of a rollout as one padded batch.

    Scoring and training use the same ones, so that before the first update the ratio is exactly 1 in any precision.
    counts: False for a pass that is made a second time, so that all processes make as many; its results are dropped.
    """

    rows: tuple[int, ...]
    batch: TokenBatch
    counts: bool = True

    def work(self, player: Player, *, training: bool = False) -> Work:
        """What this pass through a player has to do."""
        return player.work(self.batch, training=training).needed(self.counts)


@dataclass(frozen=True)
class Minibatch:
    """The rows of one optimiser step, and those of their microbatches that this process reads (alone: all of them)."""

    rows: tuple[int, ...]
    micros: tuple[Microbatch, ...]

    def in_passes(self) -> tuple[list[int], list[int]]:
        """Its rows as they are read, and how many in each pass; where processes share them, one by one."""
        if world.size() > 1:
            return list(self.rows), [1] * len(self.rows)
        return [i for micro in self.micros for i in micro.rows], [len(micro.rows) for micro in self.micros]

    def moved(self, offset: int) -> Minibatch:
        """The same rows of a rollout that stands below `offset` others."""

        def by(rows: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(offset + row for row in rows)

        return Minibatch(by(self.rows), tuple(replace(m, rows=by(m.rows)) for m in self.micros))


@dataclass(frozen=True)
class TokenStatistics:
    """Float32 [B, R] of the sampling policy, for the log: exact entropy and log-probs at temperature 1."""

    entropy_BR: Tensor
    plain_logprobs_BR: Tensor


def plan_minibatches(
    rollout: Rollout, players: Players, *, minibatch: int, budget: int, seed: int, iteration: int
) -> list[Minibatch]:
    """Seeded random minibatches of `minibatch` rows, each cut into microbatches of at most `budget` tokens.

    Samples of one prompt stand together, so that a packed pass reads their prompt once.
    """
    of_prompts = _by_prompt(rollout, range(len(rollout)))
    order = [i for g in epoch_order(len(of_prompts), seed=seed, epoch=iteration) for i in of_prompts[g]]
    responses = rollout.responses()
    plan = []
    for start in range(0, len(order), minibatch):
        members = order[start : start + minibatch]
        divided = _divided(rollout, responses, members, players, budget)
        micros = tuple(Microbatch(rows, _batch(rollout, responses, rows, players), c) for rows, c in divided)
        plan.append(Minibatch(tuple(members), micros))
    return plan


def _by_prompt(rollout: Rollout, rows: Iterable[int]) -> list[list[int]]:
    """Rows with equal prompts, together."""
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for i in rows:
        rows_of.setdefault(rollout.prompt_ids[i], []).append(i)
    return list(rows_of.values())


def _divided(
    rollout: Rollout, responses: list[list[int]], members: list[int], players: Players, budget: int
) -> list[tuple[tuple[int, ...], bool]]:
    """The rows of this process's microbatches of a minibatch, prompts whole, and whether they count."""

    def cut(rows: list[int]) -> list[list[int]]:
        sides = [rollout.prompt_ids[i] for i in rows], [responses[i] for i in rows]
        return [[rows[i] for i in group] for group in players.policy.microbatches(*sides, budget=budget)]

    if world.size() == 1:
        return [(tuple(rows), True) for rows in cut(members)]
    prompts = _by_prompt(rollout, members)
    sizes = [len(rollout.prompt_ids[rows[0]]) + sum(len(responses[i]) for i in rows) for rows in prompts]
    by_process = [cut([i for prompt in part for i in prompts[prompt]]) if part else [] for part in world.shares(sizes)]
    return [(tuple(rows), counts) for rows, counts in world.in_step(by_process)]


def _batch(rollout: Rollout, responses: list[list[int]], rows: Sequence[int], players: Players) -> TokenBatch:
    batch = token_batch(
        [rollout.prompt_ids[i] for i in rows], [responses[i] for i in rows], device=str(players.compute.device)
    )  # fmt: skip
    return players.trunk(batch)


@dataclass(frozen=True)
class Readings:
    """What the players that learn say about a rollout. Float32 [B, R], after_B [B]; the exact KL to the reference, and
    the reference's log-probs, where that was asked for."""

    logprobs_BR: Tensor
    statistics: TokenStatistics
    values_BR: Tensor
    after_B: Tensor
    full_kl_BR: Tensor | None
    reference_BR: Tensor | None

    def bootstrap_B(self, rollout: Rollout, wanted: bool) -> Tensor:
        """V of the state that the length limit cut, 0 for other rows and where nothing is bootstrapped."""
        return torch.where(rollout.truncated_B & wanted, self.after_B, 0.0)


@torch.no_grad()
def read(
    players: Players, rollout: Rollout, plan: list[Minibatch], *, temperature: float, full_kl: bool,
    reference: bool = False,
) -> Readings:  # fmt: skip
    """Policy and critic, as they are now, on a rollout. Each process reads its rows, and all know the whole.

    full_kl: the exact KL to the reference. reference: its log-probs, which with full_kl cost no pass of their own.
    """
    (B, R), clock = rollout.response_ids_BR.shape, players.clock
    logprobs, entropy, plain, values, exact_kl, theirs = (torch.zeros(B, R) for _ in range(6))
    after_B = torch.zeros(B)
    for micro in (m for group in plan for m in group.micros):
        index, width = torch.tensor(micro.rows), micro.batch.response_width
        against = players.reference if full_kl else None
        work = micro.work(players.policy)
        with clock("score/policy", work if against is None else work + micro.work(against)):
            scores = players.policy(
                micro.batch, temperature=temperature, statistics=True, against=against, both=reference
            )
        for target, source in (
            (logprobs, scores.logprobs_BT),
            (entropy, scores.entropy_BT),
            (plain, scores.plain_logprobs_BT),
            (exact_kl, scores.kl_BT),
            (theirs, scores.other_logprobs_BT),
        ):
            if source is not None and micro.counts:
                target[index, :width] = at_responses(source, micro.batch).cpu()
        if players.critic is not None:
            with clock("score/critic", micro.work(players.critic)):
                values_BT = players.critic(micro.batch).values_BT
            if micro.counts:
                values[index, :width] = at_responses(values_BT, micro.batch, before=True).cpu()
                after_B[index] = at_end(values_BT, micro.batch).cpu()
        if reference and not full_kl:
            with clock("score/reference", micro.work(players.reference)):
                theirs_BT = players.reference(micro.batch, temperature=temperature).logprobs_BT
            if micro.counts:
                theirs[index, :width] = at_responses(theirs_BT, micro.batch).cpu()
    world.fill(logprobs, entropy, plain, values, exact_kl, *([theirs] if reference else []), after_B)
    return Readings(
        logprobs, TokenStatistics(entropy, plain), values, after_B, exact_kl if full_kl else None,
        theirs if reference else None,
    )  # fmt: skip


@torch.no_grad()
def score(
    players: Players, rollout: Rollout, plan: list[Minibatch], texts: list[str], *, temperature: float,
    bootstrap: bool, full_kl: bool = False,
) -> tuple[ScoredRollouts, TokenStatistics]:  # fmt: skip
    """Old, reference and critic readings and every reward term of a rollout; nothing is shaped yet."""
    clock = players.clock
    components, dense_BR = score_texts(players.terms, rollout, texts, clock)
    readers = [t for t in players.terms if isinstance(t.reward, RewardModel) and t.reward.reads_ids]
    read_B = {term.name: torch.zeros(len(rollout)) for term in readers}
    now = read(players, rollout, plan, temperature=temperature, full_kl=full_kl, reference=True)
    assert now.reference_BR is not None
    for micro in (m for group in plan for m in group.micros):
        for term in readers:
            assert isinstance(term.reward, RewardModel)
            with clock(term.part, micro.work(term.reward.scalar)):
                score_B = term.reward.score_ids(micro.batch).cpu()
            if micro.counts:
                read_B[term.name][list(micro.rows)] = score_B
    world.fill(*read_B.values())
    for term in readers:
        assert isinstance(term.reward, RewardModel)
        term.reward.expect_numbers(read_B[term.name])
    # Equal responses have equal scores: that they were read in passes of other shapes is no reason to prefer one.
    known: dict[Any, int] = {}
    same = [known.setdefault(pair, b) for b, pair in enumerate(rollout.pairs())]
    components |= {name: score_B[same] for name, score_B in read_B.items()}
    scored = ScoredRollouts(
        rollout, now.logprobs_BR, now.reference_BR, now.values_BR, weighted_sum(players.terms, components), components,
        now.bootstrap_B(rollout, bootstrap), dense_BR, now.full_kl_BR,
    )  # fmt: skip
    return scored, now.statistics
