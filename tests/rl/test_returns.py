from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppomax.rl.returns import (
    discounted_sums,
    gae,
    k_step_advantages,
    k_step_returns,
    lambda_returns,
    last_token,
    monte_carlo,
    td_residuals,
    whole_return,
)

from . import oracle
from .batches import (
    NAN,
    assert_close,
    assert_only_counted_tokens_matter,
    assert_refused,
    assert_rows_are_independent,
    mask_of,
    pad,
    ragged,
    unit,
)

MASK = torch.tensor([[True, True, True], [True, True, False]])
REWARDS = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, NAN]])
VALUES = torch.tensor([[0.5, 1.0, 1.5], [2.0, 1.0, NAN]])
BOOTSTRAP = torch.tensor([0.0, 4.0])

steps = st.integers(1, 10)


def test_td_residuals_by_hand():
    # gamma 0.5; after the last token V = 0.
    row0 = [1.0 + 0.5 * 1.0 - 0.5, 0.0 + 0.5 * 1.5 - 1.0, 2.0 + 0.5 * 0.0 - 1.5]
    row1 = [0.0 + 0.5 * 1.0 - 2.0, 3.0 + 0.5 * 0.0 - 1.0, 0.0]
    assert_close(td_residuals(REWARDS, VALUES, MASK, gamma=0.5), [row0, row1])


def test_gae_by_hand():
    # deltas at gamma 0.5: [1, -0.25, 0.5] and [-1.5, 2]; gamma * lambda = 0.4.
    row0 = [1.0 + 0.4 * (-0.25 + 0.4 * 0.5), -0.25 + 0.4 * 0.5, 0.5]
    row1 = [-1.5 + 0.4 * 2.0, 2.0, 0.0]
    assert_close(gae(REWARDS, VALUES, MASK, gamma=0.5, gae_lambda=0.8), [row0, row1])


def test_monte_carlo_by_hand():
    row0 = [1.0 + 0.5 * 0.0 + 0.25 * 2.0, 0.0 + 0.5 * 2.0, 2.0]
    row1 = [0.0 + 0.5 * 3.0, 3.0, 0.0]
    assert_close(monte_carlo(REWARDS, MASK, gamma=0.5), [row0, row1])


def test_whole_return_by_hand():
    assert_close(whole_return(REWARDS, MASK, gamma=0.5), [1.0 + 0.25 * 2.0, 0.5 * 3.0])
    assert_close(whole_return(REWARDS, MASK, gamma=1.0), [1.0 + 2.0, 3.0])
    # The cut state of row 1 stands after two tokens.
    found = whole_return(REWARDS, MASK, gamma=0.5, bootstrap=BOOTSTRAP)
    assert_close(found, [1.0 + 0.25 * 2.0, 0.5 * 3.0 + 0.25 * 4.0])


def test_k_step_returns_by_hand():
    # gamma 0.5, two steps; where only one is left, one step.
    row0 = [1.0 + 0.5 * 0.0 + 0.25 * 1.5, 0.0 + 0.5 * 2.0 + 0.25 * 0.0, 2.0]
    row1 = [0.0 + 0.5 * 3.0 + 0.25 * 4.0, 3.0 + 0.5 * 4.0, 0.0]
    found = k_step_returns(REWARDS, VALUES, MASK, k=2, gamma=0.5, bootstrap=BOOTSTRAP)
    assert_close(found, [row0, row1])


def test_k_step_advantages_by_hand():
    # deltas at gamma 0.5: [1, -0.25, 0.5] and [-1.5, 2].
    row0 = [1.0 + 0.5 * -0.25, -0.25 + 0.5 * 0.5, 0.5]
    row1 = [-1.5 + 0.5 * 2.0, 2.0, 0.0]
    assert_close(k_step_advantages(REWARDS, VALUES, MASK, k=2, gamma=0.5), [row0, row1])
    # Bootstrapped, the last delta of row 1 is 2 + 0.5 * 4.
    found = k_step_advantages(REWARDS, VALUES, MASK, k=2, gamma=0.5, bootstrap=BOOTSTRAP)
    assert_close(found, [row0, [-1.5 + 0.5 * 4.0, 4.0, 0.0]])


def test_discounted_sums_by_hand():
    x = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 8.0]], requires_grad=True)
    sums = discounted_sums(x, factor=0.5)
    assert_close(sums, [[1.0 + 1.0 + 1.0, 2.0 + 2.0, 4.0], [2.0, 4.0, 8.0]])
    assert sums.is_contiguous()
    sums.sum().backward()
    assert_close(x.grad, [[1.0, 1.5, 1.75]] * 2)


