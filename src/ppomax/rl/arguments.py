"""Checks on arguments that cost no device synchronisation: shapes, dtypes and plain Python numbers only."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def expect_shape(shape: tuple[int, ...] | torch.Size, **tensors: Tensor | None) -> None:
    """Each given tensor must have exactly this shape (no broadcasting: it hides mistakes). None is skipped."""
    for name, tensor in tensors.items():
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name}: found shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def expect_mask(mask: Tensor, *, axes: int | None = None, name: str = "mask") -> None:
    """A mask must be bool, and have `axes` axes where that is given."""
    if mask.dtype != torch.bool:
        raise ValueError(f"{name}: found dtype {mask.dtype}, expected torch.bool")
    if axes is not None and mask.ndim != axes:
        raise ValueError(f"{name}: found shape {tuple(mask.shape)}, expected {axes} axes")


def expect_unit_interval(**numbers: float) -> None:
    """Each number must lie in [0, 1]; NaN does not."""
    for name, number in numbers.items():
        if not 0.0 <= number <= 1.0:
            raise ValueError(f"{name}: found {number}, expected a number in [0, 1]")


def expect_positive(**numbers: float | None) -> None:
    """Each number must be > 0; None (off) is skipped, NaN refused."""
    for name, number in numbers.items():
        if number is not None and not number > 0.0:
            raise ValueError(f"{name}: found {number}, expected a number > 0")


def expect_not_negative(**numbers: float) -> None:
    """Each number must be finite and >= 0."""
    for name, number in numbers.items():
        if not (number >= 0.0 and math.isfinite(number)):
            raise ValueError(f"{name}: found {number}, expected a finite number >= 0")


def expect_finite(**numbers: float) -> None:
    """Each number must be neither infinite nor NaN."""
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise ValueError(f"{name}: found {number}, expected a finite number")


def expect_count(**numbers: int) -> None:
    """Each number must be an int >= 1; neither a bool nor a float that happens to be whole."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}: found {number!r}, expected an int >= 1")


def expect_vector(**tensors: Tensor) -> None:
    """Each tensor must have exactly one axis."""
    for name, tensor in tensors.items():
        if tensor.ndim != 1:
            raise ValueError(f"{name}: found shape {tuple(tensor.shape)}, expected one axis")
