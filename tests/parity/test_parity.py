"""A complete PPO-max iteration, and the critic's pre-training before it, against the slow reference.

The reference computes in float64, ppomax in float32: what is left is the rounding of ppomax.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
import torch
from stages.conftest import Toys, Trained
from stages.toy import same_bits, weights
from torch import Tensor

from parity.comparison import CASES, OPTIM, Comparison, Iteration, Models, apart, compared, configuration, flat, moves
from parity.reference import Step
from ppomax.config import ModelConfig
from ppomax.stages.ppo import ppo

# Per token: |difference| / |numbers|, norms over all tokens; measured 2e-6 at most. Losses and gradient norms: of the
# number (a loss: or of 1, the unit of its terms, where they cancel); measured 3e-6. Parameters of a player, all
# together: |difference of the updates| / |update|; measured 3e-6, the spacing of float32 at the parameters.
TOLERANCE = 1e-5
# The same of each tensor alone: a norm's weights are near 1, where that spacing is 2e-4 of a small move.
TENSOR_TOLERANCE = 1e-3
PRETRAINING, COMPLETE = 0, 1
EVERY_CASE = pytest.mark.parametrize("case", CASES)
BOTH_ITERATIONS = pytest.mark.parametrize("index", [PRETRAINING, COMPLETE], ids=["pre-training", "complete"])


@pytest.fixture(scope="module")
def models(trained: Trained, trained_above: Trained, toys: Toys) -> Models:
    return Models(trained, trained_above, toys)


@pytest.fixture(scope="module")
def both(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Comparison]:
    """A case carried out on both sides, once."""
    return cache(lambda case: compared(case, tmp_path_factory.mktemp("parity"), models))


def counted(numbers_BR: Tensor, it: Iteration) -> Tensor:
    """The numbers of the tokens that exist, row after row; there is nothing but 0 elsewhere."""
    mask = it.scored.rollout.mask_BR
    assert not numbers_BR[~mask].any()
    return numbers_BR[mask].double()


def ragged(rows: list[list[float]], it: Iteration) -> Tensor:
    """The reference's numbers in the same order."""
    numbers = chain.from_iterable(row[:n] for row, n in zip(rows, it.lengths, strict=True))
    return torch.tensor(list(numbers), dtype=torch.float64)


def mean(steps: list[Step], name: str) -> float:
    return math.fsum(getattr(step, name) for step in steps) / len(steps)


@BOTH_ITERATIONS
@EVERY_CASE
def test_every_token_has_the_same_reward_advantage_and_return(
    case: str, index: int, both: Callable[[str], Comparison]
) -> None:
    it = both(case).iterations[index]
    found = {"scores": apart(it.scored.score_B.double(), torch.tensor(it.estimates.scores, dtype=torch.float64))}
    ours = {
        "old": it.scored.old_logprobs_BR, "reference": it.scored.reference_logprobs_BR, "values": it.scored.values_BR,
        "rewards": it.rewards_BR, "advantages": it.experience.advantages_BR, "returns": it.experience.returns_BR,
    }  # fmt: skip
    for name, numbers_BR in ours.items():
        found[name] = apart(counted(numbers_BR, it), ragged(getattr(it.estimates, name), it))
    assert max(found.values()) < TOLERANCE, found


@BOTH_ITERATIONS
@EVERY_CASE
def test_losses_and_gradient_norms_are_the_same(case: str, index: int, both: Callable[[str], Comparison]) -> None:
    it = both(case).iterations[index]
    players = ["critic"] if index == PRETRAINING else ["policy", "critic"]
    losses = ["value_loss"] if index == PRETRAINING else ["policy_loss", "ptx_loss", "value_loss"]
    expected = {name: mean(it.steps, name) for name in losses}
    norms = {f"grad_norm_{p}": math.fsum(step.norms[p] for step in it.steps) / len(it.steps) for p in players}
    assert {name: it.means[name] for name in norms} == pytest.approx(norms, rel=TOLERANCE)
    assert {name: it.means[name] for name in losses} == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
    assert ("policy_loss" in it.means) == (index == COMPLETE)
    if index == COMPLETE:
        share = sum(step.clipped_ratios for step in it.steps) / sum(step.tokens for step in it.steps)
        assert it.means["clip_fraction"] == pytest.approx(share, rel=TOLERANCE)


