"""What is subtracted from (or divided into) whole returns when there is no critic. One number per response."""

from __future__ import annotations

from collections.abc import Sequence

from .masked import Row, mean, std


def _members(returns: Row, groups: Sequence[int], group: int) -> list[float]:
    return [x for x, g in zip(returns, groups, strict=True) if g == group]


def batch_mean(returns: Row) -> list[float]:
    """b_i = mean of all R_j, row i included. Source: "Secrets of RLHF I", section 3.2 (rewards - baseline)."""
    return [mean(returns)] * len(returns)


def leave_one_out(returns: Row, groups: Sequence[int]) -> list[float]:
    """b_i = mean of R_j over j != i in i's group; ValueError where there is no other row.

    Source: RLOO, Ahmadian et al. 2024 (arXiv 2402.14740); Kool et al. 2019.
    """
    out = []
    for i, group in enumerate(groups):
        others = [returns[j] for j, g in enumerate(groups) if g == group and j != i]
        if not others:
            raise ValueError(f"group {group} has one row; leave-one-out needs two")
        out.append(mean(others))
    return out


def group_mean(returns: Row, groups: Sequence[int]) -> list[float]:
    """b_i = mean of R_j over i's group, i included. Source: GRPO, Shao et al. 2024 (arXiv 2402.03300)."""
    return [mean(_members(returns, groups, group)) for group in groups]


def group_std(returns: Row, groups: Sequence[int]) -> list[float]:
    """The biased standard deviation of R_j over i's group. Source: as `group_mean`."""
    return [std(_members(returns, groups, group)) for group in groups]


def group_normalise(returns: Row, groups: Sequence[int]) -> list[float]:
    """A_i = (R_i - group mean) / group std, 0 where the std is 0 (exactly: equal scores). Source: as `group_mean`."""
    centres, scales = group_mean(returns, groups), group_std(returns, groups)
    return [(x - m) / s if s else 0.0 for x, m, s in zip(returns, centres, scales, strict=True)]