def test_trap_11_terminal_value_is_zero_and_a_cut_state_is_bootstrapped():
    bootstrap = torch.tensor([0.0, 4.0])
    delta = td_residuals(REWARDS, VALUES, MASK, gamma=0.5, bootstrap=bootstrap)
    # Only the last counted token of row 1 sees the cut state's value.
    assert_close(delta[1], [0.0 + 0.5 * 1.0 - 2.0, 3.0 + 0.5 * 4.0 - 1.0, 0.0])
    assert torch.equal(delta[0], td_residuals(REWARDS, VALUES, MASK, gamma=0.5)[0])
    returns = monte_carlo(REWARDS, MASK, gamma=0.5, bootstrap=bootstrap)
    assert_close(returns[1], [0.0 + 0.5 * (3.0 + 0.5 * 4.0), 3.0 + 0.5 * 4.0, 0.0])


def test_trap_11_a_value_beyond_the_end_is_never_read():
    """Padding that holds a finite value is the quiet version of the trap: NaN would at least show."""
    tempting = torch.nan_to_num(VALUES, nan=100.0)
    expected = gae(REWARDS, VALUES, MASK, gamma=1.0, gae_lambda=0.9)
    assert torch.equal(gae(REWARDS, tempting, MASK, gamma=1.0, gae_lambda=0.9), expected)


def test_trap_13_lambda_returns_are_advantages_plus_old_values():
    advantages = gae(REWARDS, VALUES, MASK, gamma=0.5, gae_lambda=0.8)
    returns = lambda_returns(advantages, VALUES, MASK)
    assert_close(returns, [[0.98 + 0.5, -0.05 + 1.0, 0.5 + 1.5], [-0.7 + 2.0, 2.0 + 1.0, 0.0]])


def test_last_token():
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    expected = torch.tensor([[False, False, True], [True, False, False], [False, False, False]])
    assert torch.equal(last_token(mask), expected)


def test_trap_6_one_token_and_empty_rows():
    mask = torch.tensor([[True, False], [False, False]])
    rewards, values = torch.tensor([[3.0, NAN], [NAN, NAN]]), torch.tensor([[1.0, NAN], [NAN, NAN]])
    bootstrap = torch.tensor([0.0, 9.0])
    assert_close(gae(rewards, values, mask, gamma=1.0, gae_lambda=0.9, bootstrap=bootstrap), [[2.0, 0.0], [0.0, 0.0]])
    assert_close(monte_carlo(rewards, mask, gamma=1.0, bootstrap=bootstrap), [[3.0, 0.0], [0.0, 0.0]])
    assert_close(whole_return(rewards, mask, gamma=1.0, bootstrap=bootstrap), [3.0, 0.0])
    for k in (1, 2, 3):
        known = {"k": k, "gamma": 1.0, "bootstrap": bootstrap}
        assert_close(k_step_returns(rewards, values, mask, **known), [[3.0, 0.0], [0.0, 0.0]])
        assert_close(k_step_advantages(rewards, values, mask, **known), [[2.0, 0.0], [0.0, 0.0]])


@given(ragged(2), ragged(1), unit, unit)
def test_agrees_with_the_oracle(columns, cut, gamma, lam):
    rewards, values = columns
    # One cut-state value per row; 0 where the row's episode ended.
    cuts = [(cut[0][i % len(cut[0])][0] if i % 2 else 0.0) for i in range(len(rewards))]
    mask, bootstrap = mask_of(rewards), torch.tensor(cuts, dtype=torch.float64)
    r, v = pad(rewards), pad(values)
    rows = list(zip(rewards, values, cuts, strict=True))

    assert_close(
        td_residuals(r, v, mask, gamma=gamma, bootstrap=bootstrap),
        pad([oracle.td_residuals(a, b, gamma, c) for a, b, c in rows], fill=0.0),
    )
    advantages = gae(r, v, mask, gamma=gamma, gae_lambda=lam, bootstrap=bootstrap)
    assert_close(advantages, pad([oracle.gae(a, b, gamma, lam, c) for a, b, c in rows], fill=0.0))
    assert_close(
        lambda_returns(advantages, v, mask),
        pad([oracle.lambda_returns(a, b, gamma, lam, c) for a, b, c in rows], fill=0.0),
    )
    assert_close(
        monte_carlo(r, mask, gamma=gamma, bootstrap=bootstrap),
        pad([oracle.monte_carlo(a, gamma, c) for a, _, c in rows], fill=0.0),
    )


