from __future__ import annotations

import math

import torch
from hypothesis import given

from ppomax.rl.masked import masked_mean, masked_sum, whiten, zero_masked

from . import oracle
from .batches import NAN, assert_close, assert_only_counted_tokens_matter, assert_refused, mask_of, pad, ragged

X = torch.tensor([[1.0, 2.0, NAN], [6.0, math.inf, NAN]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_sum_and_mean_by_hand():
    assert_close(masked_sum(X, MASK), 1.0 + 2.0 + 6.0)
    assert_close(masked_mean(X, MASK), (1.0 + 2.0 + 6.0) / 3)


def test_trap_5_nan_under_the_mask_leaks_neither_forward_nor_backward():
    x = X.clone().requires_grad_()
    masked_mean(x.exp(), MASK).backward()
    assert torch.isfinite(masked_mean(x, MASK))
    assert x.grad is not None
    assert torch.isnan(x.grad[~MASK]).any(), "0 * exp(inf): masking after a non-linear function is too late"
    x.grad = None
    masked_mean(zero_masked(x, MASK).exp(), MASK).backward()
    assert torch.equal(x.grad[~MASK], torch.zeros(3))
    assert_close(x.grad[MASK], [math.exp(1) / 3, math.exp(2) / 3, math.exp(6) / 3])


def test_nothing_counted_is_zero():
    nothing = torch.zeros_like(MASK)
    assert masked_sum(X, nothing) == 0
    assert masked_mean(X, nothing) == 0
    assert torch.equal(whiten(X, nothing, eps=1e-8), torch.zeros_like(X))


def test_trap_4_whiten_by_hand_with_biased_variance():
    # Counted 1, 2, 6: mean 3, variance (4 + 1 + 9) / 3 = 14/3 (unbiased would be 7).
    s = math.sqrt(14 / 3)
    assert_close(whiten(X, MASK, eps=1e-12), [[-2 / s, -1 / s, 0.0], [3 / s, 0.0, 0.0]])


@given(ragged(1, -100, 100))
def test_whiten_agrees_with_the_oracle(columns):
    (rows,) = columns
    flat = oracle.whiten([x for row in rows for x in row], 1e-4)
    mask = mask_of(rows)
    assert_close(whiten(pad(rows), mask, eps=1e-4)[mask], flat)


def test_whiten_of_a_constant_is_zero_with_a_finite_gradient():
    x = torch.full((2, 3), 7.0, requires_grad=True)
    out = whiten(x, MASK, eps=1e-8)
    out[0, 0].backward()
    assert torch.equal(out, torch.zeros(2, 3))
    assert x.grad is not None and torch.isfinite(x.grad).all()


@given(ragged(2))
def test_trap_3_padding_and_order_change_nothing(columns):
    def whitened(t, mask):
        return masked_sum(whiten(t[0], mask, eps=0.1) * zero_masked(t[1], mask), mask)

    assert_only_counted_tokens_matter(lambda t, mask: masked_sum(t[0], mask), columns[:1])
    assert_only_counted_tokens_matter(lambda t, mask: masked_mean(t[0], mask), columns[:1])
    assert_only_counted_tokens_matter(whitened, columns)


def test_wrong_arguments():
    for function in (masked_sum, masked_mean, zero_masked):
        assert_refused("x", function, X[:, :2], MASK)
        assert_refused("mask", function, X, MASK.float())
    assert_refused("eps", whiten, X, MASK, eps=0.0)
