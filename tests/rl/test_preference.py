from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppomax.rl.preference import ranking_accuracy, ranking_loss

from . import oracle
from .batches import NAN, assert_close, assert_refused

pairs = st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=1, max_size=6)


def test_loss_by_hand():
    # Differences ln 3 and -ln 3: sigmoid 3/4 and 1/4; denom is given, not the number of rows here.
    chosen, rejected = torch.tensor([math.log(3), 0.0]), torch.tensor([0.0, math.log(3)])
    assert_close(ranking_loss(chosen, rejected, denom=4), (-math.log(3 / 4) - math.log(1 / 4)) / 4)


def test_margin_by_hand():
    one, zero = torch.tensor([math.log(3)]), torch.tensor([0.0])
    # A margin of ln 3 eats the whole difference: sigmoid 1/2.
    assert_close(ranking_loss(one, zero, denom=1, margin=math.log(3)), math.log(2))


def test_label_smoothing_by_hand():
    chosen, rejected = torch.tensor([math.log(3.0), 0.0]), torch.zeros(2)  # preferred with 3/4 and 1/2
    loss = ranking_loss(chosen, rejected, denom=2.0, label_smoothing=0.1)
    expected = -(0.9 * math.log(3 / 4) + 0.1 * math.log(1 / 4) + math.log(1 / 2)) / 2
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    # The least loss is where the model is as sure as the labels are.
    sure = torch.tensor([math.log(9.0)], requires_grad=True)
    ranking_loss(sure, torch.zeros(1), denom=1.0, label_smoothing=0.1).backward()
    assert float(sure.grad) == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, math.nan])
def test_wrong_label_smoothing(smoothing):
    with pytest.raises(ValueError, match="label_smoothing: found"):
        ranking_loss(torch.zeros(1), torch.zeros(1), denom=1.0, label_smoothing=smoothing)


def test_gradient_pulls_the_pair_apart():
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    ranking_loss(chosen, rejected, denom=1).backward()
    assert_close(chosen.grad, [-0.5])
    assert_close(rejected.grad, [0.5])


@given(pairs, st.floats(-1, 1))
def test_loss_agrees_with_the_oracle(scores, margin):
    chosen, rejected = zip(*scores, strict=True)
    ours = ranking_loss(
        torch.tensor(chosen, dtype=torch.float64),
        torch.tensor(rejected, dtype=torch.float64),
        denom=len(scores),
        margin=margin,
    )
    assert_close(ours, sum(oracle.ranking_loss(chosen, rejected, margin)) / len(scores))


@given(pairs, st.floats(-5, 5))
def test_trap_19_parts_add_up_and_a_common_shift_changes_nothing(scores, shift):
    chosen, rejected = torch.tensor(scores, dtype=torch.float64).unbind(dim=1)
    whole = ranking_loss(chosen, rejected, denom=len(scores))
    parts = sum(ranking_loss(c[None], r[None], denom=len(scores)) for c, r in zip(chosen, rejected, strict=True))
    assert_close(whole, parts)
    assert_close(ranking_loss(chosen + shift, rejected + shift, denom=len(scores)), whole)


def test_far_apart_scores_stay_finite():
    assert_close(ranking_loss(torch.tensor([-500.0]), torch.tensor([500.0]), denom=1), 1000.0)


def test_accuracy_counts_ties_as_half():
    accuracy = ranking_accuracy(torch.tensor([2.0, 0.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert_close(accuracy, (1 + 0 + 0.5 + 1) / 4)
    assert ranking_accuracy(torch.zeros(5), torch.zeros(5)) == 0.5


@pytest.mark.parametrize("denom", [0, -1, NAN])
def test_wrong_denominators(denom):
    assert_refused("denom", ranking_loss, torch.zeros(2), torch.zeros(2), denom=denom)


def test_wrong_shapes():
    for function in (ranking_accuracy, lambda a, b: ranking_loss(a, b, denom=1)):
        assert_refused("rejected_B", function, torch.zeros(2), torch.zeros(3))
        assert_refused("chosen_B", function, torch.zeros(2, 1), torch.zeros(2, 1))
    assert_refused("chosen_B", ranking_accuracy, torch.zeros(0), torch.zeros(0))
