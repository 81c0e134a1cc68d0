"""The experience buffer: rollouts of earlier iterations, learnt from again with importance weights.

An older rollout counts as what policy and critic of today make of it: they read it again, the KL and the advantages
follow from that, and each token is weighted by min(today's / the sampler's probability, cap). The weights make up for
the choice of the token, not for the way to its state; a buffer of many iterations is off-policy all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ppomax.config import PPOConfig
from ppomax.engine import world
from ppomax.stages.players import Players
from ppomax.stages.scoring import Minibatch, plan_minibatches, read
from ppomax.types import ROLLOUT_TENSORS, Experience, Prompt, Rollout, ScoredRollouts

Part = tuple[Experience, list[Minibatch]]
Stacked = TypeVar("Stacked", Rollout, Experience)


def reread(
    players: Players, kept: Iterable[ScoredRollouts], config: PPOConfig, iteration: int
) -> list[tuple[ScoredRollouts, list[Minibatch]]]:
    """Older rollouts with today's log-probs and values, each with its minibatches; scores and weights' base stay."""
    again = []
    for scored in kept:
        plan = plan_minibatches(
            scored.rollout, players, minibatch=config.minibatch, budget=config.compute.tokens_per_microbatch,
            seed=config.seed, iteration=iteration,
        )  # fmt: skip
        full_kl = config.kl.estimator == "full"
        now = read(players, scored.rollout, plan, temperature=config.sampling.temperature, full_kl=full_kl)
        today = replace(
            scored, old_logprobs_BR=now.logprobs_BR, values_BR=now.values_BR, full_kl_BR=now.full_kl_BR,
            bootstrap_B=now.bootstrap_B(scored.rollout, config.score.truncated == "bootstrap"),
        )  # fmt: skip
        again.append((today, plan))
    return again


def joined(parts: Sequence[Part]) -> Part:
    """Experience of several rollouts, one below the other, with the minibatches of all of them."""
    if len(parts) == 1:
        return parts[0]
    width = max(experience.rollout.response_ids_BR.shape[1] for experience, _ in parts)
    plan, offset = [], 0
    for experience, minibatches in parts:
        plan += [minibatch.moved(offset) for minibatch in minibatches]
        offset += len(experience)
    rollout = _stacked([experience.rollout for experience, _ in parts], width)
    return _stacked([experience for experience, _ in parts], width, rollout=rollout), plan


def whole_rollout(part: Rollout) -> Rollout:
    """The rollout of all processes, one below the other in their order."""
    parts = world.gathered(part)
    return part if len(parts) == 1 else _stacked(parts, max(p.response_ids_BR.shape[1] for p in parts))


def _stacked(items: Sequence[Stacked], width: int, **given: Any) -> Stacked:
    """Dataclasses of [B, …] tensors and tuples as one; [B, R] tensors are padded with zeros to the same width."""
    columns = dict(given)
    for f in fields(items[0]):
        values = [getattr(item, f.name) for item in items]
        if f.name in given or values[0] is None:
            continue
        if isinstance(values[0], Tensor):
            columns[f.name] = torch.cat([_padded(x, width) if x.ndim == 2 else x for x in values])
        else:
            columns[f.name] = sum(values, ())
    return type(items[0])(**columns)


def _padded(x_BR: Tensor, width: int) -> Tensor:
    return F.pad(x_BR, (0, width - x_BR.shape[1]))


def tensors_of(kept: Sequence[ScoredRollouts]) -> dict[str, Tensor]:
    """For a checkpoint: what cannot be computed again, oldest first."""
    saved: dict[str, Tensor] = {}
    for age, scored in enumerate(kept):
        parts = {"score": scored.score_B, "reference": scored.reference_logprobs_BR}
        parts |= {} if scored.dense_BR is None else {"dense": scored.dense_BR}
        parts |= {f"component/{name}": x for name, x in scored.components.items()}
        parts |= {f"rollout/{name}": getattr(scored.rollout, name) for name in ROLLOUT_TENSORS}
        saved |= {f"{age}/{name}": x for name, x in parts.items()}
    return saved


def from_tensors(
    saved: Mapping[str, Tensor], age: int, prompts: tuple[Prompt, ...], prompt_ids: tuple[tuple[int, ...], ...]
) -> ScoredRollouts:
    """The rollout that `tensors_of` wrote in place `age`; log-probs and values are empty until they are read again."""
    parts = {name.removeprefix(f"{age}/"): x for name, x in saved.items() if name.startswith(f"{age}/")}
    rollout = Rollout(prompts, prompt_ids, **{name: parts[f"rollout/{name}"] for name in ROLLOUT_TENSORS})
    prefix = "component/"
    components = {name.removeprefix(prefix): x for name, x in parts.items() if name.startswith(prefix)}
    empty_BR = torch.zeros_like(parts["reference"])
    return ScoredRollouts(
        rollout, empty_BR, parts["reference"], empty_BR, parts["score"], components, torch.zeros(len(rollout)),
        parts.get("dense"),
    )  # fmt: skip
