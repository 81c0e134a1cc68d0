from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppomax.rl.kl import full_kl
from ppomax.rl.trust_region import conjugate_gradient, line_search, natural_step

from .batches import NAN, assert_close, assert_refused

FISHER = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
GRADIENT = torch.tensor([1.0, 2.0], dtype=torch.float64)
STEP = torch.ones(2)
KNOWN = {"max_kl": 0.01, "iterations": 10, "damping": 0.0, "tolerance": 0.0}
SEARCH = {"max_kl": 0.01, "backtracks": 10, "shrink": 0.5}

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 8)


def product(matrix):
    return lambda v: matrix @ v


def random_system(seed, n, rank=None):
    """A symmetric positive (semi)definite matrix with eigenvalues of 1 and more, or 0, and a right-hand side."""
    generator = torch.Generator().manual_seed(seed)
    x, b = torch.randn(n, n, generator=generator).double(), torch.randn(n, generator=generator).double()
    eigenvectors = torch.linalg.qr(x).Q
    eigenvalues = 1 + torch.rand(n, generator=generator).double() * 9
    eigenvalues[n if rank is None else rank :] = 0
    return eigenvectors @ torch.diag(eigenvalues) @ eigenvectors.T, b


def test_conjugate_gradient_by_hand():
    # det = 11: x = ((3 * 1 - 1 * 2) / 11, (4 * 2 - 1 * 1) / 11).
    assert_close(conjugate_gradient(product(FISHER), GRADIENT, iterations=2, tolerance=0.0), [1 / 11, 7 / 11])
    # One iteration is a steepest descent of length b.b / b.Fb = 5 / 20.
    assert_close(conjugate_gradient(product(FISHER), GRADIENT, iterations=1, tolerance=0.0), [1 / 4, 2 / 4])


@given(seeds, sizes)
def test_conjugate_gradient_solves_a_positive_definite_system(seed, n):
    matrix, b = random_system(seed, n)
    x = conjugate_gradient(product(matrix), b, iterations=3 * n, tolerance=0.0)
    assert_close(x, torch.linalg.solve(matrix, b))


@given(seeds, st.integers(2, 8))
def test_conjugate_gradient_solves_a_semidefinite_system_that_has_a_solution(seed, n):
    matrix, b = random_system(seed, n, rank=n - 1)
    x = conjugate_gradient(product(matrix), matrix @ b, iterations=3 * n, tolerance=1e-12)
    assert_close(matrix @ x, matrix @ b)


@given(seeds, st.integers(2, 8), st.floats(1e-6, 0.5))
def test_the_tolerance_bounds_the_relative_residual_and_saves_products(seed, n, tolerance):
    matrix, b = random_system(seed, n)
    for scale in (1e-4, 1.0, 1e4):
        x = conjugate_gradient(product(matrix), scale * b, iterations=3 * n, tolerance=tolerance)
        assert (matrix @ x - scale * b).norm() <= 1.001 * tolerance * (scale * b).norm()
    calls = []
    conjugate_gradient(lambda v: calls.append(v) or matrix @ v, b, iterations=3 * n, tolerance=1.0)
    assert not calls


@given(seeds, sizes, st.sampled_from([torch.float32, torch.float64]))
def test_conjugate_gradient_is_finite_whatever_the_operator(seed, n, dtype):
    generator = torch.Generator().manual_seed(seed)
    x, b = torch.randn(n, n, generator=generator).to(dtype), torch.randn(n, generator=generator).to(dtype)
    for matrix in (
        x + x.T,
        -x @ x.T,
        x,
        torch.zeros_like(x),
        1e-38 * (x @ x.T),
        1e38 * (x @ x.T),
        x[:, :1] @ x[:, :1].T,
    ):
        assert conjugate_gradient(product(matrix), b, iterations=3 * n, tolerance=0.0).isfinite().all()
        assert natural_step(b, product(matrix), **KNOWN).isfinite().all()


def test_a_breakdown_returns_the_iterate_so_far():
    zero = torch.zeros(2, dtype=torch.float64)
    assert torch.equal(conjugate_gradient(product(FISHER), zero, iterations=5, tolerance=0.0), zero)
    assert torch.equal(conjugate_gradient(product(-FISHER), GRADIENT, iterations=5, tolerance=0.0), zero)
    assert torch.equal(conjugate_gradient(lambda v: v * NAN, GRADIENT, iterations=5, tolerance=0.0), zero)
    for bad in (NAN, math.inf):
        b = torch.tensor([1.0, bad], dtype=torch.float64)
        assert torch.equal(conjugate_gradient(product(FISHER), b, iterations=5, tolerance=0.0), zero)
    # diag(1, -1) and b = (2, 1): the first step, 5 / 3 * b, is along positive curvature 3; the second is not.
    saddle = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    b = torch.tensor([2.0, 1.0], dtype=torch.float64)
    x = conjugate_gradient(product(saddle), b, iterations=5, tolerance=0.0)
    assert_close(x, [10 / 3, 5 / 3])


