from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppomax.rl.convergence import has_converged

from .batches import NAN, assert_refused

loss = st.floats(0.01, 100.0)


def test_by_hand():
    # Means 10 and 9.5: a fall of 0.5, which is 5 % of the window before.
    losses = [11.0, 9.0, 9.0, 10.0]
    assert has_converged(losses, window=2, tolerance=0.05)
    assert not has_converged(losses, window=2, tolerance=0.049)


def test_only_the_last_two_windows_count():
    assert has_converged([math.inf, NAN, 5.0, 5.0], window=1, tolerance=0.0)
    assert not has_converged([5.0, 5.0, 9.0, 1.0], window=1, tolerance=0.5)


def test_too_few_losses_have_not_converged():
    assert not has_converged([], window=1, tolerance=0.5)
    assert not has_converged([1.0] * 5, window=3, tolerance=0.5)
    assert has_converged([1.0] * 6, window=3, tolerance=0.0)


def test_a_rising_loss_has_stopped_falling():
    assert has_converged([1.0, 2.0], window=1, tolerance=0.0)


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("place", range(4))
def test_losses_that_are_not_finite_never_converge(bad, place):
    losses = [1.0] * 4
    losses[place] = bad
    assert not has_converged(losses, window=2, tolerance=0.9)


@given(st.lists(loss, min_size=2, max_size=12), st.integers(1, 6), st.sampled_from([2.0**-10, 2.0, 2.0**10]))
def test_the_unit_of_the_loss_does_not_matter(losses, window, scale):
    plain = has_converged(losses, window=window, tolerance=0.125)
    # Powers of two: scaling is exact, and so is the comparison at its edge.
    assert has_converged([scale * x for x in losses], window=window, tolerance=0.125) == plain


@given(st.lists(loss, max_size=4), st.lists(loss, min_size=6, max_size=6), st.integers(1, 3))
def test_neither_older_losses_nor_the_order_within_a_window_matter(older, recent, window):
    plain = has_converged(recent[-2 * window :], window=window, tolerance=0.1)
    assert has_converged(older + recent, window=window, tolerance=0.1) == plain
    before, last = recent[-2 * window : -window], recent[-window:]
    assert has_converged(before[::-1] + last[::-1], window=window, tolerance=0.1) == plain


@given(st.floats(0.5, 0.99), st.integers(1, 4))
def test_a_geometric_fall_converges_only_within_its_rate(rate, window):
    losses = [rate**i for i in range(2 * window)]
    fall = 1 - rate**window
    assert not has_converged(losses, window=window, tolerance=0.9 * fall)
    assert has_converged(losses, window=window, tolerance=min(0.999, 1.1 * fall))


def test_wrong_arguments():
    for window in (0, -1, 1.5, True):
        assert_refused("window", has_converged, [1.0], window=window, tolerance=0.1)
    for tolerance in (-0.1, 1.0, NAN):
        assert_refused("tolerance", has_converged, [1.0], window=1, tolerance=tolerance)
