"""The oracle's linear algebra, optimiser, schedule and convergence; and the generator of cases."""

from __future__ import annotations

import math

import pytest

from . import optimisation, trust_region
from .cases import DISCOUNTS, MAX_LENGTH, MAX_ROWS, TOKEN_FIELDS, cases, f32, paths, systems

near = pytest.approx
SYSTEMS = list(systems(100, seed=3))
PATHS = list(paths(200, seed=3))


def dot(x, y):
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


def damped(system):
    return [[x + system.damping * (i == j) for j, x in enumerate(row)] for i, row in enumerate(system.matrix)]


# Trust region


def test_conjugate_gradient_by_hand():
    # 4x + y = 1, x + 3y = 2: y = 7/11, x = 1/11
    assert trust_region.conjugate_gradient([[4, 1], [1, 3]], [1, 2]) == near([1 / 11, 7 / 11])
    # one step: b b^T b / b^T F b = 5 / (4 + 4 + 12) = 1/4 of b
    assert trust_region.conjugate_gradient([[4, 1], [1, 3]], [1, 2], iterations=1) == [0.25, 0.5]
    assert trust_region.conjugate_gradient([[4, 1], [1, 3]], [0, 0]) == [0, 0]
    assert trust_region.conjugate_gradient([[0, 0], [0, 0]], [1, 2]) == [0, 0]
    # rank one, b in its range: F b = 2 b
    assert trust_region.conjugate_gradient([[1, 1], [1, 1]], [3, 3]) == [1.5, 1.5]


def test_solutions_solve():
    for system in SYSTEMS:
        matrix = damped(system)
        x = trust_region.conjugate_gradient(matrix, system.gradient)
        assert [dot(row, x) for row in matrix] == near(system.gradient, abs=1e-9)


def textbook_conjugate_gradient(matrix, b, iterations):
    """Hestenes and Stiefel's recursion, in floats."""
    x, residual, direction = [0.0] * len(b), list(b), list(b)
    for _ in range(iterations):
        image = [dot(row, direction) for row in matrix]
        curvature, square = dot(direction, image), dot(residual, residual)
        if curvature <= 1e-12 or square <= 1e-20:
            break
        length = square / curvature
        x = [a + length * d for a, d in zip(x, direction, strict=True)]
        residual = [r - length * i for r, i in zip(residual, image, strict=True)]
        factor = dot(residual, residual) / square
        direction = [r + factor * d for r, d in zip(residual, direction, strict=True)]
    return x


def test_unfinished_conjugate_gradient_is_the_textbook_recursion():
    for system in SYSTEMS:
        matrix = damped(system)
        for iterations in range(len(system.gradient) + 1):
            found = trust_region.conjugate_gradient(matrix, system.gradient, iterations=iterations)
            assert found == near(textbook_conjugate_gradient(matrix, system.gradient, iterations), rel=1e-6, abs=1e-7)


def test_natural_step_by_hand():
    # F = diag(2, 8), no damping, g = (2, 8): x = (1, 1), x^T F x = 10, scale sqrt(2*0.05/10) = 0.1
    assert trust_region.natural_step([2, 8], [[2, 0], [0, 8]], max_kl=0.05, damping=0.0) == near([0.1, 0.1])
    # damping 2 makes F = diag(4, 10): x = (1/2, 4/5), x^T F x = 1 + 6.4 = 7.4
    scale = math.sqrt(0.1 / 7.4)
    found = trust_region.natural_step([2, 8], [[2, 0], [0, 8]], max_kl=0.05, damping=2.0)
    assert found == near([0.5 * scale, 0.8 * scale])
    assert trust_region.natural_step([0, 0], [[2, 0], [0, 8]], max_kl=0.05, damping=0.0) == [0, 0]


def test_natural_steps_end_on_the_trust_region():
    for system in SYSTEMS:
        step = trust_region.natural_step(system.gradient, system.matrix, max_kl=system.max_kl, damping=system.damping)
        kl = dot(step, [dot(row, step) for row in damped(system)]) / 2
        assert kl == near(system.max_kl if any(system.gradient) else 0)
        assert dot(step, system.gradient) >= 0