def test_natural_step_by_hand():
    # F = diag(1, 4), g = (1, 4): x = (1, 1), x.Fx = 5, so the step is sqrt(0.02 / 5) * x.
    fisher, gradient = torch.diag(torch.tensor([1.0, 4.0])), torch.tensor([1.0, 4.0])
    step = natural_step(gradient, product(fisher), **KNOWN)
    assert_close(step, [math.sqrt(0.02 / 5)] * 2)
    # Damping 1: F + I = diag(2, 5), x = (1/2, 4/5), x.(F + I)x = 1/2 + 16/5.
    step = natural_step(gradient, product(fisher), **{**KNOWN, "damping": 1.0})
    assert_close(step, [math.sqrt(0.02 / 3.7) * 0.5, math.sqrt(0.02 / 3.7) * 0.8])


@given(seeds, sizes, st.floats(1e-4, 0.1))
def test_the_natural_step_uses_up_the_trust_region(seed, n, max_kl):
    matrix, gradient = random_system(seed, n)
    known = {**KNOWN, "max_kl": max_kl, "iterations": 3 * n}
    step = natural_step(gradient, product(matrix), **known)
    assert 0.5 * step @ matrix @ step == pytest.approx(max_kl, rel=1e-6)
    direction = torch.linalg.solve(matrix, gradient)
    assert_close(step / step.norm(), direction / direction.norm())
    # Damped, the same quadratic model of the KL is smaller, and the step still ascends.
    damped = natural_step(gradient, product(matrix), **{**known, "damping": 0.1})
    assert 0 < 0.5 * damped @ matrix @ damped < max_kl
    assert damped @ gradient > 0


@given(seeds, sizes)
def test_the_natural_step_does_not_depend_on_the_scale_of_the_gradient(seed, n):
    matrix, gradient = random_system(seed, n)
    known = {**KNOWN, "iterations": 3 * n}
    assert_close(
        natural_step(1e3 * gradient, product(matrix), **known), natural_step(gradient, product(matrix), **known)
    )


def test_a_gradient_that_is_zero_or_not_finite_gives_no_step():
    for bad in (0.0, NAN, math.inf):
        gradient = torch.tensor([0.0, bad])
        assert torch.equal(natural_step(gradient, lambda v: v, **KNOWN), torch.zeros(2))


def test_a_fisher_product_by_autograd_moves_a_categorical_policy_by_max_kl():
    """The product is two backward passes, as for a model; the step's exact KL is max_kl up to its third-order term."""
    logits = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, -2.0, 5.0], dtype=torch.float64)

    def fisher(v):
        (first,) = torch.autograd.grad(full_kl(logits.detach(), logits), logits, create_graph=True)
        return torch.autograd.grad(first @ v, logits)[0]

    def objective(at):
        return (torch.softmax(at, dim=0) * rewards).sum()

    (gradient,) = torch.autograd.grad(objective(logits), logits)
    known = {**KNOWN, "max_kl": 1e-4, "tolerance": 1e-10}
    step = natural_step(gradient, fisher, **known)
    assert not step.requires_grad
    kl = full_kl(logits, logits + step)
    assert kl.item() == pytest.approx(1e-4, rel=0.05)
    assert objective(logits + step) > objective(logits)
    # The natural gradient of a softmax policy is the advantage, up to a constant.
    advantages = rewards - objective(logits).detach()
    difference = step / step.norm() - (advantages - advantages.mean()) / (advantages - advantages.mean()).norm()
    assert_close(difference, torch.zeros(3))


def test_results_carry_no_graph_of_the_product_or_the_gradient():
    matrix, gradient = FISHER.clone().requires_grad_(), GRADIENT.clone().requires_grad_()
    assert not conjugate_gradient(product(matrix), gradient, iterations=2, tolerance=0.0).requires_grad
    assert not natural_step(gradient, product(matrix), **KNOWN).requires_grad


def search(objective, kl, **changes):
    """The result of the search and the fractions that it evaluated."""
    tried = []

    def evaluate(fraction):
        tried.append(fraction)
        return objective(fraction), kl(fraction)

    return line_search(evaluate, STEP, **{**SEARCH, **changes}), tried


