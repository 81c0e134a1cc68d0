"""Ragged batches for the maths tests: rows as lists, padded on the right with NaN unless a test says otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

TOLERANCE = 1e-6
NAN = math.nan

Rows = Sequence[Sequence[float]]


def assert_close(actual: Tensor, expected: object) -> None:
    """Equal within TOLERANCE, relative to the largest expected entry where that exceeds 1."""
    target = torch.as_tensor(expected, dtype=actual.dtype).detach()
    scale = max(1.0, float(target.abs().max())) if target.numel() else 1.0
    torch.testing.assert_close(actual.detach(), target, rtol=0.0, atol=TOLERANCE * scale)


def pad(rows: Rows, width: int | None = None, fill: float = NAN, dtype: torch.dtype = torch.float64) -> Tensor:
    """[B, R] with each row's own entries first and `fill` after them."""
    width = max(len(row) for row in rows) if width is None else width
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype)


def mask_of(rows: Rows, width: int | None = None) -> Tensor:
    """[B, R] bool: True where `pad` put an entry of its own."""
    width = max(len(row) for row in rows) if width is None else width
    return torch.tensor([[i < len(row) for i in range(width)] for row in rows])


@st.composite
def ragged(draw: st.DrawFn, columns: int, low: float = -2.0, high: float = 2.0) -> list[list[list[float]]]:
    """`columns` ragged batches of the same 1-4 row lengths (1-6), entries in [low, high]."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    number = st.floats(low, high, allow_nan=False, width=32)
    return [[draw(st.lists(number, min_size=n, max_size=n)) for n in lengths] for _ in range(columns)]


unit = st.floats(0.0, 1.0, allow_nan=False)


def assert_only_counted_tokens_matter(
    loss: Callable[[list[Tensor], Tensor], Tensor], columns: Sequence[Rows], extra: int = 3
) -> None:
    """Width, filling (zeros, NaN, inf) and row order change neither the scalar nor any gradient of its inputs."""
    width = max(len(row) for row in columns[0])
    mask = mask_of(columns[0])
    value, gradients = _value_and_gradients(loss, [pad(rows, fill=0.0) for rows in columns], mask)
    for fill in (NAN, math.inf, -1e30):
        wide = [pad(rows, width + extra, fill) for rows in columns]
        other, others = _value_and_gradients(loss, wide, mask_of(columns[0], width + extra))
        assert_close(other, value)
        for before, after in zip(gradients, others, strict=True):
            assert_close(after[:, :width], before)
            assert torch.equal(after[:, width:], torch.zeros_like(after[:, width:]))
    flipped, mirrored = _value_and_gradients(loss, [pad(rows[::-1], fill=NAN) for rows in columns], mask.flip(0))
    assert_close(flipped, value)
    for before, after in zip(gradients, mirrored, strict=True):
        assert_close(after.flip(0), before)


def assert_microbatches_add_up(loss: Callable[[list[Tensor], Tensor], Tensor], columns: Sequence[Rows]) -> None:
    """The loss of the batch, and its gradient, is the sum over its rows taken one by one."""
    tensors, mask = [pad(rows).requires_grad_() for rows in columns], mask_of(columns[0])
    whole = loss(tensors, mask)
    parts = sum(
        (loss([t[i : i + 1] for t in tensors], mask[i : i + 1]) for i in range(len(mask))), torch.zeros_like(whole)
    )
    assert_close(parts, whole)
    gradients = [torch.autograd.grad(value, tensors[0])[0] for value in (whole, parts)]
    assert_close(gradients[1], gradients[0])


def assert_dummy_row_is_free(loss: Callable[[list[Tensor], Tensor], Tensor], inputs: int) -> None:
    """A row in which nothing counts has loss 0 and gradient 0: ranks with fewer microbatches run on such rows."""
    tensors = [torch.full((1, 2), NAN, requires_grad=True) for _ in range(inputs)]
    value = loss(tensors, torch.zeros(1, 2, dtype=torch.bool))
    value.backward()
    assert value == 0
    assert torch.equal(torch.as_tensor(tensors[0].grad), torch.zeros(1, 2))


def assert_rows_are_independent(function: Callable[[list[Tensor], Tensor], Tensor], columns: Sequence[Rows]) -> None:
    """A [B, R] result has the same bits whatever the padding, its filling, the row order and the neighbours."""
    width = max(len(row) for row in columns[0])
    mask = mask_of(columns[0])
    result = function([pad(rows, fill=0.0) for rows in columns], mask)
    assert torch.equal(result[~mask], torch.zeros_like(result[~mask]))
    wide = function([pad(rows, width + 3) for rows in columns], mask_of(columns[0], width + 3))
    assert torch.equal(wide[:, :width], result)
    assert torch.equal(wide[:, width:], torch.zeros_like(wide[:, width:]))
    flipped = function([pad(rows[::-1]) for rows in columns], mask.flip(0))
    assert torch.equal(flipped.flip(0), result)
    for i, row in enumerate(columns[0]):
        alone = function([pad([rows[i]]) for rows in columns], mask_of([row]))
        assert torch.equal(alone[0], result[i, : len(row)])


def assert_refused(match: str, call: Callable[..., object], *args: object, **kwargs: object) -> None:
    """The call raises a ValueError whose message starts with the argument's name and says what was expected."""
    with pytest.raises(ValueError, match=rf"^{match}: found .*expected "):
        call(*args, **kwargs)


def _value_and_gradients(
    loss: Callable[[list[Tensor], Tensor], Tensor], tensors: list[Tensor], mask: Tensor
) -> tuple[Tensor, list[Tensor]]:
    leaves = [tensor.requires_grad_() for tensor in tensors]
    value = loss(leaves, mask)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    return value, [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True)]
