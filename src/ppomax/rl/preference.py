"""The reward model's ranking objective on scores of pairs, B pairs at a time."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ppomax.rl.arguments import expect_positive, expect_shape, expect_vector


def ranking_loss(
    chosen_B: Float[Tensor, " B"],
    rejected_B: Float[Tensor, " B"],
    *,
    denom: float,
    margin: float | Float[Tensor, " B"] = 0.0,
    weight_B: Float[Tensor, " B"] | None = None,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Negative log-likelihood of the preferences under Bradley-Terry.

        -sum weight * log sigmoid(chosen - rejected - margin) / denom

    `denom`: total weight of the whole minibatch, over all microbatches and ranks (its pairs, where all weigh 1).
    `weight_B`: 1 / pairs of the same prompt makes every prompt count once, as in InstructGPT. `margin`: score units,
    one for all or one per pair (Touvron et al., 2023, arXiv 2307.09288, eq. 2). `label_smoothing` s in [0, 0.5): the
    share of labels that are taken to be wrong; the likelihood of the other order then counts with weight s, that of the
    given one with 1 - s (Szegedy et al., 2016, arXiv 1512.00567, section 7).
    Source: "Secrets of RLHF I", eq. 1, as a loss (the paper prints its negative).
    """
    _expect_pairs(chosen_B, rejected_B)
    expect_positive(denom=denom)
    if isinstance(margin, Tensor):
        expect_shape(chosen_B.shape, margin=margin)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing: found {label_smoothing}, expected 0 to below 0.5")
    difference_B = chosen_B - rejected_B - margin
    likelihood_B = torch.nn.functional.logsigmoid(difference_B)
    if label_smoothing:
        other_B = torch.nn.functional.logsigmoid(-difference_B)
        likelihood_B = (1 - label_smoothing) * likelihood_B + label_smoothing * other_B
    if weight_B is not None:
        expect_shape(chosen_B.shape, weight_B=weight_B)
        likelihood_B = likelihood_B * weight_B
    return -likelihood_B.sum() / denom


def ranking_accuracy(chosen_B: Float[Tensor, " B"], rejected_B: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """Share of pairs whose chosen side scores higher; a tie counts half, so a constant scorer has 0.5."""
    _expect_pairs(chosen_B, rejected_B)
    if chosen_B.numel() == 0:
        raise ValueError("chosen_B: found no pairs, expected at least one")
    return ((chosen_B > rejected_B).float() + 0.5 * (chosen_B == rejected_B).float()).mean()


def _expect_pairs(chosen_B: Tensor, rejected_B: Tensor) -> None:
    expect_vector(chosen_B=chosen_B)
    expect_shape(chosen_B.shape, rejected_B=rejected_B)
