from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppomax.rl.kl import adaptive_coefficient, full_kl, k1, k2, k3, penalty_coefficient

from . import oracle
from .batches import NAN, assert_close, assert_refused

LOGITS = torch.tensor([0.3, -1.2, 2.0, 0.1], dtype=torch.float64)
REFERENCE = torch.log_softmax(torch.tensor([1.0, 0.4, 0.2, -0.5], dtype=torch.float64), dim=0)

logprob = st.floats(-12.0, 0.0, width=32)
logits = st.lists(st.floats(-8.0, 8.0, width=32), min_size=4, max_size=4)


def test_by_hand():
    # pi = 1/2, ref = 1/4: d = ln 2.
    pi, ref = torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log()
    assert_close(k1(pi, ref), [[math.log(2)]])
    assert_close(k2(pi, ref), [[math.log(2) ** 2 / 2]])
    assert_close(k3(pi, ref), [[0.5 - 1 + math.log(2)]])


@given(logprob, logprob)
def test_agrees_with_the_oracle(pi, ref):
    a, b = torch.tensor([[pi]], dtype=torch.float64), torch.tensor([[ref]], dtype=torch.float64)
    for ours, theirs in ((k1, oracle.k1), (k2, oracle.k2), (k3, oracle.k3)):
        assert_close(ours(a, b), [[theirs(pi, ref)]])


def test_trap_14_k1_and_k3_agree_with_the_full_vocabulary_in_expectation():
    """The expectation is exact: every token of the vocabulary, weighted by its probability."""
    logprobs = torch.log_softmax(LOGITS, dim=0)
    exact = torch.nn.functional.kl_div(REFERENCE, logprobs, reduction="sum", log_target=True)
    for estimator in (k1, k3):
        assert_close((logprobs.exp() * estimator(logprobs, REFERENCE)).sum(), exact)


def test_trap_14_k2_agrees_up_to_third_order():
    step = torch.tensor([0.01, -0.02, 0.015, 0.0], dtype=torch.float64)
    logprobs = torch.log_softmax(REFERENCE + step, dim=0)
    exact = (logprobs.exp() * k1(logprobs, REFERENCE)).sum()
    estimate = (logprobs.exp() * k2(logprobs, REFERENCE)).sum()
    assert abs(estimate - exact) < 0.03 * exact


@given(logprob, st.floats(-(2**-7), 2**-7, width=32) | st.floats(-12.0, 12.0, width=32))
def test_trap_14_k3_is_never_negative_in_float32(pi, difference):
    a = torch.tensor([[pi]], dtype=torch.float32)
    assert k3(a, a + difference).item() >= 0


