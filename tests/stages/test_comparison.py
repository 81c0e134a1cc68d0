"""What is made of two systems' scores."""

from __future__ import annotations

import pytest

from ppomax.stages.comparison import best_of


def test_best_of_n_by_hand() -> None:
    """One prompt, four samples, of which the first two are compared: no candidate for their own best of two is among them."""
    rewards, judged = [9.0, 1.0, 2.0, 8.0], [0.0, 0.1, 0.2, 0.3]
    found = best_of(rewards, judged, {"p": [0, 1, 2, 3]}, judged[:2], ["p", "p"], [0, 1], 2, tie=0.05)
    # Sample 0 against the better of 1 and 2, which is 2: a win by 0.2. Sample 1 against that of 0 and 2, which is 0: a loss.
    assert (found["win"], found["lose"], found["mean"]) == (0.5, 0.5, pytest.approx((0.2 + 0.0) / 2))
