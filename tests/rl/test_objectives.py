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
    assert_dummy_row_is_free,
    assert_microbatches_add_up,
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


def test_dual_clip_by_hand():
    # A < 0: ratio 1.5 is within c = 3, ratio 5 is not: max(5 * -2, 3 * -2) = -6, without gradient.
    # A > 0: no dual clip; min(5 * 2, 1.2 * 2) = 2.4 is the ordinary one.
    old = torch.zeros(1, 3)
    new = torch.tensor([[1.5, 5.0, 5.0]]).log().requires_grad_()
    advantages, mask = torch.tensor([[-1.0, -2.0, 2.0]]), torch.ones(1, 3, dtype=torch.bool)
    loss = clipped_policy_loss(new, old, advantages, mask, clip_ratio=0.2, denom=10, dual_clip=3.0)
    assert_close(loss, -(-1.5 - 6.0 + 2.4) / 10)
    loss.backward()
    assert_close(new.grad, [[1.5 / 10, 0.0, 0.0]])


@given(ragged(3), clip)
def test_an_infinite_dual_clip_is_the_plain_clip(columns, epsilon):
    tensors, mask = [pad(c).requires_grad_() for c in columns], mask_of(columns[0])
    plain = clipped_policy_loss(*tensors, mask, clip_ratio=epsilon, denom=3)
    # e^4, the largest ratio here, is below 100.
    for beyond in (100.0, math.inf):
        dual = clipped_policy_loss(*tensors, mask, clip_ratio=epsilon, denom=3, dual_clip=beyond)
        assert torch.equal(dual, plain)
        assert torch.equal(*(torch.autograd.grad(x, tensors[0], retain_graph=True)[0] for x in (dual, plain)))


@given(ragged(3), clip, st.floats(1.01, 5.0))
def test_the_dual_clip_agrees_with_a_scalar_loop(columns, epsilon, c):
    expected = 0.0
    for new, old, advantage in zip(*map(flat, columns), strict=True):
        ratio = math.exp(new - old)
        surrogate = min(ratio * advantage, min(max(ratio, 1 - epsilon), 1 + epsilon) * advantage)
        expected -= max(surrogate, c * advantage) if advantage < 0 else surrogate
    tensors = [pad(rows) for rows in columns]
    loss = clipped_policy_loss(*tensors, mask_of(columns[0]), clip_ratio=epsilon, denom=1, dual_clip=c)
    assert_close(loss, expected)


def test_weights_multiply_each_token():
    # The terms of test_policy_loss_by_hand, weighted 0.5, 2 and 0.
    weights = torch.tensor([[0.5, 2.0], [0.0, NAN]])
    loss = clipped_policy_loss(NEW, OLD, ADVANTAGES, MASK, clip_ratio=0.2, denom=10, weights=weights)
    assert_close(loss, -(0.5 * 2.4 + 2.0 * 1.5 + 0.0) / 10)


@given(ragged(3), clip)
def test_weights_of_1_change_nothing(columns, epsilon):
    tensors, mask = [pad(c) for c in columns], mask_of(columns[0])
    plain = clipped_policy_loss(*tensors, mask, clip_ratio=epsilon, denom=3)
    weighted = clipped_policy_loss(*tensors, mask, clip_ratio=epsilon, denom=3, weights=torch.ones_like(tensors[0]))
    assert torch.equal(weighted, plain)


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


def test_trap_18_the_entropy_clip_can_bind():
    # Rows sum to 3 and 0.5 nats: at delta 2 the first is cut off, and its gradient with it.
    entropy = torch.tensor([[1.0, 2.0], [0.5, NAN]], requires_grad=True)
    bonus = entropy_bonus(entropy, MASK, denom=10, clip=2.0)
    assert_close(bonus, (2.0 + 0.5) / 10)
    bonus.backward()
    assert_close(entropy.grad, [[0.0, 0.0], [1 / 10, 0.0]])


@given(ragged(1, 0.0, 5.0))
def test_an_entropy_clip_beyond_every_response_is_no_clip(columns):
    entropy, mask = pad(columns[0]), mask_of(columns[0])
    for clip in (31.0, math.inf):
        assert torch.equal(entropy_bonus(entropy, mask, denom=3, clip=clip), entropy_bonus(entropy, mask, denom=3))


