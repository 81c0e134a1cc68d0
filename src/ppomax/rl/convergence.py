"""When a loss has stopped falling: plain numbers, no tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ppomax.rl.arguments import expect_count


def has_converged(losses: Sequence[float], *, window: int, tolerance: float) -> bool:
    """Whether the last `window` losses are, on average, no longer lower than the `window` losses before them.

        mean(before) - mean(last) <= tolerance * |mean(before)|

    `tolerance`, in [0, 1), is the relative fall that counts as none. A rising loss counts as converged: it has stopped
    falling. Fewer than 2 * window losses, or one among those that is not finite, are never converged.
    Source: "Secrets of RLHF I", critic pre-training "until the value loss has converged" (the test is ours).
    """
    expect_count(window=window)
    if not 0.0 <= tolerance < 1.0:
        raise ValueError(f"tolerance: found {tolerance}, expected a number in [0, 1)")
    recent = losses[-2 * window :]
    if len(recent) < 2 * window or not all(map(math.isfinite, recent)):
        return False
    before, last = math.fsum(recent[:window]) / window, math.fsum(recent[window:]) / window
    return before - last <= tolerance * abs(before)
