"""A reward model's scores of ranked responses: each is read once, whatever number of pairs it is in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ppomax.data.batches import prompt_batches, token_budget_batches
from ppomax.engine import world
from ppomax.models.load import Compute, load_scalar_lm, load_tokenizer, reads_alike
from ppomax.models.players import Scalar, at_end, response_mask
from ppomax.models.trunk import with_states
from ppomax.stages.inputs import RankedTokens, context_limit
from ppomax.types import SetupError, Work, token_batch


def score_pairs(
    model: Scalar,
    rows: Sequence[RankedTokens],
    states: Sequence[list[Tensor]] | None,
    *,
    with_lm: bool,
    count: Callable[[Work], None] | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Both sides' scores of every pair, each response read once, and the best responses' log-probs with their mask.

    count: told the work of a training pass.
    """
    device = str(model.device)
    sequences = [(row.prompt, response) for row in rows for response in row.responses]
    batch = token_batch([p for p, _ in sequences], [r for _, r in sequences], device=device)
    batch = with_states(batch, None if states is None else [state for group in states for state in group])
    lm_mask_BT = None
    if with_lm:
        best = torch.tensor([i in row.best for row in rows for i in range(len(row.responses))], device=device)
        lm_mask_BT = response_mask(batch) & best[:, None]
    if count is not None:
        count(model.work(batch, training=True, places=0 if lm_mask_BT is None else int(lm_mask_BT.sum())))
    out = model(batch, lm_mask_BT=lm_mask_BT)
    scores = at_end(out.values_BT, batch)
    chosen, rejected, offset = [], [], 0
    for row in rows:
        chosen += [offset + better for better, _ in row.pairs]
        rejected += [offset + worse for _, worse in row.pairs]
        offset += len(row.responses)
    lm = None if out.logprobs_BT is None or lm_mask_BT is None else (out.logprobs_BT, lm_mask_BT)
    return scores[chosen], scores[rejected], lm


@torch.no_grad()
def score_rows(
    model: Scalar, rows: Sequence[RankedTokens], states: Sequence[list[Tensor]] | None, budget: int,
    advance: Callable[[int], None] | None = None,
) -> list[list[tuple[float, float]]]:  # fmt: skip
    """(score of chosen, of rejected) of every pair, per prompt in the given order. advance: told how many prompts more
    this process has read."""
    starts = [0, *accumulate(len(row.pairs) for row in rows)]
    chosen_M, rejected_M = torch.zeros(starts[-1]), torch.zeros(starts[-1])
    for members, weight in passes(model, rows, budget):
        chosen_B, rejected_B, _ = score_pairs(model, [rows[i] for i in members], picked(states, members), with_lm=False)
        if weight:
            places = torch.tensor([m for i in members for m in range(starts[i], starts[i + 1])])
            chosen_M[places], rejected_M[places] = chosen_B.cpu(), rejected_B.cpu()
            if advance is not None:
                advance(len(members))
    world.fill(chosen_M, rejected_M)
    flat = zip(chosen_M.tolist(), rejected_M.tolist(), strict=True)
    return [[next(flat) for _ in row.pairs] for row in rows]


def scores_by(
    name: str, rows: Sequence[RankedTokens], compute: Compute, budget: int,
    advance: Callable[[int], None] | None = None,
) -> list[list[tuple[float, float]]]:  # fmt: skip
    """The scores of every pair by another trained reward model."""
    model = Scalar(load_scalar_lm(name, compute), train_layers=None, trained=False)
    return score_rows(model, rows, None, budget, advance)


def groups_of(model: Scalar, rows: Sequence[RankedTokens], budget: int) -> list[list[int]]:
    """Rows of each forward pass, at most `budget` tokens."""
    # All responses of a prompt stand in one forward pass; unpacked, at the width of the longest.
    if model.packs:
        return prompt_batches([row.prompt for row in rows], [sum(row.responses, ()) for row in rows], budget=budget)
    widths = [len(row.responses) * (len(row.prompt) + max(map(len, row.responses))) for row in rows]
    return token_budget_batches(widths, budget=budget, max_rows=len(rows))


def passes(model: Scalar, rows: Sequence[RankedTokens], budget: int) -> list[tuple[list[int], float]]:
    """Rows of each forward pass of this process, with the pass's weight."""
    return world.passes([len(row) for row in rows], lambda part: groups_of(model, [rows[i] for i in part], budget))


def share(model: Scalar, rows: Sequence[RankedTokens], budget: int) -> int:
    """How many rows this process scores."""
    return sum(len(members) for members, weight in passes(model, rows, budget) if weight)


def picked(states: Sequence[list[Tensor]] | None, members: Sequence[int]) -> list[list[Tensor]] | None:
    """The states of some rows, where there are any."""
    return None if states is None else [states[i] for i in members]


def expect_comparable(
    other: str | None, name: str, tokenizer: Any, compute: Compute, *, template: str | None, longest: int
) -> None:
    """Refuse a second reward model, if one is named, that was never trained, reads other ids than the first, or has no
    positions for the longest row. template: the second's, where it has none of its own."""
    if other is None:
        return
    if not reads_alike(load_tokenizer(other, otherwise=template), tokenizer):
        raise SetupError(f"compare: {other} has another vocabulary or chat template than {name}; expected the same")
    context_limit(load_scalar_lm(other, compute), longest, f"compare {other}: longest prompt + response")
