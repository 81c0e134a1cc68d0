from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppomax.rl.kl import k1, k2, k3

from . import oracle
from .batches import assert_close, assert_refused

LOGITS = torch.tensor([0.3, -1.2, 2.0, 0.1], dtype=torch.float64)
REFERENCE = torch.log_softmax(torch.tensor([1.0, 0.4, 0.2, -0.5], dtype=torch.float64), dim=0)

logprob = st.floats(-12.0, 0.0, width=32)


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
