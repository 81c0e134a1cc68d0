"""ppomax.rl against the oracle, which was written from the paper alone: thousands of ragged cases, values and slopes.

Inputs are exactly float32; both sides compute in float64, and the padding holds NaN. Slopes are compared where they
exist: not within KINK of an edge of a clip.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from oracle import (
    baselines,
    cases,
    critic,
    kl,
    masked,
    optimisation,
    policy,
    preference,
    returns,
    shaping,
)
from oracle.cases import Case
from ppomax.rl import baselines as rl_baselines
from ppomax.rl import convergence as rl_convergence
from ppomax.rl import kl as rl_kl
from ppomax.rl import masked as rl_masked
from ppomax.rl import objectives as rl
from ppomax.rl import policy_objectives as rl_policy
from ppomax.rl import preference as rl_preference
from ppomax.rl import returns as rl_returns
from ppomax.rl import shaping as rl_shaping

TOLERANCE = 1e-9
KINK = 1e-6
COUNT = 1000


@functools.cache
def drawn(seed: int) -> tuple[Case, ...]:
    """The cases of a seed, made once for all functions."""
    return tuple(cases.cases(COUNT, seed=seed))


def pad(rows: Sequence[Sequence[float]]) -> Tensor:
    """[B, R] float64 with NaN after each row's own entries; at least one column."""
    width = max([1, *map(len, rows)])
    return torch.tensor([[*row, *[math.nan] * (width - len(row))] for row in rows], dtype=torch.float64)


def mask(case: Case) -> Tensor:
    width = max([1, *case.lengths])
    return torch.arange(width)[None, :] < torch.tensor(case.lengths)[:, None]


