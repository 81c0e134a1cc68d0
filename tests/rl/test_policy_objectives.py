from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppomax.rl.kl import full_kl, k1, k2, k3
from ppomax.rl.masked import masked_sum
from ppomax.rl.objectives import clipped_policy_loss
from ppomax.rl.policy_objectives import (
    importance_weights,
    kl_loss,
    penalised_policy_loss,
    policy_gradient_loss,
    surrogate_loss,
)

from .batches import (
    NAN,
    assert_close,
    assert_dummy_row_is_free,
    assert_microbatches_add_up,
    assert_only_counted_tokens_matter,
    assert_refused,
    assert_rows_are_independent,
    mask_of,
    pad,
    ragged,
)

MASK = torch.tensor([[True, True], [True, False]])
# Ratios 1.5, 0.5 and 1.1.
OLD = torch.tensor([[-1.0, -2.0], [-0.5, NAN]])
NEW = OLD + torch.tensor([[math.log(1.5), math.log(0.5)], [math.log(1.1), 0.0]])
ADVANTAGES = torch.tensor([[2.0, 3.0], [-1.0, NAN]])

# A vocabulary of three. TOKENS hold each one as often as SAMPLER draws it: a mean over them is the exact expectation.
SAMPLER = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()
OTHER = torch.tensor([0.2, 1.0, -0.7], dtype=torch.float64)
TOKENS = torch.tensor([[0, 0, 1, 2]])
ALL = torch.ones(1, 4, dtype=torch.bool)


def of_tokens(logits):
    """[1, 4]: the log-prob of each of TOKENS."""
    return torch.log_softmax(logits, dim=-1)[TOKENS]


def gradient(loss, logits):
    """Gradient of loss(logits) with respect to the logits."""
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


def test_policy_gradient_by_hand():
    loss = policy_gradient_loss(OLD, ADVANTAGES, MASK, denom=10)
    assert_close(loss, -(-1.0 * 2.0 - 2.0 * 3.0 + -0.5 * -1.0) / 10)
    logprobs = OLD.clone().requires_grad_()
    policy_gradient_loss(logprobs, ADVANTAGES, MASK, denom=10).backward()
    assert_close(logprobs.grad, [[-0.2, -0.3], [0.1, 0.0]])


def test_the_policy_gradient_is_the_gradient_of_the_expected_return():
    returns = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    ours = gradient(lambda x: policy_gradient_loss(of_tokens(x), returns[TOKENS], ALL, denom=4), SAMPLER)
    assert_close(ours, gradient(lambda x: -(torch.softmax(x, dim=0) * returns).sum(), SAMPLER))
    # A constant baseline moves the loss, not its expected gradient.
    moved = gradient(lambda x: policy_gradient_loss(of_tokens(x), returns[TOKENS] - 7.0, ALL, denom=4), SAMPLER)
    assert_close(moved, ours)


def test_surrogate_by_hand():
    assert_close(surrogate_loss(NEW, OLD, ADVANTAGES, MASK, denom=10), -(1.5 * 2.0 + 0.5 * 3.0 - 1.1) / 10)


@given(ragged(3))
def test_the_surrogate_is_the_clipped_one_without_a_clip(columns):
    tensors, mask = [pad(c) for c in columns], mask_of(columns[0])
    plain = surrogate_loss(*tensors, mask, denom=3)
    assert_close(clipped_policy_loss(*tensors, mask, clip_ratio=math.inf, denom=3), plain)


@given(ragged(2))
def test_at_ratio_1_the_surrogate_has_the_policy_gradient(columns):
    logprobs, advantages = (pad(c) for c in columns)
    mask = mask_of(columns[0])
    surrogate = gradient(lambda x: surrogate_loss(x, logprobs, advantages, mask, denom=3), logprobs)
    assert_close(surrogate, gradient(lambda x: policy_gradient_loss(x, advantages, mask, denom=3), logprobs))


