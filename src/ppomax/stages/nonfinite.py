"""Gradients that are no numbers: how many steps in a row end a run, and what is kept of the last one for `replay`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ppomax.engine.optimiser import Optimiser
from ppomax.errors import NonFiniteError
from ppomax.types import ROLLOUT_TENSORS, Experience

NONFINITE_IN_A_ROW = 5


def failures_after(failures: int, norms: Sequence[float]) -> int:
    """Steps in a row without a finite gradient, after a step with these norms."""
    return 0 if all(map(math.isfinite, norms)) else failures + 1


def failed_step(step: int, optimiser: Optimiser, rows: Sequence[Mapping[str, Any]]) -> NonFiniteError:
    """The error of a step of SFT or a reward model. rows: what the step read."""
    return NonFiniteError(
        _message(f"step {step}", "nothing was changed by them"),
        _weights("model", optimiser),
        {"step": step, "rows": _as_json(rows)},
    )


def failed_update(
    iteration: int, policy: Optimiser, critic: Optimiser | None, part: Experience, sizes: Sequence[int], *,
    coefficients: tuple[float, float], pretraining: bool, ptx: Sequence[Mapping[str, Any]],
) -> NonFiniteError:  # fmt: skip
    """The error of PPO. part: the minibatch, in the order of its microbatches of `sizes` rows; coefficients: η, β."""
    tensors = {**_weights("policy", policy), **({} if critic is None else _weights("critic", critic))}
    # As a tensor: JSON has no NaN, and a coefficient that is none may be the cause.
    tensors["coefficients"] = torch.tensor(coefficients, dtype=torch.float64)
    tensors |= {f"rollout/{name}": getattr(part.rollout, name) for name in ROLLOUT_TENSORS}
    tensors |= {f"batch/{f.name}": x for f in fields(part) if isinstance(x := getattr(part, f.name), Tensor)}
    state = {
        "iteration": iteration,
        "prompt_ids": [list(ids) for ids in part.rollout.prompt_ids],
        "microbatches": list(sizes),
        "pretraining": pretraining,
        "ptx": _as_json(ptx),
    }
    where, left = f"iteration {iteration}", "the player whose it was (grad_norm_…) was not changed by them"
    return NonFiniteError(_message(where, left), tensors, state)


def _as_json(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The rows with lists for tuples."""
    return json.loads(json.dumps(rows))


def _weights(role: str, optimiser: Optimiser) -> dict[str, Tensor]:
    return {f"{role}/{name}": master.detach() for name, master in optimiser.masters.items()}


def _message(where: str, left: str) -> str:
    return (
        f"{where}: the gradient was not finite in {NONFINITE_IN_A_ROW} steps in a row; {left}. "
        "Lower the learning rate, or look at the losses and scores in metrics.jsonl"
    )
