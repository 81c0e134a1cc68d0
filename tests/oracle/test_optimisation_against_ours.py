"""TRPO's linear algebra, AdamW and the schedules against the oracle: exact elimination and unrolled definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from oracle import cases, optimisation, trust_region
from ppomax.engine.optimiser import learning_rate
from ppomax.rl import trust_region as rl_trust


def test_trust_region_steps_agree_with_exact_elimination() -> None:
    for i, system in enumerate(cases.systems(400, seed=5)):
        matrix, gradient = (
            torch.tensor(system.matrix, dtype=torch.float64),
            torch.tensor(system.gradient, dtype=torch.float64),
        )
        found = rl_trust.natural_step(
            gradient, lambda v, matrix=matrix: matrix @ v, max_kl=system.max_kl, damping=system.damping, iterations=40,
            tolerance=0.0,
        )  # fmt: skip
        expected = torch.tensor(
            trust_region.natural_step(system.gradient, system.matrix, max_kl=system.max_kl, damping=system.damping),
            dtype=torch.float64,
        )
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-6, msg=lambda text, i=i: f"system {i}: {text}")


def test_schedules_agree_with_the_oracle() -> None:
    for path in cases.paths(400, seed=6):
        for step in range(path.total + 3):
            settings: dict[str, Any] = {"peak": path.peak, "warmup": path.warmup, "floor": path.floor}
            found = learning_rate(step, path.total, schedule=path.shape, **settings)
            # Ours is at its peak twice: at the end of the warm-up, and where the decay begins.
            begins = round(path.warmup * path.total) + 1
            if begins >= path.total:  # a single step has no way to decay: ours leaves it at the peak
                continue
            expected = optimisation.learning_rate(
                step, total=path.total, shape=path.shape, decay_from=begins, **settings
            )
            assert found == pytest.approx(expected, rel=1e-9), (step, path)


def test_adamw_agrees_with_its_unrolled_definition() -> None:
    for path in cases.paths(200, seed=7):
        parameter = torch.nn.Parameter(torch.tensor([path.parameter], dtype=torch.float64))
        adamw = torch.optim.AdamW([parameter], betas=path.betas, eps=path.eps, weight_decay=path.weight_decay)
        expected = optimisation.adamw(
            path.parameter, path.gradients, path.rates, betas=path.betas, eps=path.eps, weight_decay=path.weight_decay
        )
        for gradient, lr, value in zip(path.gradients, path.rates, expected, strict=True):
            parameter.grad = torch.tensor([gradient], dtype=torch.float64)
            adamw.param_groups[0]["lr"] = lr
            adamw.step()
            assert float(parameter.detach()) == pytest.approx(value, rel=1e-8, abs=1e-10)
