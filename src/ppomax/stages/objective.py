"""What one microbatch adds to the policy's loss: the chosen objective, entropy bonus, and KL to the reference."""

from __future__ import annotations

from torch import Tensor

from ppomax.config import PPOConfig
from ppomax.models.players import TokenScores, at_responses
from ppomax.rl.masked import masked_sum
from ppomax.rl.objectives import clipped_policy_loss, entropy_bonus
from ppomax.rl.policy_objectives import kl_loss, penalised_policy_loss, policy_gradient_loss, surrogate_loss
from ppomax.types import Experience, TokenBatch


def policy_loss(
    scores: TokenScores, part: Experience, batch: TokenBatch, advantages_BR: Tensor, config: PPOConfig, *, denom: float,
    kl_coefficient: float, penalty: float,
) -> Tensor:  # fmt: skip
    """The loss of `part`, whose tensors are cut to the microbatch's width and stand on its device.

    denom: counted tokens of the whole minibatch. kl_coefficient: η of a KL in the loss; penalty: β of PPO-penalty.
    """
    settings, counted = config.objective, batch.mask_BR
    logprobs = at_responses(scores.logprobs_BT, batch)
    old = part.reference_logprobs_BR if settings.denominator == "reference" else part.old_logprobs_BR
    if part.weights_BR is not None and settings.kind != "clip":
        advantages_BR = advantages_BR * part.weights_BR  # the loss is linear in them
    if settings.kind == "clip":
        loss = clipped_policy_loss(
            logprobs, old, advantages_BR, counted, clip_ratio=config.clip_ratio, denom=denom,
            dual_clip=settings.dual_clip, weights=part.weights_BR,
        )  # fmt: skip
    elif settings.kind == "penalty":
        loss = penalised_policy_loss(logprobs, old, advantages_BR, counted, kl_coefficient=penalty, denom=denom)
    elif settings.kind == "policy_gradient":
        loss = policy_gradient_loss(logprobs, advantages_BR, counted, denom=denom)
    else:
        loss = surrogate_loss(logprobs, old, advantages_BR, counted, denom=denom)
    if settings.entropy_weight is not None and scores.entropy_BT is not None:
        entropy = at_responses(scores.entropy_BT, batch)
        bonus = entropy_bonus(entropy, counted, denom=denom, clip=settings.entropy_clip)
        loss = loss - settings.entropy_weight * bonus
    if config.kl.place == "loss" and kl_coefficient:
        if config.kl.estimator == "full":
            assert scores.kl_BT is not None
            divergence = masked_sum(at_responses(scores.kl_BT, batch), counted) / denom
        else:
            reference = part.reference_logprobs_BR
            divergence = kl_loss(logprobs, reference, counted, estimator=config.kl.estimator, denom=denom)
        loss = loss + kl_coefficient * divergence
    return loss