def test_penalty_by_hand():
    # Without an exact KL each token pays ratio - 1 - ln ratio.
    estimates = [r - 1 - math.log(r) for r in (1.5, 0.5, 1.1)]
    loss = penalised_policy_loss(NEW, OLD, ADVANTAGES, MASK, kl_coefficient=0.5, denom=10)
    assert_close(loss, -(1.5 * 2.0 + 0.5 * 3.0 - 1.1) / 10 + 0.5 * sum(estimates) / 10)
    kl = torch.tensor([[0.3, 0.1], [0.2, NAN]])
    loss = penalised_policy_loss(NEW, OLD, ADVANTAGES, MASK, kl_coefficient=0.5, denom=10, kl=kl)
    assert_close(loss, -(1.5 * 2.0 + 0.5 * 3.0 - 1.1) / 10 + 0.5 * (0.3 + 0.1 + 0.2) / 10)


def test_trap_14_the_penalty_without_an_exact_kl_has_the_value_and_gradient_of_kl_old_new():
    """On tokens of the old policy, in expectation: exact here, each token as often as its probability says."""
    old, nothing = of_tokens(SAMPLER), torch.zeros(1, 4, dtype=torch.float64)

    def estimated(logits):
        return penalised_policy_loss(of_tokens(logits), old, nothing, ALL, kl_coefficient=1.0, denom=4)

    def exact(logits):
        kl = full_kl(SAMPLER, logits).expand(1, 4)
        return penalised_policy_loss(of_tokens(logits), old, nothing, ALL, kl_coefficient=1.0, denom=4, kl=kl)

    assert_close(exact(OTHER), full_kl(SAMPLER, OTHER))
    assert_close(estimated(OTHER), full_kl(SAMPLER, OTHER))
    expected = gradient(lambda x: full_kl(SAMPLER, x), OTHER)
    assert_close(gradient(exact, OTHER), expected)
    assert_close(gradient(estimated, OTHER), expected)
    reverse = gradient(lambda x: full_kl(x, SAMPLER), OTHER)
    assert (reverse - expected).abs().max() > 0.01, "the two directions must differ for this test to tell them apart"


@given(ragged(3))
def test_beta_0_is_the_surrogate(columns):
    tensors, mask = [pad(c) for c in columns], mask_of(columns[0])
    free = penalised_policy_loss(*tensors, mask, kl_coefficient=0.0, denom=3)
    assert torch.equal(free, surrogate_loss(*tensors, mask, denom=3))


def test_kl_loss_by_hand():
    # d = ln 1.5, ln 0.5, ln 1.1.
    d = [math.log(1.5), math.log(0.5), math.log(1.1)]
    assert_close(kl_loss(NEW, OLD, MASK, estimator="k1", denom=10), sum(d) / 10)
    assert_close(kl_loss(NEW, OLD, MASK, estimator="k2", denom=10), sum(x * x / 2 for x in d) / 10)
    assert_close(kl_loss(NEW, OLD, MASK, estimator="k3", denom=10), sum(math.exp(-x) - 1 + x for x in d) / 10)


@given(ragged(2))
def test_kl_loss_sums_the_estimators(columns):
    (new, reference), mask = (pad(c) for c in columns), mask_of(columns[0])
    for name, estimator in {"k1": k1, "k2": k2, "k3": k3}.items():
        loss = kl_loss(new, reference, mask, estimator=name, denom=3)
        assert_close(loss, masked_sum(estimator(new, reference), mask) / 3)


def test_trap_14_kl_loss_descends_what_its_docstring_says():
    reference = of_tokens(OTHER)
    found = {
        name: gradient(lambda x, name=name: kl_loss(of_tokens(x), reference, ALL, estimator=name, denom=4), SAMPLER)
        for name in ("k1", "k2", "k3")
    }
    assert_close(found["k1"], torch.zeros(3))
    assert_close(found["k2"], gradient(lambda x: full_kl(x, OTHER), SAMPLER))
    assert_close(found["k3"], gradient(lambda x: full_kl(OTHER, x), SAMPLER))


def test_importance_weights_by_hand():
    # pi_old / mu = 1.5, 0.5 and 1.1; at cap 1.2 only the first is cut.
    assert_close(importance_weights(NEW, OLD, MASK, cap=1.2), [[1.2, 0.5], [1.1, 0.0]])
    assert_close(importance_weights(NEW, OLD, MASK, cap=math.inf), [[1.5, 0.5], [1.1, 0.0]])
    assert torch.equal(importance_weights(OLD, OLD, MASK, cap=2.0), MASK.float())


