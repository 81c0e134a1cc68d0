from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppomax.rl.baselines import batch_mean, group_mean, group_normalise, group_std, leave_one_out, spread
from ppomax.rl.policy_objectives import policy_gradient_loss

from .batches import NAN, assert_close, assert_refused, assert_rows_are_independent, ragged

# Group 7: returns 1, 2, 6. Group -3: returns 5, 9. The rows of a group are not neighbours.
RETURNS = torch.tensor([1.0, 5.0, 2.0, 9.0, 6.0])
GROUPS = torch.tensor([7, -3, 7, -3, 7])

GROUPED = [group_mean, leave_one_out, group_std, group_normalise]


@st.composite
def grouped(draw):
    """Returns and group ids of 1-4 groups of 2-4 rows each, shuffled."""
    ids = draw(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=4, unique=True))
    rows = [i for i in ids for _ in range(draw(st.integers(2, 4)))]
    number = st.floats(-2, 2, allow_nan=False, width=32)
    returns = draw(st.lists(number, min_size=len(rows), max_size=len(rows)))
    return torch.tensor(returns, dtype=torch.float64), torch.tensor(draw(st.permutations(rows)))


def test_means_by_hand():
    assert_close(batch_mean(RETURNS), [(1 + 5 + 2 + 9 + 6) / 5] * 5)
    assert_close(group_mean(RETURNS, GROUPS), [3.0, 7.0, 3.0, 7.0, 3.0])


def test_leave_one_out_by_hand():
    assert_close(leave_one_out(RETURNS, GROUPS), [(2 + 6) / 2, 9.0, (1 + 6) / 2, 5.0, (1 + 2) / 2])


def test_trap_4_group_std_by_hand_is_biased():
    # Group 7: (4 + 1 + 9) / 3 (unbiased would be / 2). Group -3: (4 + 4) / 2.
    a, b = math.sqrt(14 / 3), 2.0
    assert_close(group_std(RETURNS, GROUPS), [a, b, a, b, a])
    assert_close(group_normalise(RETURNS, GROUPS), [-2 / a, -2 / b, -1 / a, 2 / b, 3 / a])


