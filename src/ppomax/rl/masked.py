"""Statistics over the counted entries of a tensor: whatever lies under the mask, NaN included, changes nothing."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppomax.rl.arguments import expect_mask, expect_positive, expect_shape


def zero_masked(x: Float[Tensor, "*axes"], mask: Bool[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """`x` where counted, else 0; the gradient of a masked entry is exactly 0.

    Apply it before a non-linear function: afterwards is too late, since 0 * NaN in the backward pass is NaN.
    """
    expect_mask(mask)
    expect_shape(mask.shape, x=x)
    return torch.where(mask, x, torch.zeros_like(x))


def masked_sum(x: Float[Tensor, "*axes"], mask: Bool[Tensor, "*axes"]) -> Float[Tensor, ""]:
    """Sum over all counted entries."""
    return zero_masked(x, mask).sum()


def masked_mean(x: Float[Tensor, "*axes"], mask: Bool[Tensor, "*axes"]) -> Float[Tensor, ""]:
    """Mean over all counted entries; 0 where nothing counts.

    A metric, not a loss: losses divide by the count of the whole minibatch (`ppomax.rl.objectives`).
    """
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def whiten(x: Float[Tensor, "*axes"], mask: Bool[Tensor, "*axes"], *, eps: float) -> Float[Tensor, "*axes"]:
    """Counted entries shifted to mean 0 and scaled to standard deviation 1; masked entries return 0.

        (x - mean) / sqrt(var + eps)

    The variance is biased (divided by the count, not count - 1). `eps` (> 0, unit of x squared) stands inside the root:
    constant input gives 0 with a finite gradient. Advantages: pass the whole minibatch, never a microbatch.
    """
    expect_positive(eps=eps)
    centred = zero_masked(x - masked_mean(x, mask), mask)
    variance = masked_mean(centred.square(), mask)
    return centred * torch.rsqrt(variance + eps)