def test_line_search_by_hand():
    def search(objective, kl, **options):
        return trust_region.line_search(
            lambda x: (objective(x), kl(x)), max_kl=0.5, shrink=0.5, **{"backtracks": 4, **options}
        )

    assert search(lambda x: x, lambda x: x) == 0.5  # kl 1 is too much, 0.5 is not
    assert search(lambda x: x * (0.3 - x), lambda x: 0) == 0.25  # better than at 0 below 0.3 only
    assert search(lambda x: -x, lambda x: 0) == 0
    assert search(lambda x: 5 - x, lambda x: 0) == 0
    assert search(lambda x: 0.0, lambda x: 0) == 0  # equal is not higher
    assert search(lambda x: math.inf if x == 1 else x, lambda x: math.nan if x == 0.5 else 0) == 0.25
    assert search(lambda x: x, lambda x: 10 * x, backtracks=4) == 0  # 1/8 is the last tried
    assert search(lambda x: x, lambda x: 10 * x, backtracks=6) == 1 / 32


# AdamW, gradient clip


def test_adamw_first_step_by_hand():
    # bias correction makes m = g, v = g^2: 2 - 0.1*0.5*2 - 0.1*3/(3 + 1) = 2 - 0.1 - 0.075
    found = optimisation.adamw_step(2, [3], lr=0.1, betas=(0.9, 0.99), eps=1, weight_decay=0.5)
    assert found == near(1.825)


def test_adamw_second_step_by_hand():
    # b = (1/2, 3/4), g = 4, 2: m = (0.5*2 + 0.25*4) / 0.75 = 8/3;  v = (0.25*4 + 0.1875*16) / 0.4375 = 64/7
    found = optimisation.adamw_step(1, [4, 2], lr=0.1, betas=(0.5, 0.75), eps=0, weight_decay=0)
    assert found == near(1 - 0.1 * (8 / 3) / (8 / math.sqrt(7)))


def test_adamw_is_its_recursion():
    for path in PATHS:
        options = {"betas": path.betas, "eps": path.eps, "weight_decay": path.weight_decay}
        found = optimisation.adamw(path.parameter, path.gradients, path.rates, **options)
        x, m, v = path.parameter, 0.0, 0.0
        for t, (g, lr) in enumerate(zip(path.gradients, path.rates, strict=True)):
            m = path.betas[0] * m + (1 - path.betas[0]) * g
            v = path.betas[1] * v + (1 - path.betas[1]) * g * g
            x *= 1 - lr * path.weight_decay
            first, second = m / (1 - path.betas[0] ** (t + 1)), v / (1 - path.betas[1] ** (t + 1))
            x -= lr * first / (math.sqrt(second) + path.eps)
            assert found[t] == near(x, rel=1e-9, abs=1e-10)


def test_gradient_clip_by_hand():
    # norm of (3, 4, 12) over two parameters: 13
    assert optimisation.gradient_norm([[3, 4], [12]]) == 13
    assert optimisation.clip_gradient_norm([[3, 4], [12]], max_norm=6.5) == [[1.5, 2], [6]]
    assert optimisation.clip_gradient_norm([[3, 4], [12]], max_norm=13) == [[3, 4], [12]]
    assert optimisation.clip_gradient_norm([[0, 0]], max_norm=1) == [[0, 0]]
    assert optimisation.clip_gradient_norm([[3, 4]], max_norm=2, eps=3) == [[0.75, 1]]  # 2 / (5 + 3)


# Schedule, convergence


def test_learning_rate_by_hand():
    def rates(shape, **options):
        at = {"peak": 8, "total": 10, "warmup": 0.2, "floor": 0.25, "shape": shape, **options}
        return [optimisation.learning_rate(step, **at) for step in range(12)]

    # two steps of warm-up: 4, 8; then 8 steps from 8 to 2: each down by 0.75
    assert rates("linear") == [4, 8, 7.25, 6.5, 5.75, 5, 4.25, 3.5, 2.75, 2, 2, 2]
    assert rates("constant") == [4] + [8] * 11
    found = rates("cosine")
    assert [found[0], found[1], found[5], *found[9:]] == near([4, 8, 5, 2, 2, 2])  # half way: (8 + 2) / 2
    # a run of one step is at its last step, the floor; with warm-up to the end it ends, and stays, at the peak
    assert rates("linear", warmup=0, total=1)[:2] == [2, 2]
    assert rates("linear", warmup=1.0, total=2)[:3] == [4, 8, 8]
    # without warm-up the first step is at the peak and the last of 4 at the floor
    assert rates("linear", warmup=0, total=4)[:5] == [8, 6, 4, 2, 2]