@given(ragged(2), unit)
def test_trap_12_gae_at_lambda_0_is_delta_and_at_lambda_1_monte_carlo_minus_value(columns, gamma):
    rewards, values = (pad(rows) for rows in columns)
    mask, bootstrap = mask_of(columns[0]), torch.linspace(-1, 1, len(columns[0]), dtype=torch.float64)
    known = {"gamma": gamma, "bootstrap": bootstrap}
    assert torch.equal(
        gae(rewards, values, mask, gae_lambda=0.0, **known), td_residuals(rewards, values, mask, **known)
    )
    difference = torch.where(mask, monte_carlo(rewards, mask, **known) - values, 0.0)
    assert_close(gae(rewards, values, mask, gae_lambda=1.0, **known), difference)


@given(ragged(2), steps, unit)
def test_k_steps_agree_with_the_oracle(columns, k, gamma):
    cuts = [1.5 * (i % 2) for i in range(len(columns[0]))]
    known = {"k": k, "gamma": gamma, "bootstrap": torch.tensor(cuts, dtype=torch.float64)}
    returns, advantages = [], []
    for rewards, values, cut in zip(*columns, cuts, strict=True):
        n = len(rewards)
        delta = oracle.td_residuals(rewards, values, gamma, cut)
        returns.append([oracle.k_step_return(rewards, values, gamma, t, min(k, n - t), cut) for t in range(n)])
        advantages.append([sum(gamma**i * delta[t + i] for i in range(min(k, n - t))) for t in range(n)])
    tensors, mask = [pad(rows) for rows in columns], mask_of(columns[0])
    assert_close(k_step_returns(*tensors, mask, **known), pad(returns, fill=0.0))
    assert_close(k_step_advantages(*tensors, mask, **known), pad(advantages, fill=0.0))


@given(ragged(2), steps, unit)
def test_trap_12_k_steps_are_delta_at_k_1_and_monte_carlo_from_k_n(columns, k, gamma):
    rewards, values = (pad(rows) for rows in columns)
    mask, bootstrap = mask_of(columns[0]), torch.linspace(-1, 1, len(columns[0]), dtype=torch.float64)
    known = {"gamma": gamma, "bootstrap": bootstrap}
    delta, whole = td_residuals(rewards, values, mask, **known), monte_carlo(rewards, mask, **known)
    assert torch.equal(k_step_advantages(rewards, values, mask, k=1, **known), delta)
    # The width is one reason to stop, the row's own end another.
    for wide in (0, 3):
        r, v = (pad(rows, mask.shape[1] + wide) for rows in columns)
        found = k_step_returns(r, v, mask_of(columns[0], mask.shape[1] + wide), k=mask.shape[1], **known)
        assert torch.equal(found[:, : mask.shape[1]], whole)
    difference = torch.where(mask, k_step_returns(rewards, values, mask, k=k, **known) - values, 0.0)
    assert_close(k_step_advantages(rewards, values, mask, k=k, **known), difference)


@given(ragged(2), unit, unit)
def test_gae_is_the_weighted_mean_of_all_k_step_advantages(columns, gamma, lam):
    rewards, values = (pad(rows) for rows in columns)
    mask = mask_of(columns[0])
    width = mask.shape[1]
    each = [k_step_advantages(rewards, values, mask, k=k, gamma=gamma) for k in range(1, width + 1)]
    mean = sum((1 - lam) * lam**i * each[i] for i in range(width - 1)) + lam ** (width - 1) * each[-1]
    assert_close(gae(rewards, values, mask, gamma=gamma, gae_lambda=lam), mean)


@given(ragged(1), unit)
def test_the_whole_return_is_the_first_token_s_return_to_go(columns, gamma):
    rewards, mask = pad(columns[0]), mask_of(columns[0])
    bootstrap = torch.linspace(-1, 1, len(mask), dtype=torch.float64)
    known = {"gamma": gamma, "bootstrap": bootstrap}
    assert torch.equal(whole_return(rewards, mask, **known), monte_carlo(rewards, mask, **known)[:, 0])
    expected = [
        sum(gamma**i * r for i, r in enumerate(row)) + gamma ** len(row) * cut
        for row, cut in zip(columns[0], bootstrap.tolist(), strict=True)
    ]
    assert_close(whole_return(rewards, mask, **known), expected)