def test_importance_weights_turn_an_expectation_under_mu_into_one_under_pi():
    values = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    weights = importance_weights(of_tokens(OTHER), of_tokens(SAMPLER), ALL, cap=math.inf)
    assert_close((weights * values[TOKENS]).sum() / 4, (torch.softmax(OTHER, dim=0) * values).sum())


def test_importance_weights_are_detached_and_survive_an_overflow():
    new = torch.tensor([[500.0, -500.0]], requires_grad=True)
    weights = importance_weights(new, torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), cap=2.0)
    assert torch.equal(weights, torch.tensor([[2.0, 0.0]]))
    assert not weights.requires_grad


@given(ragged(2), st.floats(0.5, 3.0))
def test_trap_3_padding_order_and_neighbours_do_not_change_importance_weights(columns, cap):
    assert_rows_are_independent(lambda t, mask: importance_weights(t[0], t[1], mask, cap=cap), columns)


OBJECTIVES = {
    "policy_gradient": (2, lambda t, m: policy_gradient_loss(*t, m, denom=4)),
    "surrogate": (3, lambda t, m: surrogate_loss(*t, m, denom=4)),
    "penalised": (3, lambda t, m: penalised_policy_loss(*t, m, kl_coefficient=0.3, denom=4)),
    "penalised_exact": (4, lambda t, m: penalised_policy_loss(*t[:3], m, kl_coefficient=0.3, denom=4, kl=t[3])),
    "k1": (2, lambda t, m: kl_loss(*t, m, estimator="k1", denom=4)),
    "k2": (2, lambda t, m: kl_loss(*t, m, estimator="k2", denom=4)),
    "k3": (2, lambda t, m: kl_loss(*t, m, estimator="k3", denom=4)),
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


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_the_first_argument_and_an_exact_kl_are_differentiated(name):
    inputs, loss = OBJECTIVES[name]
    tensors = [torch.rand(2, 2, requires_grad=True) for _ in range(inputs)]
    loss(tensors, MASK).backward()
    expected = [i == 0 or (name == "penalised_exact" and i == 3) for i in range(inputs)]
    assert [t.grad is not None for t in tensors] == expected


@pytest.mark.parametrize("bad", [0, -1.0, NAN])
def test_wrong_numbers(bad):
    x = torch.zeros(2, 2)
    assert_refused("denom", policy_gradient_loss, x, x, MASK, denom=bad)
    assert_refused("denom", surrogate_loss, x, x, x, MASK, denom=bad)
    assert_refused("denom", penalised_policy_loss, x, x, x, MASK, kl_coefficient=0.1, denom=bad)
    assert_refused("denom", kl_loss, x, x, MASK, estimator="k2", denom=bad)
    assert_refused("cap", importance_weights, x, x, MASK, cap=bad)


@pytest.mark.parametrize("bad", [-0.1, math.inf, NAN])
def test_kl_coefficients_must_be_finite_and_not_negative(bad):
    x = torch.zeros(2, 2)
    assert_refused("kl_coefficient", penalised_policy_loss, x, x, x, MASK, kl_coefficient=bad, denom=1)


def test_wrong_shapes_and_names():
    x, thin = OLD, OLD[:, :1]
    assert_refused("logprobs", policy_gradient_loss, thin, x, MASK, denom=1)
    assert_refused("advantages", policy_gradient_loss, x, thin, MASK, denom=1)
    assert_refused("old_logprobs", surrogate_loss, x, thin, x, MASK, denom=1)
    assert_refused("advantages", penalised_policy_loss, x, x, thin, MASK, kl_coefficient=0.1, denom=1)
    assert_refused("kl", penalised_policy_loss, x, x, x, MASK, kl_coefficient=0.1, denom=1, kl=thin)
    assert_refused("reference_logprobs", kl_loss, x, thin, MASK, estimator="k2", denom=1)
    assert_refused("behaviour_logprobs", importance_weights, x, thin, MASK, cap=1.0)
    assert_refused("estimator", kl_loss, x, x, MASK, estimator="k4", denom=1)
    assert_refused("mask", surrogate_loss, x, x, x, MASK.float(), denom=1)
