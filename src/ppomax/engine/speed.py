"""What this machine reaches: operations a second of matrix products, bytes a second of memory copies.

A PPO run measures its peak anew instead of keeping it in the user's cache: a kept number would go on standing for a
machine that was busy, throttled or had other threads when it was taken. The best of several repetitions is what counts,
so that a short disturbance does no harm. Numbers come from a generator of their own: zeros would be faster than data,
and a run's random state is not touched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

SIDES = (256, 512, 1024, 2048, 4096, 8192)
TOKENS, FEW = 1024, 64
COPIED_BYTES = 2**28
# A block of repetitions, so that starting a kernel and reading the clock do not count.
SHORTEST_BLOCK = 0.005

# n, k, m of a product [n, k]·[k, m].
Shape = tuple[int, int, int]


def peak_rate(
    device: torch.device, dtype: torch.dtype, shapes: Iterable[Shape] = (), *, seconds: float = 0.15
) -> float | None:
    """Operations a second of the fastest product: squares of growing size and the given shapes, in about `seconds`.

    Shapes that would take too long at the rate seen before are left out. None where it cannot be measured.
    """
    tried = [*((side,) * 3 for side in SIDES), *shapes]
    best, allowance = 0.0, seconds / len(tried)
    try:
        for shape in tried:
            if best == 0.0 or operations(shape) / best < 2 * allowance:
                best = max(best, product_rate(device, dtype, shape, seconds=allowance))
    except (RuntimeError, MemoryError):
        return None
    return best


def product_rate(device: torch.device, dtype: torch.dtype, shape: Shape, *, seconds: float) -> float:
    """Operations a second of one product, the best block of about `seconds` of them."""
    n, k, m = shape
    draw = torch.Generator(device).manual_seed(0)
    a, b = (torch.rand(*axes, generator=draw, device=device).sub_(0.5).to(dtype) for axes in ((n, k), (k, m)))
    return operations(shape) * most_calls(lambda: torch.mm(a, b), device, seconds)


def copy_rate(device: torch.device, *, seconds: float) -> float:
    """Bytes a second that a copy of a large tensor reads and writes, both counted."""
    source = torch.ones(COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES * most_calls(lambda: target.copy_(source), device, seconds)


def model_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """The products that a model with this config.json spends its time in, for `TOKENS` tokens.

    For the vocabulary it is `FEW` tokens and the weight is the first factor, as where logits are formed.

    Empty if it does not say how wide its states are.
    """
    hidden = config.get("hidden_size") or config.get("n_embd")
    if not hidden:
        return {}
    inner = config.get("intermediate_size") or config.get("n_inner") or 4 * hidden
    return {
        "attention": (TOKENS, hidden, hidden), "up": (TOKENS, hidden, inner), "down": (TOKENS, inner, hidden),
        "vocabulary": (config["vocab_size"], hidden, FEW),
    }  # fmt: skip


def operations(shape: Shape) -> int:
    """Floating-point operations of a product: two per multiply-add."""
    n, k, m = shape
    return 2 * n * k * m


def most_calls(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Calls a second in the fastest block of calls."""

    def timed(count: int) -> float:
        began = _now(device)
        for _ in range(count):
            call()
        return _now(device) - began

    spent, count, best = timed(1), 1, 0.0  # the first call makes ready and does not count
    while best == 0.0 or spent < seconds:
        took = max(timed(count), 1e-9)
        spent, best = spent + took, max(best, count / took)
        if took < SHORTEST_BLOCK:
            count *= 2
    return best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
