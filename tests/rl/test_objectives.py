from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from ppomax.rl.masked import zero_masked
from ppomax.rl.objectives import (
    clipped_policy_loss,
    entropy_bonus,
    explained_variance,
    nll_loss,
    ratio_statistics,
    value_loss,
)

from . import oracle
from .batches import (
    NAN,
    assert_close,
    assert_only_counted_tokens_matter,
    assert_refused,
    mask_of,
    pad,
    ragged,
)

MASK = torch.tensor([[True, True], [True, False]])
# Ratios 1.5, 0.5 and 1.1.
OLD = torch.tensor([[-1.0, -2.0], [-0.5, NAN]])
NEW = OLD + torch.tensor([[math.log(1.5), math.log(0.5)], [math.log(1.1), 0.0]])
ADVANTAGES = torch.tensor([[2.0, 3.0], [-1.0, NAN]])

clip = st.floats(0.05, 1.0, allow_nan=False)


def flat(rows):
    return [x for row in rows for x in row]


def test_policy_loss_by_hand():
    # eps 0.2: min(3, 1.2 * 2) = 2.4; min(0.5 * 3, 0.8 * 3) = 1.5; min(-1.1, -1.1) = -1.1.
    loss = clipped_policy_loss(NEW, OLD, ADVANTAGES, MASK, clip_ratio=0.2, denom=10)
    assert_close(loss, -(2.4 + 1.5 - 1.1) / 10)


def test_trap_17_policy_clip_takes_the_min():
    """Ratio 1.5 with A < 0, and 0.5 with A > 0, are on the side that must not be clipped: the gradient stays."""
    new = NEW.clone().requires_grad_()
    advantages = torch.tensor([[-2.0, 3.0], [0.0, NAN]])
    loss = clipped_policy_loss(new, OLD, advantages, MASK, clip_ratio=0.2, denom=1)
    assert_close(loss, -(1.5 * -2.0 + 0.5 * 3.0))
    loss.backward()
    assert_close(new.grad, [[1.5 * 2.0, -0.5 * 3.0], [0.0, 0.0]])
    # On the other sides the clip acts and the gradient is gone.
    new.grad = None
    clipped_policy_loss(new, OLD, -advantages, MASK, clip_ratio=0.2, denom=1).backward()
    assert torch.equal(new.grad, torch.zeros(2, 2))


def test_trap_7_at_ratio_1_the_gradient_is_the_plain_policy_gradient():
    new = OLD.clone().requires_grad_()
    clipped_policy_loss(new, OLD, ADVANTAGES, MASK, clip_ratio=0.2, denom=3).backward()
    assert_close(new.grad, [[-2.0 / 3, -3.0 / 3], [1.0 / 3, 0.0]])


@given(ragged(3), clip)
def test_policy_loss_agrees_with_the_oracle(columns, epsilon):
    new, old, advantages = columns
    rows = zip(new, old, advantages, strict=True)
    expected = sum(sum(oracle.clipped_policy_loss(n, o, a, epsilon)) for n, o, a in rows) / 7
    tensors = [pad(c) for c in columns]
    assert_close(clipped_policy_loss(*tensors, mask_of(new), clip_ratio=epsilon, denom=7), expected)


@given(ragged(3))
def test_a_huge_clip_is_the_plain_ratio(columns):
    new, old, advantages = (pad(c, fill=0.0) for c in columns)
    for huge in (1e6, math.inf):
        loss = clipped_policy_loss(new, old, advantages, mask_of(columns[0]), clip_ratio=huge, denom=1)
        assert_close(loss, -((new - old).exp() * advantages).sum())


def test_value_loss_by_hand_has_no_half():
    values, old = torch.tensor([[3.0, 0.0], [1.0, NAN]]), torch.tensor([[1.0, 0.0], [1.1, NAN]])
    returns = torch.tensor([[1.5, 2.0], [1.0, NAN]])
    plain = value_loss(values, old, returns, MASK, value_clip=None, denom=4)
    assert_close(plain, (1.5**2 + 2.0**2 + 0.0) / 4)


def test_trap_17_value_clip_takes_the_max():
    # V moved past the return: unclipped error 1.5^2 beats the clipped (1.2 - 1.5)^2.
    # V moved to the return: clipped error (0.2 - 2)^2 beats the unclipped 0, and carries no gradient.
    values = torch.tensor([[3.0, 2.0]], requires_grad=True)
    old, returns = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.5, 2.0]])
    loss = value_loss(values, old, returns, torch.ones(1, 2, dtype=torch.bool), value_clip=0.2, denom=2)
    assert_close(loss, (1.5**2 + 1.8**2) / 2)
    loss.backward()
    assert_close(values.grad, [[2 * 1.5 / 2, 0.0]])