@BOTH_ITERATIONS
@EVERY_CASE
def test_the_parameters_move_alike(case: str, index: int, both: Callable[[str], Comparison]) -> None:
    comparison = both(case)
    it = comparison.iterations[index]
    for player in ("policy", "critic") if index == COMPLETE else ("critic",):
        ours, theirs = moves(it.ours, player), moves(it.theirs, player)
        assert ours.keys() == theirs.keys()
        for name, move in theirs.items():
            assert bool(move.any()) == bool(ours[name].any()) == _trained(name, comparison.config.compute), name
        assert float(flat(theirs).norm()) > 1e-3 * float(flat(it.theirs[0][player]).norm())
        assert apart(flat(ours), flat(theirs)) < TOLERANCE
        by_tensor = {name: apart(ours[name], move) for name, move in theirs.items() if move.any()}
        assert max(by_tensor.values()) < TENSOR_TOLERANCE, by_tensor
    if index == PRETRAINING:
        assert same_bits(it.ours[0]["policy"], it.ours[1]["policy"])


def _trained(name: str, compute: ModelConfig) -> bool:
    """`tiny` has two layers; with a shared trunk, the upper one, the final norm and the head are trained."""
    if compute.lora_rank is not None:
        return ".lora_" in name or name.startswith("score.")
    return compute.train_layers is None or name.startswith(("model.layers.1.", "model.norm.", "score."))


@EVERY_CASE
def test_the_case_is_what_it_is_called(case: str, both: Callable[[str], Comparison]) -> None:
    """Else the agreement would say less than it seems to: every bound binds, every branch is taken."""
    comparison = both(case)
    config, it = comparison.config, comparison.iterations[COMPLETE]
    assert 0 < sum(it.truncated) < len(it.truncated) and min(it.lengths) < max(it.lengths)
    assert apart(it.scored.old_logprobs_BR, it.scored.reference_logprobs_BR) > 500 * TOLERANCE
    e = it.estimates
    scored = [b for b, cut in enumerate(it.truncated) if not (cut and config.score.truncated == "bootstrap")]
    shaped = [abs(e.rewards[b][-1] + 0.05 * (e.old[b][-1] - e.reference[b][-1])) for b in scored]
    assert min(shaped) < 0.9 and sum(x > 0.999 for x in shaped) > 1
    for player in ("policy", "critic"):
        assert max(step.norms[player] for step in it.steps) > (OPTIM.max_grad_norm or 0)
    rows = [len(micro.rows) for minibatch in it.plan for micro in minibatch.micros]
    if "alone" in case:
        assert rows == [1] * config.rollout_batch
    elif config.compute.tokens_per_microbatch == 200 or "padded" in case:
        assert len(rows) > len(it.plan) and max(rows) > 1
    else:
        assert rows == [config.minibatch] * len(it.plan)
    assert it.means["skipped_steps"] == 0
    if config.epochs > 1:
        assert sum(step.clipped_ratios for step in it.steps) > 0 < sum(step.clipped_values for step in it.steps)
    assert comparison.job.players.shares_trunk == (config.compute.train_layers is not None)


def test_the_loop_of_a_run_does_the_steps_compared_here(
    models: Models, tmp_path: Path, both: Callable[[str], Comparison]
) -> None:
    """Bit for bit: so the comparison is one of `ppomax ppo`."""
    case = "two minibatches"
    config = configuration(case, tmp_path, models)
    assert config.iterations == 2
    ppo(config)
    players = both(case).job.players
    for folder, player in (("final", players.policy), ("critic", players.critic)):
        written = weights(config.run_dir / folder)
        parameters = dict(player.model.named_parameters())  # type: ignore[union-attr]
        assert same_bits({name: p.detach() for name, p in parameters.items() if name in written}, written)
