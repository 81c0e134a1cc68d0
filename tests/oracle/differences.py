"""Central finite differences, to check derivatives that were taken by hand."""

from __future__ import annotations

from collections.abc import Callable

from .masked import Batch, Row


def slopes(function: Callable[[list[float]], float], at: Row, step: float = 1e-5) -> list[float]:
    """(f(x + h e_i) - f(x - h e_i)) / 2h for every entry i of a row."""

    def moved(i: int, by: float) -> float:
        return function([x + by * (j == i) for j, x in enumerate(at)])

    return [(moved(i, step) - moved(i, -step)) / (2 * step) for i in range(len(at))]


def batch_slopes(function: Callable[[list[list[float]]], float], at: Batch, step: float = 1e-5) -> list[list[float]]:
    """The same for every entry of a batch of rows."""

    def by_row(b: int) -> list[float]:
        return slopes(lambda row: function([row if i == b else list(old) for i, old in enumerate(at)]), at[b], step)

    return [by_row(b) for b in range(len(at))]