def test_a_batch_of_512_responses_of_2048_tokens_takes_a_fraction_of_a_second():
    """Processor time, the best of three: a busy machine must not fail it."""
    rewards, values = torch.rand(2, 512, 2048, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(2048)[None] < torch.arange(4, 2052, 4)[:, None]
    for function in (
        lambda: gae(rewards, values, mask, gamma=1.0, gae_lambda=0.95),
        lambda: monte_carlo(rewards, mask, gamma=0.99),
    ):
        seconds = []
        for _ in range(3):
            began = time.process_time()
            function()
            seconds.append(time.process_time() - began)
        assert min(seconds) < 0.2


def test_float32_stays_within_tolerance_of_the_oracle():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.rand(2, 4, 32, generator=generator) - 0.5
    expected = [oracle.gae(r, v, 1.0, 0.9) for r, v in zip(rewards.tolist(), values.tolist(), strict=True)]
    assert_close(gae(rewards, values, torch.ones(4, 32, dtype=torch.bool), gamma=1.0, gae_lambda=0.9), expected)


@given(ragged(2), unit, unit)
def test_trap_3_padding_order_and_neighbours_change_nothing(columns, gamma, lam):
    assert_rows_are_independent(lambda t, mask: td_residuals(t[0], t[1], mask, gamma=gamma), columns)
    assert_rows_are_independent(lambda t, mask: gae(t[0], t[1], mask, gamma=gamma, gae_lambda=lam), columns)
    assert_rows_are_independent(lambda t, mask: lambda_returns(t[0], t[1], mask), columns)
    assert_rows_are_independent(lambda t, mask: monte_carlo(t[0], mask, gamma=gamma), columns)
    for k in (1, 2, 5, 9):
        assert_rows_are_independent(lambda t, mask, k=k: k_step_returns(*t, mask, k=k, gamma=gamma), columns)
        assert_rows_are_independent(lambda t, mask, k=k: k_step_advantages(*t, mask, k=k, gamma=gamma), columns)


@given(ragged(2), steps, unit)
def test_trap_5_padding_leaks_into_no_gradient(columns, k, gamma):
    for function in (k_step_returns, k_step_advantages):

        def total(t, mask, function=function):
            return function(*t, mask, k=k, gamma=gamma).square().sum()

        assert_only_counted_tokens_matter(total, columns)
    assert_only_counted_tokens_matter(lambda t, mask: whole_return(t[0], mask, gamma=gamma).square().sum(), columns[:1])


@pytest.mark.parametrize("bad", [-0.1, 1.1, NAN])
def test_discounts_outside_the_unit_interval(bad):
    assert_refused("gamma", td_residuals, REWARDS, VALUES, MASK, gamma=bad)
    assert_refused("gamma", monte_carlo, REWARDS, MASK, gamma=bad)
    assert_refused("gamma", whole_return, REWARDS, MASK, gamma=bad)
    for k in (1, 9):
        assert_refused("gamma", k_step_returns, REWARDS, VALUES, MASK, k=k, gamma=bad)
        assert_refused("gamma", k_step_advantages, REWARDS, VALUES, MASK, k=k, gamma=bad)
    assert_refused("gae_lambda", gae, REWARDS, VALUES, MASK, gamma=1.0, gae_lambda=bad)


@pytest.mark.parametrize("bad", [0, -1, 1.0, True, "2"])
def test_k_must_be_a_positive_integer(bad):
    assert_refused("k", k_step_returns, REWARDS, VALUES, MASK, k=bad, gamma=1.0)
    assert_refused("k", k_step_advantages, REWARDS, VALUES, MASK, k=bad, gamma=1.0)


def test_wrong_shapes():
    for k in (1, 9):
        for function in (k_step_returns, k_step_advantages):
            assert_refused("rewards", function, REWARDS[:1], VALUES, MASK, k=k, gamma=1.0)
            assert_refused("values", function, REWARDS, VALUES[:, :2], MASK, k=k, gamma=1.0)
            assert_refused("bootstrap", function, REWARDS, VALUES, MASK, k=k, gamma=1.0, bootstrap=torch.zeros(1))
            assert_refused("mask", function, REWARDS, VALUES, MASK.long(), k=k, gamma=1.0)
    assert_refused("rewards", whole_return, REWARDS[:1], MASK, gamma=1.0)
    assert_refused("bootstrap", whole_return, REWARDS, MASK, gamma=1.0, bootstrap=torch.zeros(1))
    assert_refused("values", gae, REWARDS, VALUES[:, :2], MASK, gamma=1.0, gae_lambda=1.0)
    assert_refused("rewards", monte_carlo, REWARDS[:1], MASK, gamma=1.0)
    assert_refused("bootstrap", td_residuals, REWARDS, VALUES, MASK, gamma=1.0, bootstrap=torch.zeros(2, 1))
    assert_refused("bootstrap", monte_carlo, REWARDS, MASK, gamma=1.0, bootstrap=torch.zeros(1))
    assert_refused("advantages", lambda_returns, REWARDS[:1], VALUES, MASK)
    assert_refused("mask", last_token, MASK[0])
    assert_refused("mask", td_residuals, REWARDS, VALUES, MASK.long(), gamma=1.0)
