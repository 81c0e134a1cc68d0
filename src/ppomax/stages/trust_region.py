"""TRPO's step for a policy: natural gradient by Fisher-vector products, line search on the exact KL (eq. 13).

Float32 and one process; attention by plain products, since fused kernels cannot be differentiated twice. The products
hold a minibatch's [N, V] logits, so this is for small vocabularies, small minibatches or few trained parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ppomax.config import PPOConfig
from ppomax.engine.optimiser import Optimiser
from ppomax.models.players import Policy, at_responses
from ppomax.rl.kl import full_kl
from ppomax.rl.policy_objectives import surrogate_loss
from ppomax.rl.trust_region import line_search, natural_step
from ppomax.stages.scoring import Minibatch
from ppomax.types import Experience, to_device

SHRINK = 0.5
TOLERANCE = 1e-5


def trust_region_step(
    policy: Policy, optimiser: Optimiser, part: Experience, minibatch: Minibatch, advantages_BR: Tensor,
    config: PPOConfig,
) -> dict[str, float]:  # fmt: skip
    """Move the policy to where the line search accepts, or nowhere. Returns what the log wants to know."""
    settings, temperature = config.objective, config.sampling.temperature
    parameters = [p for p in optimiser.parameters.values() if p.requires_grad]
    denom = float(part.rollout.mask_BR.sum())
    device = str(parameters[0].device)
    pieces, place = [], {row: i for i, row in enumerate(minibatch.rows)}
    for micro in minibatch.micros:
        rows = [place[row] for row in micro.rows]
        width = micro.batch.response_width
        pieces.append((micro.batch, part.take(rows).cut(width, device), to_device(advantages_BR[rows, :width], device)))

    def objective() -> Iterator[Tensor]:
        for batch, piece, advantages in pieces:
            logprobs = at_responses(policy(batch, temperature=temperature).logprobs_BT, batch)
            yield -surrogate_loss(logprobs, piece.old_logprobs_BR, advantages, batch.mask_BR, denom=denom)

    with _plain_attention(policy):
        gradient, start = torch.zeros(sum(p.numel() for p in parameters), device=device), 0.0
        for value in objective():
            start += float(value.detach())
            gradient += _flat(torch.autograd.grad(value, parameters))
        with torch.no_grad():
            before = [policy.response_logits(batch, temperature=temperature) for batch, _, _ in pieces]

        def slope_of(number: int) -> Tensor:
            """The gradient of a microbatch's part of the mean KL(old ‖ new) at new = old, with its graph."""
            logits = policy.response_logits(pieces[number][0], temperature=temperature)
            kl = full_kl(before[number], logits).sum() / denom
            return _flat(torch.autograd.grad(kl, parameters, create_graph=True))

        # The parameters stay where they are for all products, so one graph does; those of several microbatches at once
        # would take the memory that cutting them was to save.
        kept: Tensor | None = slope_of(0) if len(pieces) == 1 else None

        def fisher(v: Tensor) -> Tensor:
            """F·v: the Hessian of that KL, times v."""
            product = torch.zeros_like(v)
            for number in range(len(pieces)):
                slope = slope_of(number) if kept is None else kept
                product += _flat(torch.autograd.grad(slope @ v, parameters, retain_graph=kept is not None))
            return product

        step = natural_step(
            gradient, fisher, max_kl=settings.max_kl, iterations=settings.cg_iterations, damping=settings.damping,
            tolerance=TOLERANCE,
        )  # fmt: skip
        kept = None
        at = _flat([p.detach() for p in parameters]).clone()
        reached: dict[float, tuple[float, float]] = {}

        @torch.no_grad()
        def evaluate(fraction: float) -> tuple[float, float]:
            _set(parameters, at + fraction * step)
            gained = float(sum(objective()))
            kl = sum(
                float(full_kl(old, policy.response_logits(batch, temperature=temperature)).sum())
                for (batch, _, _), old in zip(pieces, before, strict=True)
            )
            reached[fraction] = gained, kl / denom
            return reached[fraction]

        fraction = line_search(
            evaluate, step, max_kl=settings.max_kl, backtracks=settings.backtracks, shrink=SHRINK
        )  # fmt: skip
        with torch.no_grad():
            _set(parameters, at + fraction * step)
    gained, kl = reached.get(fraction, (start, 0.0))
    return {
        "policy_loss": -start, "grad_norm_policy": float(gradient.norm()), "trpo_fraction": fraction,
        "trpo_gain": gained - start, "trpo_kl": kl,
    }  # fmt: skip


@contextmanager
def _plain_attention(policy: Policy) -> Iterator[None]:
    """Padded rows through plain products: the whole line search reads in one shape what the products differentiate."""
    packs = policy.packs
    policy.packs = False
    try:
        with sdpa_kernel(SDPBackend.MATH):  # long sequences, and other devices than processors
            yield
    finally:
        policy.packs = packs


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


@torch.no_grad()
def _set(parameters: list[torch.nn.Parameter], values: Tensor) -> None:
    start = 0
    for parameter in parameters:
        parameter.copy_(values[start : start + parameter.numel()].view_as(parameter))
        start += parameter.numel()
