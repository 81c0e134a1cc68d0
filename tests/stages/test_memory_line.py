"""What a plan says is held in memory, counted by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models.architectures import FLOAT32 as FLOAT32_HERE

from ppomax.engine.durable import size_text
from ppomax.engine.optimiser import Optimiser
from ppomax.models.load import Compute, load_causal_lm
from ppomax.models.lora import Lora
from ppomax.models.players import Policy
from ppomax.models.trunk import kept_bytes, trunk_states
from ppomax.monitor.progress import Advance
from ppomax.stages.inputs import memory_of

ADAMW: dict[str, Any] = {"weight_decay": 0.0, "betas": (0.9, 0.95), "eps": 1e-8, "max_grad_norm": 1.0}
BFLOAT16 = Compute(torch.device("cpu"), torch.bfloat16)


def opened(compute: Compute, *, train_layers: int | None = None, lora: Lora | None = None) -> tuple[Policy, Optimiser]:
    policy = Policy(load_causal_lm("tiny", compute), train_layers=train_layers, trained=True, lora=lora)
    return policy, Optimiser(policy.trained_parameters(), **ADAMW)


@pytest.mark.parametrize(("compute", "weight", "beside"), [(FLOAT32_HERE, 4, 12), (BFLOAT16, 2, 16)])
@pytest.mark.parametrize("layout", [{}, {"train_layers": 1}, {"lora": Lora(2, 16.0)}], ids=["full", "upper", "lora"])
def test_weights_once_and_what_training_adds(
    compute: Compute, weight: int, beside: int, layout: dict[str, Any]
) -> None:
    policy, optimiser = opened(compute, **layout)
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    # PEFT's adapters are float32 whatever the model computes in: they are their own masters.
    rounded = sum(p.numel() for p in trained.values() if p.dtype != torch.float32)
    numbers = sum(p.numel() for p in trained.values())
    assert optimiser.training_bytes() == 12 * numbers + 4 * rounded
    held = sum(p.numel() * p.element_size() for p in policy.model.parameters())
    if not layout:
        assert held == weight * numbers and optimiser.training_bytes() == beside * numbers
    # The same model twice is in memory once.
    beside_weights = optimiser.training_bytes()
    assert memory_of([policy, policy], beside_weights, 5000) == (
        f"{size_text(held + beside_weights + 5000)} (weights {size_text(held)}, masters, moments, gradients "
        f"{size_text(beside_weights)}, states of frozen layers 5 kB)"
    )


def test_kept_states_are_counted_as_they_are_kept() -> None:
    prompts, responses = [[1, 2], [3]], [[4, 5, 6], [7, 8]]
    policy, _ = opened(FLOAT32_HERE, train_layers=1)
    seen: list[int] = []

    @contextmanager
    def watch(rows: int) -> Iterator[Advance]:
        assert rows == 2
        yield lambda amount=1, note="": seen.append(amount)
        seen.append(0)

    states = trunk_states(policy, prompts, responses, budget=100, watch=watch)
    assert states is not None and sum(seen) == 2 and seen[-1] == 0
    assert kept_bytes(policy, prompts, responses) == sum(s.numel() * s.element_size() for s in states) == 8 * 32 * 4
    whole, _ = opened(FLOAT32_HERE)
    assert kept_bytes(whole, prompts, responses) == 0
    assert trunk_states(whole, prompts, responses, budget=100, watch=watch) is None