OBJECTIVES = {
    "policy": (3, lambda t, m: clipped_policy_loss(*t, m, clip_ratio=0.2, denom=4)),
    "value": (3, lambda t, m: value_loss(*t, m, value_clip=0.2, denom=4)),
    "value_plain": (3, lambda t, m: value_loss(*t, m, value_clip=None, denom=4)),
    "nll": (1, lambda t, m: nll_loss(t[0], m, denom=4)),
    "policy_dual": (3, lambda t, m: clipped_policy_loss(*t, m, clip_ratio=0.2, denom=4, dual_clip=1.5)),
    "policy_weighted": (4, lambda t, m: clipped_policy_loss(*t[:3], m, clip_ratio=0.2, denom=4, weights=t[3])),
    "entropy": (1, lambda t, m: entropy_bonus(t[0], m, denom=4)),
    "entropy_clipped": (1, lambda t, m: entropy_bonus(t[0], m, denom=4, clip=0.7)),
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
    assert_microbatches_add_up(loss, data.draw(ragged(inputs)))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_dummy_row_has_no_loss_and_no_gradient(name):
    inputs, loss = OBJECTIVES[name]
    assert_dummy_row_is_free(loss, inputs)


@pytest.mark.parametrize("name", ["policy", "policy_weighted", "value"])
def test_only_the_first_argument_is_differentiated(name):
    inputs, loss = OBJECTIVES[name]
    tensors = [torch.rand(2, 2, requires_grad=True) for _ in range(inputs)]
    loss(tensors, MASK).backward()
    assert [t.grad is not None for t in tensors] == [True] + [False] * (inputs - 1)


def test_trap_28_ratio_statistics_by_hand():
    found = ratio_statistics(NEW, OLD, MASK, clip_ratio=0.2)
    # |ratio - 1| > 0.2 for 1.5 and 0.5, not for 1.1.
    assert_close(found["clip_fraction"], 2.0)
    assert_close(found["approx_kl"], sum(r - 1 - math.log(r) for r in (1.5, 0.5, 1.1)))
    assert_close(found["ratio_max"], 1.5)
    assert_close(found["tokens"], 3.0)
    # Where every ratio is below 1, padding (ratio 1, as both sides are 0 there) must not be the largest.
    assert_close(ratio_statistics(OLD + math.log(0.5), OLD, MASK, clip_ratio=0.2)["ratio_max"], 0.5)
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
    assert_refused("clip", entropy_bonus, x, MASK, denom=1, clip=bad)
    assert_refused("dual_clip", clipped_policy_loss, x, x, x, MASK, clip_ratio=0.2, denom=1, dual_clip=bad)
    assert_refused("clip_ratio", ratio_statistics, x, x, MASK, clip_ratio=bad)


def test_a_dual_clip_of_1_would_forget_the_ordinary_clip():
    assert_refused("dual_clip", clipped_policy_loss, OLD, OLD, OLD, MASK, clip_ratio=0.2, denom=1, dual_clip=1.0)


def test_wrong_shapes():
    x, thin = OLD, OLD[:, :1]
    assert_refused("logprobs", clipped_policy_loss, thin, x, x, MASK, clip_ratio=0.2, denom=1)
    assert_refused("old_logprobs", clipped_policy_loss, x, thin, x, MASK, clip_ratio=0.2, denom=1)
    assert_refused("advantages", clipped_policy_loss, x, x, thin, MASK, clip_ratio=0.2, denom=1)
    assert_refused("weights", clipped_policy_loss, x, x, x, MASK, clip_ratio=0.2, denom=1, weights=thin)
    assert_refused("values", value_loss, thin, x, x, MASK, value_clip=None, denom=1)
    assert_refused("old_values", value_loss, x, thin, x, MASK, value_clip=None, denom=1)
    assert_refused("returns", value_loss, x, x, thin, MASK, value_clip=None, denom=1)
    assert_refused("logprobs", nll_loss, thin, MASK, denom=1)
    assert_refused("entropy", entropy_bonus, thin, MASK, denom=1)
    assert_refused("old_logprobs", ratio_statistics, x, thin, MASK, clip_ratio=0.2)
    assert_refused("returns", explained_variance, x, thin, MASK)
    assert_refused("mask", nll_loss, x, MASK.float(), denom=1)
