"""What a policy is trained for: one reward, or several with weights, each kept by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ppomax.monitor.clock import Clock
from ppomax.rewards.callables import RewardFunction, call, shared_columns
from ppomax.rewards.model import RewardModel
from ppomax.types import DataError, Rollout, SetupError

_WEIGHTED = re.compile(r"^\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*\*\s*(.+)$")


@dataclass(frozen=True)
class Term:
    """One named reward of a weighted sum."""

    name: str
    weight: float
    reward: RewardModel | RewardFunction

    @property
    def part(self) -> str:
        """Its name on the clock."""
        return f"score/reward/{self.name}"


def parse_terms(specs: tuple[str, ...]) -> list[tuple[float, str]]:
    """`0.7*DIR` → (0.7, DIR); a plain spec has weight 1."""
    if not specs:
        raise SetupError("reward: found none, expected a reward-model directory or module:function")
    terms = []
    for spec in specs:
        match = _WEIGHTED.match(spec)
        terms.append((float(match[1]), match[2].strip()) if match else (1.0, spec))
    return terms


def is_function(spec: str) -> bool:
    """Whether a reward spec names a Python callable."""
    return bool(re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", spec))


def score_texts(
    terms: list[Term], rollout: Rollout, texts: list[str], clock: Clock | None = None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Unweighted components by name ([B] each) of the terms that read text, and their weighted dense rewards [B, R]."""
    prompts = [prompt.messages for prompt in rollout.prompts]
    columns = shared_columns([prompt.columns for prompt in rollout.prompts])
    columns["response_ids"] = rollout.responses()
    lengths = rollout.length_B.tolist()
    clock = clock or Clock()
    components: dict[str, Tensor] = {}
    dense_BR: Tensor | None = None
    for term in terms:
        if isinstance(term.reward, RewardModel):
            if not term.reward.reads_ids:
                with clock(term.part):
                    scores = term.reward.score_text(
                        prompts, texts, truncated=rollout.truncated_B.tolist(), count=partial(clock.count, term.part)
                    )
                components[term.name] = torch.tensor(scores)
            continue
        with clock(term.part):
            scores, dense = call(term.reward, prompts, texts, columns, name=term.name, lengths=lengths)
        components[term.name] = torch.tensor(scores)
        if dense is not None:
            dense_BR = torch.zeros(rollout.response_ids_BR.shape) if dense_BR is None else dense_BR
            for b, row in enumerate(dense):
                dense_BR[b, : len(row)] += term.weight * torch.tensor(row)
    if dense_BR is not None:
        _expect_finite(dense_BR, terms)
    return components, dense_BR


def weighted_sum(terms: list[Term], components: dict[str, Tensor]) -> Tensor:
    """Float32 [B]: Σ weight · component, in the terms' order."""
    total_B = torch.stack([term.weight * components[term.name] for term in terms]).sum(0)
    _expect_finite(total_B, terms)
    return total_B


def _expect_finite(total: Tensor, terms: list[Term]) -> None:
    """Refuse sums of finite rewards that left float32; the first axis is the response."""
    wrong = torch.nonzero(~torch.isfinite(total))
    if len(wrong):
        found, of = total[tuple(wrong[0])].item(), " + ".join(f"{term.weight:g} × {term.name}" for term in terms)
        raise DataError(
            f"reward: response {int(wrong[0, 0])}: found {found} as {of}, expected a finite number (float32)"
        )