@given(ragged(3), clip | st.none())
def test_value_loss_agrees_with_the_oracle(columns, value_clip):
    rows = zip(*columns, strict=True)
    expected = sum(sum(oracle.value_loss(v, o, g, value_clip)) for v, o, g in rows) / 5
    tensors = [pad(c) for c in columns]
    assert_close(value_loss(*tensors, mask_of(columns[0]), value_clip=value_clip, denom=5), expected)


@given(ragged(3))
def test_a_huge_value_clip_is_the_plain_error(columns):
    tensors, mask = [pad(c) for c in columns], mask_of(columns[0])
    plain = value_loss(*tensors, mask, value_clip=None, denom=3)
    assert_close(value_loss(*tensors, mask, value_clip=1e6, denom=3), plain)


def test_nll_and_entropy_by_hand():
    assert_close(nll_loss(OLD, MASK, denom=3), (1.0 + 2.0 + 0.5) / 3)
    assert_close(entropy_bonus(-OLD, MASK, denom=7), (1.0 + 2.0 + 0.5) / 7)


OBJECTIVES = {
    "policy": (3, lambda t, m: clipped_policy_loss(*t, m, clip_ratio=0.2, denom=4)),
    "value": (3, lambda t, m: value_loss(*t, m, value_clip=0.2, denom=4)),
    "value_plain": (3, lambda t, m: value_loss(*t, m, value_clip=None, denom=4)),
    "nll": (1, lambda t, m: nll_loss(t[0], m, denom=4)),
    "entropy": (1, lambda t, m: entropy_bonus(t[0], m, denom=4)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@given(data=st.data())
def test_traps_3_and_5_padding_changes_neither_loss_nor_gradient(name, data):
    inputs, loss = OBJECTIVES[name]
    assert_only_counted_tokens_matter(loss, data.draw(ragged(inputs)))


@pytest.mark.parametrize("name", OBJECTIVES)
@given(data=st.data())
def test_trap_19_microbatches_add_up_to_the_minibatch(name, data):
    inputs, loss = OBJECTIVES[name]
    columns = data.draw(ragged(inputs))
    tensors, mask = [pad(c).requires_grad_() for c in columns], mask_of(columns[0])
    whole = loss(tensors, mask)
    parts = sum(loss([t[i : i + 1] for t in tensors], mask[i : i + 1]) for i in range(len(mask)))
    assert_close(parts, whole.detach())
    gradients = [torch.autograd.grad(value, tensors[0])[0] for value in (whole, parts)]
    assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_dummy_row_has_no_loss_and_no_gradient(name):
    """Ranks with fewer microbatches run on rows in which nothing counts."""
    inputs, loss = OBJECTIVES[name]
    tensors = [torch.full((1, 2), NAN, requires_grad=True) for _ in range(inputs)]
    value = loss(tensors, torch.zeros(1, 2, dtype=torch.bool))
    value.backward()
    assert value == 0
    assert torch.equal(tensors[0].grad, torch.zeros(1, 2))


@pytest.mark.parametrize("name", ["policy", "value"])
def test_only_the_first_argument_is_differentiated(name):
    inputs, loss = OBJECTIVES[name]
    tensors = [torch.rand(2, 2, requires_grad=True) for _ in range(inputs)]
    loss(tensors, MASK).backward()
    assert [t.grad is not None for t in tensors] == [True, False, False]


def test_trap_28_ratio_statistics_by_hand():
    found = ratio_statistics(NEW, OLD, MASK, clip_ratio=0.2)
    # |ratio - 1| > 0.2 for 1.5 and 0.5, not for 1.1.
    assert_close(found["clip_fraction"], 2.0)
    assert_close(found["approx_kl"], sum(r - 1 - math.log(r) for r in (1.5, 0.5, 1.1)))
    assert_close(found["ratio_max"], 1.5)
    assert_close(found["tokens"], 3.0)
    assert not any(
        value.requires_grad for value in ratio_statistics(NEW.requires_grad_(), OLD, MASK, clip_ratio=1).values()
    )


@given(ragged(2), clip)
def test_trap_28_ratio_statistics_count_tokens_only_and_aggregate(columns, clip_ratio):
    new, old = columns
    mask = mask_of(new, 9)
    whole = ratio_statistics(pad(new, 9), pad(old, 9), mask, clip_ratio=clip_ratio)
    rows = [
        ratio_statistics(pad([n]), pad([o]), mask_of([n]), clip_ratio=clip_ratio) for n, o in zip(new, old, strict=True)
    ]
    for key in ("clip_fraction", "approx_kl", "tokens"):
        assert_close(whole[key], sum(row[key] for row in rows))
    assert_close(whole["ratio_max"], max(row["ratio_max"] for row in rows))
    ratios = [math.exp(n - o) for n, o in zip(flat(new), flat(old), strict=True)]
    assert_close(whole["ratio_max"], max(ratios))
    assert_close(whole["approx_kl"], sum(oracle.k3(o, n) for n, o in zip(flat(new), flat(old), strict=True)))


def test_ratio_statistics_where_nothing_counts():
    found = ratio_statistics(NEW, OLD, torch.zeros_like(MASK), clip_ratio=0.2)
    assert {key: value.item() for key, value in found.items()} == dict.fromkeys(found, 0.0)


def test_explained_variance_by_hand():
    returns = torch.tensor([[1.0, 2.0], [6.0, NAN]])
    # Errors 0, 0, 3: mean 1, variance (1 + 1 + 4) / 3 = 2; returns: variance 14/3.
    values = torch.tensor([[1.0, 2.0], [3.0, NAN]])
    assert_close(explained_variance(values, returns, MASK), 1 - 2 / (14 / 3))
    assert_close(explained_variance(returns, returns, MASK), 1.0)
    assert_close(explained_variance(torch.full((2, 2), 5.0), returns, MASK), 0.0)


@pytest.mark.parametrize("constant", [0.0, 0.1, -1.3, 1e4])
def test_explained_variance_of_constant_returns_is_zero(constant):
    # The mean of 0.1 in float32 is not 0.1 at most of these lengths: rounding must not pass for variance.
    for length in range(1, 40):
        values, returns = torch.linspace(-1, 1, length)[None], torch.full((1, length), constant)
        assert explained_variance(values, returns, torch.ones(1, length, dtype=torch.bool)) == 0
    nearly = torch.tensor([[0.1, 0.1, math.nextafter(0.1, 1)]], dtype=torch.float64)
    assert explained_variance(torch.rand(1, 3, dtype=torch.float64), nearly, torch.ones(1, 3, dtype=torch.bool)) == 0


@given(ragged(2))
def test_trap_28_explained_variance_agrees_with_the_oracle_whatever_the_padding(columns):
    values, returns = columns
    assume(max(flat(returns)) - min(flat(returns)) > 0.1)
    expected = oracle.explained_variance(flat(values), flat(returns))
    for width, fill in ((6, NAN), (9, 1e9)):
        assert_close(
            explained_variance(pad(values, width, fill), pad(returns, width, fill), mask_of(values, width)), expected
        )


@pytest.mark.parametrize("bad", [0, -1.0, NAN])
def test_wrong_numbers(bad):
    x = zero_masked(OLD, MASK)
    assert_refused("denom", clipped_policy_loss, x, x, x, MASK, clip_ratio=0.2, denom=bad)
    assert_refused("clip_ratio", clipped_policy_loss, x, x, x, MASK, clip_ratio=bad, denom=1)
    assert_refused("denom", value_loss, x, x, x, MASK, value_clip=None, denom=bad)
    assert_refused("value_clip", value_loss, x, x, x, MASK, value_clip=bad, denom=1)
    assert_refused("denom", nll_loss, x, MASK, denom=bad)
    assert_refused("denom", entropy_bonus, x, MASK, denom=bad)
    assert_refused("clip_ratio", ratio_statistics, x, x, MASK, clip_ratio=bad)


def test_wrong_shapes():
    x, thin = OLD, OLD[:, :1]
    assert_refused("logprobs", clipped_policy_loss, thin, x, x, MASK, clip_ratio=0.2, denom=1)
    assert_refused("old_logprobs", clipped_policy_loss, x, thin, x, MASK, clip_ratio=0.2, denom=1)
    assert_refused("advantages", clipped_policy_loss, x, x, thin, MASK, clip_ratio=0.2, denom=1)
    assert_refused("values", value_loss, thin, x, x, MASK, value_clip=None, denom=1)
    assert_refused("old_values", value_loss, x, thin, x, MASK, value_clip=None, denom=1)
    assert_refused("returns", value_loss, x, x, thin, MASK, value_clip=None, denom=1)
    assert_refused("logprobs", nll_loss, thin, MASK, denom=1)
    assert_refused("entropy", entropy_bonus, thin, MASK, denom=1)
    assert_refused("old_logprobs", ratio_statistics, x, thin, MASK, clip_ratio=0.2)
    assert_refused("returns", explained_variance, x, thin, MASK)
    assert_refused("mask", nll_loss, x, MASK.float(), denom=1)