def test_schedules_rise_then_fall_then_stay():
    for path in PATHS:
        at = {"peak": path.peak, "total": path.total, "warmup": path.warmup, "floor": path.floor, "shape": path.shape}
        rates = [optimisation.learning_rate(step, **at) for step in range(path.total + 3)]
        top = max(round(path.warmup * path.total), 1) - 1
        assert rates[top] == near(path.peak) and max(rates) <= path.peak * (1 + 1e-12)
        assert rates[: top + 1] == sorted(rates[: top + 1])
        assert all(a >= b for a, b in zip(rates[top:], rates[top + 1 :], strict=False))
        floor = path.peak if path.shape == "constant" else path.peak * path.floor
        assert rates[path.total - 1 :] == [near(floor)] * 4


def test_has_converged_by_hand():
    def converged(losses, window=2, tolerance=0.125):
        return optimisation.has_converged(losses, window=window, tolerance=tolerance)

    assert not converged([9, 9, 9]) and not converged([9, 9, 18])  # three losses, four are needed
    assert converged([-4, -4.5], window=1) and not converged([-4, -5], window=1)  # relative to |-4|
    assert converged([99, 4, 4, 4, 3])  # 4 -> 3.5: lower by exactly an eighth, not by more
    assert not converged([4, 4, 4, 2.9])
    assert converged([4, 4, 5, 5])  # rising is not falling
    assert not converged([4, 4, 4, math.nan]) and not converged([4, math.inf, 4, 4])
    assert converged([math.nan, 4, 4, 4, 4])  # outside both windows
    assert converged([3, 3], window=1, tolerance=0)


# Cases


def test_cases_depend_on_seed_and_index_only():
    assert list(cases(20, 5))[:10] == list(cases(10, 5))
    assert list(cases(5, 5)) != list(cases(5, 6))


def test_cases_are_consistent():
    for case in cases(500, 4):
        assert 1 <= len(case.lengths) <= MAX_ROWS and max(case.lengths) <= MAX_LENGTH
        for name in TOKEN_FIELDS:
            rows = getattr(case, name)
            assert [len(row) for row in rows] == case.lengths
            assert all(x == f32(x) for row in rows for x in row)
        for name in ("bootstrap", "truncated", "scores", "groups", "sources"):
            assert len(getattr(case, name)) == len(case.lengths)
        assert all(b == 0 for b, cut in zip(case.bootstrap, case.truncated, strict=True) if not cut)
        assert all(x < 0 for row in [*case.logprobs, *case.old_logprobs] for x in row)
        assert case.gamma in DISCOUNTS and case.gae_lambda in DISCOUNTS


def test_cases_cover_what_they_promise():
    found = list(cases(2000, 4))
    lengths = {n for case in found for n in case.lengths}
    assert lengths == set(range(MAX_LENGTH + 1))
    assert {len(case.lengths) for case in found} == set(range(1, MAX_ROWS + 1))
    assert any(case.tokens == 0 for case in found)
    assert any(len(set(case.scores)) == 1 and len(case.scores) > 2 for case in found)
    assert any(any(case.scores) and len(set(case.scores)) < len(case.scores) for case in found)
    gaps = [
        new - old
        for case in found
        for pair in zip(case.logprobs, case.old_logprobs, strict=True)
        for new, old in zip(*pair, strict=True)
    ]
    assert max(gaps) > 2.5 and min(gaps) < -2.5 and max(map(abs, gaps)) <= 3.00001
    assert any(a == b for case in found for a, b in zip(case.chosen, case.rejected, strict=True))
    assert any(case.groups.count(g) == 1 for case in found for g in case.groups)
    assert {case.k for case in found} >= {1, 2, 100}
    assert sum(any(case.truncated) for case in found) > 500