def vector(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_equal(found: Any, expected: Any, case: Case, name: str) -> None:
    """Equal within TOLERANCE of the largest entry; ragged expectations are zero where nothing counts."""
    if isinstance(expected, list) and expected and isinstance(expected[0], list):
        expected = masked.zero_masked(expected, width=max([1, *map(len, expected)]))
    found = torch.as_tensor(found, dtype=torch.float64).detach()
    target = torch.as_tensor(expected, dtype=torch.float64).reshape(found.shape)
    scale = max(1.0, float(target.abs().max())) if target.numel() else 1.0
    bad = (found - target).abs() > TOLERANCE * scale
    assert not bool(bad.any()) and bool(found.isfinite().all()), f"{name}, case {case.seed}: {found} is not {target}"


def advantage_inputs(c: Case) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    return pad(c.rewards), pad(c.values), mask(c), {"gamma": c.gamma, "bootstrap": vector(c.bootstrap)}


def rows(c: Case, function: Callable[..., list[float]], **more: Any) -> list[list[float]]:
    """An oracle of one response, for every response of the case."""
    inputs = zip(c.rewards, c.values, c.bootstrap, strict=True)
    return [function(r, v, gamma=c.gamma, bootstrap=b, **more) for r, v, b in inputs]


def without_values(c: Case, function: Callable[..., Any]) -> list[Any]:
    return [function(r, gamma=c.gamma, bootstrap=b) for r, b in zip(c.rewards, c.bootstrap, strict=True)]


def of_advantages(function: Callable[..., Tensor], c: Case, **more: Any) -> Tensor:
    rewards, values, counted, given = advantage_inputs(c)
    return function(rewards, values, counted, **given, **more)


def history(c: Case) -> dict[str, rl_shaping.Moments]:
    """Moments that were updated batch by batch, in pieces, not computed at once."""
    moments: dict[str, rl_shaping.Moments] = {}
    for source, past in c.history.items():
        half = len(past) // 2
        moments[source] = rl_shaping.Moments().update(past[:half]).merge(rl_shaping.Moments().update(past[half:]))
    return rl_shaping.update_by_source(moments, c.scores, c.sources)


def whole_history(c: Case) -> list[float]:
    return [*c.history.get("helpful", []), *c.scores]


def moments_of(values: Sequence[float]) -> rl_shaping.Moments:
    return rl_shaping.Moments().update(list(values))


def dense_rows(c: Case) -> list[list[float]]:
    inputs = zip(c.scores, c.old_logprobs, c.reference_logprobs, c.dense, strict=True)
    return [shaping.token_rewards(s, o, r, kl_coefficient=c.kl_coefficient, dense=d) for s, o, r, d in inputs]


def two_each(c: Case) -> bool:
    return min(c.groups.count(g) for g in c.groups) >= 2


# name: (ours, oracle), each of a case.
VALUES: dict[str, tuple[Callable[[Case], Any], Callable[[Case], Any]]] = {
    "td_residuals": (lambda c: of_advantages(rl_returns.td_residuals, c), lambda c: rows(c, returns.td_residuals)),
    "gae": (
        lambda c: of_advantages(rl_returns.gae, c, gae_lambda=c.gae_lambda),
        lambda c: rows(c, returns.gae, gae_lambda=c.gae_lambda),
    ),
    "k_step_advantages": (
        lambda c: of_advantages(rl_returns.k_step_advantages, c, k=c.k),
        lambda c: rows(c, returns.k_step_advantages, k=c.k),
    ),
    "k_step_returns": (
        lambda c: of_advantages(rl_returns.k_step_returns, c, k=c.k),
        lambda c: rows(c, returns.k_step_returns, k=c.k),
    ),
    "lambda_returns": (
        lambda c: rl_returns.lambda_returns(
            of_advantages(rl_returns.gae, c, gae_lambda=c.gae_lambda), pad(c.values), mask(c)
        ),
        lambda c: rows(c, returns.lambda_returns, gae_lambda=c.gae_lambda),
    ),
    "monte_carlo": (
        lambda c: rl_returns.monte_carlo(pad(c.rewards), mask(c), gamma=c.gamma, bootstrap=vector(c.bootstrap)),
        lambda c: without_values(c, returns.monte_carlo),
    ),
    "batch_mean": (lambda c: rl_baselines.batch_mean(vector(c.scores)), lambda c: baselines.batch_mean(c.scores)),
    "group_mean": (
        lambda c: rl_baselines.group_mean(vector(c.scores), torch.tensor(c.groups)),
        lambda c: baselines.group_mean(c.scores, c.groups),
    ),
    "group_std": (
        lambda c: rl_baselines.group_std(vector(c.scores), torch.tensor(c.groups)),
        lambda c: baselines.group_std(c.scores, c.groups),
    ),
    "group_normalise": (
        lambda c: rl_baselines.group_normalise(vector(c.scores), torch.tensor(c.groups)),
        lambda c: baselines.group_normalise(c.scores, c.groups),
    ),
    "leave_one_out": (
        lambda c: rl_baselines.leave_one_out(vector(c.scores), torch.tensor(c.groups)) if two_each(c) else [0.0],
        lambda c: baselines.leave_one_out(c.scores, c.groups) if two_each(c) else [0.0],
    ),
    "spread": (
        lambda c: rl_baselines.spread(vector(c.scores), mask(c)), lambda c: masked.spread(c.scores, c.lengths),
    ),
    "masked_sum": (lambda c: rl_masked.masked_sum(pad(c.rewards), mask(c)), lambda c: masked.masked_sum(c.rewards)),
    "masked_mean": (lambda c: rl_masked.masked_mean(pad(c.rewards), mask(c)), lambda c: masked.masked_mean(c.rewards)),
    **{
        f"k{i}": (
            lambda c, i=i: rl_masked.zero_masked(
                getattr(rl_kl, f"k{i}")(pad(c.logprobs), pad(c.reference_logprobs)), mask(c)
            ),
            lambda c, i=i: pairwise(getattr(kl, f"k{i}"), c.logprobs, c.reference_logprobs),
        )
        for i in (1, 2, 3)
    },
    "full_kl": (
        lambda c: rl_kl.full_kl(vector(c.logits_p), vector(c.logits_q)), lambda c: kl.full_kl(c.logits_p, c.logits_q),
    ),
    "importance_weights": (
        lambda c: rl_policy.importance_weights(
            pad(c.old_logprobs), pad(c.behaviour_logprobs), mask(c), cap=c.importance_cap
        ),
        lambda c: policy.importance_weights(c.old_logprobs, c.behaviour_logprobs, cap=c.importance_cap),
    ),
    "explained_variance": (
        lambda c: rl.explained_variance(pad(c.values), pad(c.returns), mask(c)),
        lambda c: critic.explained_variance(c.values, c.returns),
    ),
    "normalise_and_clip": (
        lambda c: rl_shaping.normalise_and_clip(vector(c.scores), moments_of(whole_history(c)), clip=c.score_clip),
        lambda c: shaping.normalise_and_clip(c.scores, whole_history(c), clip=c.score_clip),
    ),
    "normalise_by_source": (
        lambda c: rl_shaping.normalise_by_source(vector(c.scores), c.sources, history(c), clip=c.score_clip),
        lambda c: shaping.normalise_by_source(
            c.scores, c.sources, shaping.update_by_source(c.history, c.scores, c.sources), clip=c.score_clip
        ),
    ),
    "missing_eos_penalty": (
        lambda c: rl_shaping.missing_eos_penalty(torch.tensor(c.truncated), penalty=0.5),
        lambda c: shaping.missing_eos_penalty(c.truncated, penalty=0.5),
    ),
    "length_penalty": (
        lambda c: rl_shaping.length_penalty(torch.tensor(c.lengths), coefficient=0.25, free=c.free_length),
        lambda c: shaping.length_penalty(c.lengths, coefficient=0.25, free=c.free_length),
    ),
    "token_rewards": (
        lambda c: rl_shaping.token_rewards(
            vector(c.scores), pad(c.old_logprobs), pad(c.reference_logprobs), mask(c),
            kl_coefficient=c.kl_coefficient, dense=pad(c.dense),
        ),
        dense_rows,
    ),
    "rolling_returns": (
        lambda c: rl_shaping.rolling_returns(pad(c.rewards), mask(c), gamma=c.gamma),
        lambda c: [shaping.rolling_returns(row, gamma=c.gamma) for row in c.rewards],
    ),
    "scale_rewards": (
        lambda c: rl_shaping.scale_rewards(pad(c.rewards), mask(c), moments_of(whole_history(c))),
        lambda c: [shaping.scale_rewards(row, whole_history(c)) for row in c.rewards],
    ),
    "has_converged": (
        lambda c: float(rl_convergence.has_converged(c.losses, window=2, tolerance=0.1)),
        lambda c: float(optimisation.has_converged(c.losses, window=2, tolerance=0.1)),
    ),
    "adaptive_coefficient": (
        lambda c: rl_kl.adaptive_coefficient(0.1, c.scores[0], target=0.5, horizon=100.0, samples=32.0),
        lambda c: kl.adaptive_coefficient(0.1, c.scores[0], target=0.5, horizon=100.0, samples=32),
    ),
    "penalty_coefficient": (
        lambda c: rl_kl.penalty_coefficient(0.1, c.scores[0], target=0.5),
        lambda c: kl.penalty_coefficient(0.1, c.scores[0], target=0.5),
    ),
}  # fmt: skip


def pairwise(function: Callable[[float, float], float], a: Any, b: Any) -> list[list[float]]:
    return [[function(x, y) for x, y in zip(r, s, strict=True)] for r, s in zip(a, b, strict=True)]


@pytest.mark.parametrize("name", VALUES)
def test_values_agree_with_the_oracle(name: str) -> None:
    ours, expected = VALUES[name]
    for case in drawn(1):
        assert_equal(ours(case), expected(case), case, name)


def test_whole_returns_agree_with_the_oracle() -> None:
    for case in drawn(1):
        found = rl_returns.whole_return(
            pad(case.rewards), mask(case), gamma=case.gamma, bootstrap=vector(case.bootstrap)
        )  # fmt: skip
        expected = without_values(case, returns.whole_return)
        # Without a token there was no episode: ours is 0 there, the formula's empty sum leaves the bootstrap.
        expected = [x if n else 0.0 for x, n in zip(expected, case.lengths, strict=True)]
        assert_equal(torch.where(torch.tensor(case.lengths) > 0, found, 0.0), expected, case, "whole_return")


def test_advantage_normalisation_agrees_with_the_oracle() -> None:
    for case in drawn(1):
        settings = {"eps": case.eps, "clip": case.advantage_clip}
        found = rl_shaping.normalise_advantages(pad(case.advantages), mask(case), **settings)
        expected = masked.normalise_advantages(case.advantages, **settings)
        constant = len(set(masked.flat(case.advantages))) < 2
        if not constant:  # there the result is the rounding of the mean over sqrt(eps)
            assert_equal(found, expected, case, "normalise_advantages")


# name: (ours of the first argument, oracle, oracle's slopes, distance from kinks or None); arguments of a case.
Loss = tuple[
    Callable[[Case, Tensor], Tensor], Callable[[Case], float], Callable[[Case], list[list[float]]],
    Callable[[Case], list[list[float]]] | None, str,
]  # fmt: skip
LOSSES: dict[str, Loss] = {
    "policy_gradient": (
        lambda c, x: rl_policy.policy_gradient_loss(x, pad(c.advantages), mask(c), denom=c.denom),
        lambda c: policy.policy_gradient_loss(c.logprobs, c.advantages, denom=c.denom),
        lambda c: policy.d_policy_gradient_loss(c.logprobs, c.advantages, denom=c.denom), None, "logprobs",
    ),
    "surrogate": (
        lambda c, x: rl_policy.surrogate_loss(x, pad(c.old_logprobs), pad(c.advantages), mask(c), denom=c.denom),
        lambda c: policy.surrogate_loss(c.logprobs, c.old_logprobs, c.advantages, denom=c.denom),
        lambda c: policy.d_surrogate_loss(c.logprobs, c.old_logprobs, c.advantages, denom=c.denom), None, "logprobs",
    ),
    "clipped": (
        lambda c, x: rl.clipped_policy_loss(
            x, pad(c.old_logprobs), pad(c.advantages), mask(c), clip_ratio=c.clip_ratio, denom=c.denom,
            dual_clip=c.dual_clip, weights=pad(c.kl),
        ),
        lambda c: policy.clipped_policy_loss(
            c.logprobs, c.old_logprobs, c.advantages, clip_ratio=c.clip_ratio, denom=c.denom, dual_clip=c.dual_clip,
            weights=c.kl,
        ),
        lambda c: policy.d_clipped_policy_loss(
            c.logprobs, c.old_logprobs, c.advantages, clip_ratio=c.clip_ratio, denom=c.denom, dual_clip=c.dual_clip,
            weights=c.kl,
        ),
        lambda c: policy.policy_kink_distance(
            c.logprobs, c.old_logprobs, clip_ratio=c.clip_ratio, dual_clip=c.dual_clip
        ),
        "logprobs",
    ),
    "penalised": (
        lambda c, x: rl_policy.penalised_policy_loss(
            x, pad(c.old_logprobs), pad(c.advantages), mask(c), kl_coefficient=c.kl_coefficient, denom=c.denom
        ),
        lambda c: policy.penalised_policy_loss(
            c.logprobs, c.old_logprobs, c.advantages, kl_coefficient=c.kl_coefficient, denom=c.denom
        ),
        lambda c: policy.d_penalised_policy_loss(
            c.logprobs, c.old_logprobs, c.advantages, kl_coefficient=c.kl_coefficient, denom=c.denom
        ),
        None, "logprobs",
    ),
    "value": (
        lambda c, x: rl.value_loss(
            x, pad(c.old_values), pad(c.returns), mask(c), value_clip=c.value_clip, denom=c.denom
        ),
        lambda c: critic.value_loss(
            c.values, c.returns, denom=c.denom, old_values=c.old_values, clip=c.value_clip
        ),
        lambda c: critic.d_value_loss(
            c.values, c.returns, denom=c.denom, old_values=c.old_values, clip=c.value_clip
        ),
        lambda c: critic.value_kink_distance(
            c.values, c.returns, old_values=c.old_values, clip=math.inf if c.value_clip is None else c.value_clip
        ),
        "values",
    ),
    "nll": (
        lambda c, x: rl.nll_loss(x, mask(c), denom=c.denom), lambda c: policy.nll_loss(c.logprobs, denom=c.denom),
        lambda c: policy.d_nll_loss(c.logprobs, denom=c.denom), None, "logprobs",
    ),
    "entropy_bonus": (
        lambda c, x: rl.entropy_bonus(x, mask(c), denom=c.denom, clip=c.entropy_clip),
        lambda c: policy.entropy_bonus(c.entropies, denom=c.denom, clip=c.entropy_clip),
        lambda c: policy.d_entropy_bonus(c.entropies, denom=c.denom, clip=c.entropy_clip), None, "entropies",
    ),
    **{
        f"kl_loss {name}": (
            lambda c, x, name=name: rl_policy.kl_loss(
                x, pad(c.reference_logprobs), mask(c), estimator=name, denom=c.denom
            ),
            lambda c, name=name: kl.kl_loss(c.logprobs, c.reference_logprobs, estimator=name, denom=c.denom),
            lambda c, name=name: kl.d_kl_loss(c.logprobs, c.reference_logprobs, estimator=name, denom=c.denom),
            None, "logprobs",
        )
        for name in ("k1", "k2", "k3")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_slopes_agree_with_the_oracle(name: str) -> None:
    ours, value, slopes, kinks, argument = LOSSES[name]
    for case in drawn(2):
        x = pad(getattr(case, argument)).requires_grad_()
        loss = ours(case, x)
        assert_equal(loss, value(case), case, name)
        loss.backward()
        assert x.grad is not None
        expected = pad(slopes(case)).nan_to_num(0.0)
        smooth = torch.ones_like(expected, dtype=torch.bool)
        if kinks is not None:
            smooth = ~(pad(kinks(case)) < KINK)
        found, expected = x.grad[smooth], expected[smooth]
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        assert bool(((found - expected).abs() <= TOLERANCE * scale).all()), f"slope of {name}, case {case.seed}"


def test_the_ranking_loss_and_its_slopes_agree_with_the_oracle() -> None:
    for case in drawn(3):
        chosen, rejected = vector(case.chosen).requires_grad_(), vector(case.rejected).requires_grad_()
        given: dict[str, Any] = {"denom": case.denom, "margin": case.margins, "weights": case.pair_weights}
        loss = rl_preference.ranking_loss(
            chosen, rejected, denom=case.denom, margin=vector(case.margins), weight_B=vector(case.pair_weights)
        )
        assert_equal(loss, preference.ranking_loss(case.chosen, case.rejected, **given), case, "ranking")
        loss.backward()
        assert_equal(chosen.grad, preference.d_ranking_loss(case.chosen, case.rejected, **given), case, "chosen")
        accuracy = rl_preference.ranking_accuracy(chosen, rejected)  # a float32
        assert float(accuracy) == pytest.approx(preference.ranking_accuracy(case.chosen, case.rejected), abs=1e-6)
        opposite = preference.d_ranking_loss_by_rejected(case.chosen, case.rejected, **given)
        assert_equal(rejected.grad, opposite, case, "rejected")


def test_ratio_statistics_agree_with_the_oracle() -> None:
    for case in drawn(4):
        found = rl.ratio_statistics(
            pad(case.logprobs), pad(case.old_logprobs), mask(case), clip_ratio=case.clip_ratio
        )  # fmt: skip
        expected = policy.ratio_statistics(case.logprobs, case.old_logprobs, clip_ratio=case.clip_ratio)
        edges = masked.flat(policy.policy_kink_distance(case.logprobs, case.old_logprobs, clip_ratio=case.clip_ratio))
        if all(distance > KINK for distance in edges):
            assert_equal(found["clip_fraction"], expected.clipped, case, "clip_fraction")
        assert_equal(found["approx_kl"], expected.approx_kl, case, "approx_kl")
        assert_equal(found["ratio_max"], expected.ratio_max if case.tokens else 0.0, case, "ratio_max")
