"""Log-probs of given tokens straight from hidden states, in chunks; no [N, V] float tensor outlives its chunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Float32 logits held at once.
CHUNK_BYTES = 100_000_000


def token_logprobs(
    states_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """log softmax(states·weightᵀ / temperature) at `targets_N`: float32 [N], differentiable in states, weight and bias.

    d logits = g · (one_hot(target) − softmax) / temperature, formed in place chunk by chunk; where the weight is trained,
    the backward pass recomputes the logits for it.
    """
    return _TokenLogprobs.apply(states_NH, weight_VH, bias_V, targets_N, temperature)  # type: ignore[return-value]


@torch.no_grad()
def token_statistics(
    states_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 [N] each, without gradient: log-prob and exact entropy at `temperature`, log-prob at temperature 1."""
    pieces = []
    for rows in _chunks(len(targets_N), weight_VH.shape[0]):
        logits = _logits(states_NH[rows], weight_VH, bias_V, 1.0)
        chosen = logits.gather(1, targets_N[rows, None])[:, 0]
        plain = chosen - logits.logsumexp(-1)
        logits = logits.div_(temperature)
        normaliser = logits.logsumexp(-1)
        # From log-probs, not logits: their size would cancel away a small entropy's digits.
        logits = logits.sub_(normaliser[:, None])
        entropy = -(torch.exp(logits).mul_(logits)).sum(-1)
        pieces.append((chosen / temperature - normaliser, entropy, plain))
    if not pieces:
        nothing = states_NH.new_zeros(0, dtype=torch.float32)
        return nothing, nothing, nothing
    logprobs, entropies, plains = (torch.cat(column) for column in zip(*pieces, strict=True))
    return logprobs, entropies, plains


class _TokenLogprobs(torch.autograd.Function):
    """With a frozen unembedding the forward pass, which has the logits at hand, also forms the gradient in the states.

    That gradient is known up to a factor per token, so one product with the vocabulary replaces two.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
    ) -> Tensor:
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        at_once = wants_states and not (wants_weight or wants_bias)
        normaliser = torch.empty(len(targets), dtype=torch.float32, device=states.device)
        logprobs = torch.empty_like(normaliser)
        d_states = torch.empty_like(states) if at_once else None
        for rows in _chunks(len(targets), weight.shape[0]):
            logits = _logits(states[rows], weight, bias, temperature)
            normaliser[rows] = logits.logsumexp(-1)
            logprobs[rows] = logits.gather(1, targets[rows, None])[:, 0] - normaliser[rows]
            if d_states is not None:
                ones = torch.ones_like(normaliser[rows, None])
                d_states[rows] = _d_logits(logits, normaliser[rows], targets[rows], ones).to(weight.dtype) @ weight
        ctx.temperature, ctx.d_states = temperature, d_states
        ctx.save_for_backward(*(() if at_once else (states, weight, bias, targets, normaliser)))
        return logprobs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0] / ctx.temperature
        if ctx.d_states is not None:
            return (ctx.d_states * gradient[:, None]).to(ctx.d_states.dtype), None, None, None, None
        states, weight, bias, targets, normaliser = ctx.saved_tensors
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_states = torch.empty_like(states) if wants_states else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        for rows in _chunks(len(targets), weight.shape[0]):
            logits = _logits(states[rows], weight, bias, ctx.temperature)
            d_logits = _d_logits(logits, normaliser[rows], targets[rows], gradient[rows, None])
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(weight.dtype)
            if d_states is not None:
                d_states[rows] = d_logits @ weight
            if d_weight is not None:
                d_weight += d_logits.T @ states[rows]
        return (
            d_states,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
            None,
        )


def _d_logits(logits_NV: Tensor, normaliser_N: Tensor, targets_N: Tensor, factor_N1: Tensor) -> Tensor:
    """factor · (one_hot(target) − softmax), formed in the memory of the logits."""
    d_logits = logits_NV.sub_(normaliser_N[:, None]).exp_().mul_(-factor_N1)
    return d_logits.scatter_add_(1, targets_N[:, None], factor_N1)


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = F.linear(states, weight, bias)
    # .to(float32, copy) may alias a float32 tensor; F.linear's result is ours, so dividing in place is safe.
    logits = logits.float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def _chunks(count: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_BYTES // (4 * vocabulary))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
