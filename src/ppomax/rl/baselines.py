"""What is subtracted from returns where there is no critic: means of the batch, or of the responses to one prompt.

`return_B` [B] is one return per response, in reward units; `group_B` [B] the id of its prompt, in any order. A row is
compared with every other ([B, B] in memory), which sums each group in the same order on every device. Returns must be
finite: NaN spreads over its own group, in `batch_mean` over the batch.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ppomax.rl.arguments import expect_mask, expect_shape, expect_vector
from ppomax.rl.masked import zero_masked


def batch_mean(return_B: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """The mean of the whole batch, for every row.

        b_i = sum_j R_j / B

    It contains the row's own return, which shrinks the expected gradient by 1 - 1/B.
    Source: "Secrets of RLHF I", the baseline of the policy gradient; Williams (1992).
    """
    expect_vector(return_B=return_B)
    return return_B.mean().repeat(len(return_B))


def group_mean(return_B: Float[Tensor, " B"], group_B: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """The mean of the row's group, the row itself included.

        b_i = mean of R_j over j with group_j = group_i

    Source: Shao et al. (2024), arXiv 2402.03300, section 4.1.
    """
    return _mean_of(return_B, _same_group(return_B, group_B))


def leave_one_out(return_B: Float[Tensor, " B"], group_B: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """The mean of the other rows of the row's group: independent of the row, so the gradient stays unbiased.

        b_i = mean of R_j over j != i with group_j = group_i

    A group of one row has no other: ValueError.
    Source: Kool et al. (2019), "Buy 4 REINFORCE samples"; Ahmadian et al. (2024), arXiv 2402.14740 (RLOO).
    """
    same = _same_group(return_B, group_B)
    alone = same.sum(dim=1) == 1
    if alone.any():
        raise ValueError(f"group_B: found one row of group {int(group_B[alone][0])}, expected at least two of each")
    return _mean_of(return_B, same & ~torch.eye(len(same), dtype=torch.bool, device=same.device))


def group_std(return_B: Float[Tensor, " B"], group_B: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """The standard deviation of the row's group, biased: divided by the group's rows, not rows - 1.

        s_i = sqrt(mean of (R_j - mean)^2 over j with group_j = group_i)

    Source: Shao et al. (2024), arXiv 2402.03300, section 4.1.
    """
    same = _same_group(return_B, group_B)
    return _mean_of(_centred(return_B, same).square(), same).sqrt()


def group_normalise(return_B: Float[Tensor, " B"], group_B: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Returns in standard deviations of their own group: GRPO's advantages.

        A_i = (R_i - group mean) / group std

    There is no epsilon: where the std is 0, or only the float32 rounding of the mean, the group's advantages are 0.
    Source: Shao et al. (2024), arXiv 2402.03300, section 4.1.
    """
    same = _same_group(return_B, group_B)
    centred_B = _centred(return_B, same)
    std_B = _mean_of(centred_B.square(), same).sqrt()
    constant_B = std_B <= torch.finfo(torch.float32).eps * _mean_of(return_B, same).abs()
    return torch.where(constant_B, 0.0, centred_B / std_B)


def spread(return_B: Float[Tensor, " B"], mask: Bool[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """The row's number at each of its counted tokens, 0 elsewhere: one weight Phi for the whole response."""
    expect_mask(mask, axes=2)
    expect_shape(mask.shape[:1], return_B=return_B)
    return zero_masked(return_B[:, None].expand(mask.shape), mask)


def _same_group(return_B: Tensor, group_B: Tensor) -> Tensor:
    expect_vector(return_B=return_B)
    expect_shape(return_B.shape, group_B=group_B)
    if group_B.dtype != torch.int64:
        raise ValueError(f"group_B: found dtype {group_B.dtype}, expected torch.int64")
    return group_B[:, None] == group_B[None, :]


def _mean_of(x_B: Tensor, chosen_BB: Tensor) -> Tensor:
    return torch.where(chosen_BB, x_B[None, :], 0.0).sum(dim=1) / chosen_BB.sum(dim=1)


def _centred(return_B: Tensor, same_BB: Tensor) -> Tensor:
    centred_B = return_B - _mean_of(return_B, same_BB)
    # The mean of many equal numbers is off by some ulps: a second pass takes that out of the deviations.
    return centred_B - _mean_of(centred_B, same_BB)
