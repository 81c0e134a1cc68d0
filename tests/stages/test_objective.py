"""The policy's loss of a microbatch by its settings, against loops over tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from rl import oracle

from ppomax.config import KLConfig, ObjectiveConfig, PPOConfig
from ppomax.models.players import TokenScores
from ppomax.stages.objective import policy_loss
from ppomax.types import Experience, Prompt, Rollout, TokenBatch, token_batch

PROMPTS, RESPONSES = [[5, 6], [7]], [[1, 2, 3], [4, 5]]
DENOM = 5.0
ETA, BETA = 0.3, 0.7


def batch_of() -> TokenBatch:
    return token_batch(PROMPTS, RESPONSES)


def rows(seed: int, scale: float = 0.5) -> torch.Tensor:
    """[B, R] numbers, 0 where masked."""
    x = scale * torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
    return torch.where(batch_of().mask_BR, x, 0.0)


OLD, NEW, REFERENCE, ADVANTAGES, ENTROPY = rows(0), rows(5), rows(2), rows(3, 2.0), rows(4).abs()


def at_tokens(x_BR: torch.Tensor) -> torch.Tensor:
    """[B, T] with row b's numbers at its response tokens."""
    found = torch.zeros(2, batch_of().ids_BT.shape[1])
    for b, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        found[b, len(prompt) : len(prompt) + len(response)] = x_BR[b, : len(response)]
    return found


def loss(**changes: Any) -> float:
    batch = batch_of()
    lengths = torch.tensor([len(r) for r in RESPONSES])
    rollout = Rollout(
        tuple(Prompt((), key=str(b)) for b in range(2)), tuple(tuple(p) for p in PROMPTS),
        torch.zeros(2, 3, dtype=torch.long), lengths, OLD, torch.zeros(2, dtype=torch.bool), torch.zeros(2).long(),
    )  # fmt: skip
    part = Experience(rollout, OLD, torch.zeros(2, 3), ADVANTAGES, torch.zeros(2, 3), REFERENCE)
    scores = TokenScores(at_tokens(NEW), entropy_BT=at_tokens(ENTROPY))
    config = PPOConfig(**{"kl": KLConfig(coefficient=ETA), **changes})
    return float(
        policy_loss(scores, part, batch, ADVANTAGES, config, denom=DENOM, kl_coefficient=ETA, penalty=BETA)
    )  # fmt: skip


def tokens(*numbers: torch.Tensor) -> list[tuple[float, ...]]:
    """The counted entries of several [B, R] tensors, side by side."""
    mask = batch_of().mask_BR
    return list(zip(*(x[mask].tolist() for x in numbers), strict=True))


def clipped(new: float, old: float, advantage: float, dual: float | None = None) -> float:
    (loss,) = oracle.clipped_policy_loss([new], [old], [advantage], 0.2)
    return loss if dual is None or advantage >= 0 else min(loss, -dual * advantage)


def test_the_clipped_surrogate() -> None:
    assert loss() == pytest.approx(sum(clipped(*t) for t in tokens(NEW, OLD, ADVANTAGES)) / DENOM, abs=1e-6)


def test_a_dual_clip_bounds_what_a_bad_token_costs() -> None:
    found = [clipped(*t, dual=1.05) for t in tokens(NEW, OLD, ADVANTAGES)]
    assert sum(found) != pytest.approx(sum(clipped(*t) for t in tokens(NEW, OLD, ADVANTAGES))), "it binds"
    assert loss(objective=ObjectiveConfig(dual_clip=1.05)) == pytest.approx(sum(found) / DENOM, abs=1e-6)


def test_the_entropy_bonus_has_its_weight() -> None:
    found = sum(entropy for (entropy,) in tokens(ENTROPY)) / DENOM
    assert loss(objective=ObjectiveConfig(entropy_weight=0.2)) == pytest.approx(loss() - 0.2 * found, abs=1e-6)


def test_a_penalty_weighs_the_distance_from_the_old_policy() -> None:
    found = sum(
        -math.exp(new - old) * advantage + BETA * oracle.k3(old, new)  # KL(old ‖ new), since old drew the tokens
        for new, old, advantage in tokens(NEW, OLD, ADVANTAGES)
    )
    plain = sum(-math.exp(new - old) * advantage for new, old, advantage in tokens(NEW, OLD, ADVANTAGES))
    value = loss(objective=ObjectiveConfig(kind="penalty"))
    assert value != pytest.approx(plain / DENOM)
    assert value == pytest.approx(found / DENOM, abs=1e-6)


@pytest.mark.parametrize(("estimator", "of"), [("k2", oracle.k2), ("k3", oracle.k3)])
def test_a_kl_in_the_loss_is_by_its_estimator(estimator: Any, of: Any) -> None:
    found = sum(of(new, reference) for new, reference in tokens(NEW, REFERENCE)) / DENOM
    kl = KLConfig(coefficient=ETA, place="loss", estimator=estimator)
    assert loss(kl=kl) == pytest.approx(loss() + ETA * found, abs=1e-6)


def test_the_policy_gradient_and_the_plain_surrogate() -> None:
    gradient = sum(-new * advantage for new, advantage in tokens(NEW, ADVANTAGES))
    assert loss(objective=ObjectiveConfig(kind="policy_gradient")) == pytest.approx(gradient / DENOM, abs=1e-6)
    for denominator, other in (("old", OLD), ("reference", REFERENCE)):
        surrogate = sum(-math.exp(new - old) * a for new, old, a in tokens(NEW, other, ADVANTAGES))
        settings = ObjectiveConfig(kind="surrogate", denominator=denominator)  # type: ignore[arg-type]
        assert loss(objective=settings) == pytest.approx(surrogate / DENOM, abs=1e-6)