def test_line_search_by_hand():
    # Objective f - f^2 is positive below 1; the KL 0.05 f^2 is below 0.01 for f < 0.447: the third trial.
    assert search(lambda f: f - f * f, lambda f: 0.05 * f * f) == (0.25, [0.0, 1.0, 0.5, 0.25])
    assert search(lambda f: f, lambda f: 0.01 * f) == (1.0, [0.0, 1.0])
    assert search(lambda f: f - f * f, lambda f: 0.0, shrink=0.1) == (0.1, [0.0, 1.0, 0.1])


def test_line_search_gives_up_with_0():
    assert search(lambda f: -f, lambda f: 0.0, backtracks=3) == (0.0, [0.0, 1.0, 0.5, 0.25])
    assert search(lambda f: f, lambda f: 0.1 * f, backtracks=3) == (0.0, [0.0, 1.0, 0.5, 0.25])
    assert search(lambda f: 7.0, lambda f: 0.0, backtracks=1)[0] == 0.0, "an equal objective is no improvement"


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_line_search_never_accepts_what_is_not_finite(bad):
    # The full step is bad, half of it is good.
    assert search(lambda f: bad if f == 1 else f, lambda f: 0.0)[0] == 0.5
    assert search(lambda f: f, lambda f: bad if f == 1 else 0.0, max_kl=math.inf)[0] == 0.5
    assert search(lambda f: bad if f == 0 else f, lambda f: 0.0) == (0.0, [0.0])


@pytest.mark.parametrize("step", [torch.zeros(2), torch.tensor([1.0, NAN]), torch.tensor([math.inf, 0.0])])
def test_line_search_does_not_evaluate_a_step_that_is_none(step):
    assert line_search(lambda fraction: pytest.fail("evaluated"), step, **SEARCH) == 0.0


def test_line_search_takes_scalar_tensors():
    found = line_search(lambda f: (torch.tensor(f), torch.tensor(0.0)), STEP, **SEARCH)
    assert found == 1.0 and isinstance(found, float)


@given(st.floats(-2, 2), st.floats(0, 0.1), st.floats(0.1, 0.9), st.integers(1, 8))
def test_line_search_returns_the_first_fraction_that_satisfies_both(slope, price, shrink, backtracks):
    good = [
        shrink**i
        for i in range(backtracks)
        if slope * shrink**i - shrink**i * shrink**i > 0 and price * shrink**i <= 0.01
    ]
    found, _ = search(lambda f: slope * f - f * f, lambda f: price * f, shrink=shrink, backtracks=backtracks)
    assert found == (good[0] if good else 0.0)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True])
def test_counts_must_be_positive_integers(bad):
    assert_refused("iterations", conjugate_gradient, product(FISHER), GRADIENT, iterations=bad, tolerance=0.0)
    assert_refused("iterations", natural_step, GRADIENT, product(FISHER), **{**KNOWN, "iterations": bad})
    assert_refused("backtracks", line_search, lambda f: (f, 0.0), STEP, **{**SEARCH, "backtracks": bad})


def test_wrong_arguments():
    fisher = product(FISHER)
    for bad in (0.0, -1.0, NAN):
        assert_refused("max_kl", natural_step, GRADIENT, fisher, **{**KNOWN, "max_kl": bad})
        assert_refused("max_kl", line_search, lambda f: (f, 0.0), STEP, **{**SEARCH, "max_kl": bad})
    assert_refused("max_kl", natural_step, GRADIENT, fisher, **{**KNOWN, "max_kl": math.inf})
    for bad in (-0.1, math.inf, NAN):
        assert_refused("damping", natural_step, GRADIENT, fisher, **{**KNOWN, "damping": bad})
        assert_refused("tolerance", natural_step, GRADIENT, fisher, **{**KNOWN, "tolerance": bad})
    for bad in (0.0, 1.0, NAN):
        assert_refused("shrink", line_search, lambda f: (f, 0.0), STEP, **{**SEARCH, "shrink": bad})
    assert_refused("b", conjugate_gradient, fisher, FISHER, iterations=1, tolerance=0.0)
    assert_refused("step", line_search, lambda f: (f, 0.0), FISHER, **SEARCH)
    assert_refused("product", conjugate_gradient, lambda v: v[:1], GRADIENT, iterations=1, tolerance=0.0)
    assert_refused("product", natural_step, GRADIENT, lambda v: v[:1], **KNOWN)