def test_spread_by_hand():
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    assert torch.equal(
        spread(torch.tensor([2.0, -1.0, NAN]), mask),
        torch.tensor([[2.0, 2.0, 2.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
    )


@given(grouped())
def test_leave_one_out_averages_to_the_group_mean(batch):
    returns, groups = batch
    others, mean = leave_one_out(returns, groups), group_mean(returns, groups)
    assert_close(group_mean(others, groups), mean)
    # R - mean of others = n / (n - 1) * (R - mean).
    n = (groups[:, None] == groups[None, :]).sum(dim=1)
    assert_close(returns - others, n / (n - 1) * (returns - mean))


@given(grouped())
def test_one_group_is_the_batch(batch):
    returns, _ = batch
    one = torch.zeros(len(returns), dtype=torch.int64)
    assert_close(group_mean(returns, one), batch_mean(returns))
    assert_close(group_std(returns, one), [float(returns.std(correction=0))] * len(returns))


@given(grouped())
def test_normalised_groups_have_mean_0_and_std_1(batch):
    returns, groups = batch
    normal = group_normalise(returns, groups)
    assert_close(group_mean(normal, groups), torch.zeros(len(returns)))
    varies = group_std(returns, groups) > 1e-3
    assert_close(group_std(normal, groups)[varies], torch.ones(int(varies.sum())))


@given(grouped(), st.integers(-3, 3), st.sampled_from([0.25, 4.0]))
def test_normalised_groups_do_not_depend_on_the_unit_of_the_returns(batch, shift, scale):
    returns, groups = batch
    returns = returns.round(decimals=2)
    assert_close(group_normalise(scale * (returns + shift), groups), group_normalise(returns, groups))


@pytest.mark.parametrize("constant", [0.0, 0.1, -1.3, 1e4])
def test_trap_16_a_group_without_variance_is_neutral(constant):
    # The mean of 0.1 in float32 is not 0.1 at most of these sizes: rounding must not pass for variance.
    for rows in range(1, 40):
        returns = torch.full((rows,), constant)
        returns[0] = torch.nextafter(returns[0], torch.tensor(math.inf)) if constant else 0.0
        groups = torch.zeros(rows, dtype=torch.int64)
        assert torch.equal(group_normalise(returns, groups), torch.zeros(rows))
        assert torch.equal(group_normalise(torch.full((rows,), constant), groups), torch.zeros(rows))


@given(grouped(), st.randoms(use_true_random=False))
def test_trap_3_row_order_and_the_numbering_of_groups_change_nothing(batch, random):
    returns, groups = batch
    order = torch.tensor(random.sample(range(len(returns)), len(returns)))
    renamed = torch.unique(groups, return_inverse=True)[1]
    for baseline in GROUPED:
        plain = baseline(returns, groups)
        assert_close(baseline(returns[order], groups[order]), plain[order])
        assert torch.equal(baseline(returns, renamed), plain)


@pytest.mark.parametrize("baseline", GROUPED)
def test_trap_3_other_groups_change_nothing_not_even_by_nan(baseline):
    poisoned = torch.where(GROUPS == -3, NAN, RETURNS)
    own = GROUPS == 7
    assert torch.equal(baseline(poisoned, GROUPS)[own], baseline(RETURNS, GROUPS)[own])
    assert_close(baseline(RETURNS[own], GROUPS[own]), baseline(RETURNS, GROUPS)[own])


@given(ragged(1))
def test_trap_3_padding_order_and_neighbours_do_not_change_spread(columns):
    assert_rows_are_independent(lambda t, mask: spread(t[0][:, 0], mask), columns)


def expected_gradient(baseline) -> torch.Tensor:
    """Of the policy-gradient loss on a batch of two one-token responses: all nine batches, each by its probability."""
    logits = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, -2.0, 5.0], dtype=torch.float64)
    logprobs, expected = torch.log_softmax(logits, dim=0), torch.zeros(3, dtype=torch.float64)
    mask = torch.ones(2, 1, dtype=torch.bool)
    for pair in itertools.product(range(3), repeat=2):
        tokens = torch.tensor(pair)
        weights = spread(rewards[tokens] - baseline(rewards[tokens]), mask)
        loss = policy_gradient_loss(logprobs[tokens][:, None], weights, mask, denom=2)
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        expected += logprobs.detach()[tokens].sum().exp() * gradient
    return expected


def test_leave_one_out_leaves_the_gradient_unbiased_and_a_mean_with_the_row_itself_shrinks_it():
    together = torch.zeros(2, dtype=torch.int64)
    plain = expected_gradient(torch.zeros_like)
    assert_close(expected_gradient(lambda r: leave_one_out(r, together)), plain)
    assert_close(expected_gradient(batch_mean), plain * (1 - 1 / 2))
    assert_close(expected_gradient(lambda r: group_mean(r, together)), plain * (1 - 1 / 2))


def test_a_group_of_one_row_has_no_others():
    with pytest.raises(ValueError, match=r"^group_B: found one row of group 4, expected at least two of each$"):
        leave_one_out(RETURNS, torch.tensor([7, 4, 7, 7, 7]))


def test_wrong_arguments():
    for baseline in GROUPED:
        assert_refused("return_B", baseline, RETURNS[:, None], GROUPS)
        assert_refused("group_B", baseline, RETURNS, GROUPS[:2])
        assert_refused("group_B", baseline, RETURNS, GROUPS.float())
    assert_refused("return_B", batch_mean, RETURNS[:, None])
    assert_refused("return_B", spread, RETURNS, torch.ones(2, 3, dtype=torch.bool))
    assert_refused("mask", spread, RETURNS, torch.ones(5, 3))