def gradient_under_pi(estimator) -> torch.Tensor:
    """Expected gradient of the estimator as a loss on tokens that pi sampled; the sampling is not differentiated."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = torch.log_softmax(logits, dim=0)
    (logprobs.detach().exp() * estimator(logprobs, REFERENCE)).sum().backward()
    assert logits.grad is not None
    return logits.grad


def exact_gradient(kl) -> torch.Tensor:
    logits = LOGITS.clone().requires_grad_()
    kl(torch.log_softmax(logits, dim=0)).backward()
    assert logits.grad is not None
    return logits.grad


def test_trap_14_gradients_are_those_claimed():
    reverse = exact_gradient(lambda p: (p.exp() * (p - REFERENCE)).sum())
    forward = exact_gradient(lambda p: (REFERENCE.exp() * (REFERENCE - p)).sum())
    assert_close(gradient_under_pi(k1), torch.zeros(4))
    assert_close(gradient_under_pi(k2), reverse)
    assert_close(gradient_under_pi(k3), forward)
    assert (reverse - forward).abs().max() > 0.1, "the two directions must differ for this test to tell them apart"


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_wrong_shapes(estimator):
    assert_refused("reference_logprobs", estimator, torch.zeros(2, 3), torch.zeros(3))


def test_full_kl_by_hand():
    # p = (1/2, 1/2), q = (1/4, 3/4): 1/2 ln 2 + 1/2 ln(2/3).
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert_close(full_kl(p, q), [0.5 * math.log(2) + 0.5 * math.log(2 / 3)])
    assert_close(full_kl(q, p), [0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)])


@given(logits, logits, st.floats(-50, 50, width=32))
def test_full_kl_is_the_enumeration_over_the_vocabulary(p, q, shift):
    exact = 0.0
    for a, b in zip(p, q, strict=True):
        log_p = a - math.log(sum(map(math.exp, p)))
        exact += math.exp(log_p) * (log_p - (b - math.log(sum(map(math.exp, q)))))
    x, y = torch.tensor([p], dtype=torch.float64), torch.tensor([q], dtype=torch.float64)
    assert_close(full_kl(x, y), [exact])
    assert_close(full_kl(x + shift, y), [exact])
    assert_close(full_kl(x.flip(-1), y.flip(-1)), [exact])
    assert_close(full_kl(x, x), [0.0])
    assert full_kl(x.float(), y.float()).item() >= -1e-6


def test_full_kl_keeps_the_leading_axes_and_raises_the_precision():
    p, q = torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    kl = full_kl(p, q)
    assert kl.shape == (2, 3)
    assert kl.dtype == torch.float32
    assert_close(kl, full_kl(p.double(), q.double()))
    assert full_kl(p, q.double()).dtype == torch.float64


@given(logits, logits)
def test_trap_14_the_gradient_of_full_kl_is_the_enumerated_one(p, q):
    x, y = (torch.tensor(numbers, dtype=torch.float64, requires_grad=True) for numbers in (p, q))
    kl = full_kl(x, y)
    kl.backward()
    log_p, log_q = torch.log_softmax(x.detach(), dim=0), torch.log_softmax(y.detach(), dim=0)
    # d KL / d logits_q = q - p;  d KL / d logits_p = p * (log p - log q - KL).
    assert_close(y.grad, log_q.exp() - log_p.exp())
    assert_close(x.grad, log_p.exp() * (log_p - log_q - kl.detach()))


def test_full_kl_of_tokens_that_are_ruled_out():
    # Both rule out the last token: 1/2 ln 2 + 1/2 ln(2/3) again, with finite gradients.
    p = torch.tensor([0.5, 0.5, 0.0]).log().requires_grad_()
    q = torch.tensor([0.25, 0.75, 0.0]).log().requires_grad_()
    kl = full_kl(p, q)
    assert_close(kl, 0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    kl.backward()
    for leaf in (p, q):
        assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad[2] == 0
    # Only p rules out the last token: it adds 0. The other way round nothing bounds the KL.
    wide = torch.tensor([0.25, 0.25, 0.5]).log()
    assert_close(full_kl(p, wide), math.log(2))
    assert full_kl(wide, p) == math.inf


def test_adaptive_coefficient_by_hand():
    known = {"target": 6.0, "horizon": 10_000, "samples": 256}
    # 6.6 / 6 - 1 = 0.1; 60 and 0 are clipped to +-0.2.
    assert adaptive_coefficient(0.2, 6.6, **known) == pytest.approx(0.2 * (1 + 0.1 * 0.0256), rel=1e-12)
    assert adaptive_coefficient(0.2, 60.0, **known) == pytest.approx(0.2 * (1 + 0.2 * 0.0256), rel=1e-12)
    assert adaptive_coefficient(0.2, 0.0, **known) == pytest.approx(0.2 * (1 - 0.2 * 0.0256), rel=1e-12)
    assert adaptive_coefficient(0.2, -1.0, **known) == adaptive_coefficient(0.2, 0.0, **known)


@given(st.floats(0.0, 10.0), st.floats(-10.0, 10.0), st.floats(0.01, 10.0), st.floats(0.0, 4.9))
def test_adaptive_coefficient_moves_towards_the_target_and_stays_positive(c, observed, target, share):
    moved = adaptive_coefficient(c, observed, target=target, horizon=100.0, samples=100.0 * share)
    assert (moved - c) * (observed - target) >= 0
    assert moved >= 0.01 * c
    assert adaptive_coefficient(c, target, target=target, horizon=100.0, samples=100.0 * share) == c
    assert adaptive_coefficient(c, observed, target=target, horizon=100.0, samples=0) == c


def test_penalty_coefficient_by_hand():
    # The range of target 0.03 is 0.02 to 0.045.
    for observed, expected in ((0.0199, 0.5), (0.0201, 1.0), (0.0449, 1.0), (0.0451, 2.0), (-1.0, 0.5)):
        assert penalty_coefficient(1.0, observed, target=0.03) == expected


@given(st.floats(2**-20, 10.0), st.floats(2**-20, 1.0), st.floats(2**-20, 1.0), st.sampled_from([0.25, 4.0]))
def test_penalty_coefficient_depends_on_the_ratio_to_the_target_only(c, observed, target, scale):
    moved = penalty_coefficient(c, observed, target=target)
    assert moved in (c / 2, c, 2 * c)
    assert penalty_coefficient(scale * c, scale * observed, target=scale * target) == scale * moved
    assert penalty_coefficient(c, target, target=target) == c


def test_full_kl_refuses_to_broadcast():
    assert_refused("logits_q", full_kl, torch.zeros(2, 3), torch.zeros(3))


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_coefficients_refuse_what_would_poison_them(bad):
    known = {"target": 1.0, "horizon": 100.0, "samples": 10}
    assert_refused("observed_kl", adaptive_coefficient, 0.1, bad, **known)
    assert_refused("observed_kl", penalty_coefficient, 0.1, bad, target=1.0)
    assert_refused("coefficient", adaptive_coefficient, bad, 1.0, **known)
    assert_refused("coefficient", penalty_coefficient, bad, 1.0, target=1.0)
    assert_refused("target", penalty_coefficient, 0.1, 1.0, target=bad)
    for name in known:
        assert_refused(name, adaptive_coefficient, 0.1, 1.0, **{**known, name: bad})


def test_coefficients_refuse_numbers_out_of_range():
    known = {"target": 1.0, "horizon": 100.0, "samples": 10}
    for bad in (0.0, -1.0):
        assert_refused("target", adaptive_coefficient, 0.1, 1.0, **{**known, "target": bad})
        assert_refused("target", penalty_coefficient, 0.1, 1.0, target=bad)
        assert_refused("horizon", adaptive_coefficient, 0.1, 1.0, **{**known, "horizon": bad})
    assert_refused("samples", adaptive_coefficient, 0.1, 1.0, **{**known, "samples": -1})
    # At 5 horizons and error -0.2 the coefficient would be 0 for good, beyond that negative.
    assert_refused("samples", adaptive_coefficient, 0.1, 1.0, **{**known, "samples": 500})
