"""Log-probs, entropies and exact KLs straight from hidden states; no [N, V] float tensor outlives its chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Float32 logits held at once.
CHUNK_BYTES = 100_000_000


@dataclass(frozen=True)
class Unembedded:
    """Hidden states [N, H] and the unembedding (weight [V, H], bias [V] or None) that turns them into logits."""

    states_NH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None = None

    def logits(self, rows: slice, temperature: float) -> Tensor:
        """Float32 logits of some rows, divided by `temperature`."""
        return _logits(self.states_NH[rows], self.weight_VH, self.bias_V, temperature)


def token_logprobs(
    states_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """log softmax(states·weightᵀ / temperature) at `targets_N`: float32 [N], differentiable in states, weight and bias.

    d logits = one_hot(target) − softmax.
    """

    def rule(logits_NV: Tensor, rows: slice, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        target, normaliser = targets_N[rows, None], logits_NV.logsumexp(-1)
        value = logits_NV.gather(1, target)[:, 0] - normaliser
        if not differentiate:
            return value, None
        slope = logits_NV.sub_(normaliser[:, None]).exp_().neg_()
        return value, slope.scatter_add_(1, target, torch.ones_like(value[:, None]))

    return _chunked(states_NH, weight_VH, bias_V, temperature, rule)


def token_entropy(
    states_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None = None, *, temperature: float = 1.0
) -> Tensor:
    """The exact entropy over the vocabulary, nats: float32 [N], differentiable in states, weight and bias.

    d logits = −p · (log p + H).
    """

    def rule(logits_NV: Tensor, rows: slice, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        log_p = logits_NV.sub_(logits_NV.logsumexp(-1, keepdim=True))
        p = log_p.exp()
        entropy = -(p * log_p).sum(-1)
        return entropy, p.mul_(log_p.add_(entropy[:, None])).neg_() if differentiate else None

    return _chunked(states_NH, weight_VH, bias_V, temperature, rule)


def token_kl(of: Unembedded, against: Unembedded, *, temperature: float = 1.0) -> Tensor:
    """The exact KL(of ‖ against) over the vocabulary, nats: float32 [N], differentiable in `of` only.

    d logits = p · (log p − log q − KL).
    """

    def rule(logits_NV: Tensor, rows: slice, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            log_q = against.logits(rows, temperature)
            difference = log_q.sub_(log_q.logsumexp(-1, keepdim=True)).neg_()
        log_p = logits_NV.sub_(logits_NV.logsumexp(-1, keepdim=True))
        difference += log_p
        p = log_p.exp_()
        kl = (p * difference).sum(-1)
        return kl, p.mul_(difference.sub_(kl[:, None])) if differentiate else None

    return _chunked(of.states_NH, of.weight_VH, of.bias_V, temperature, rule)


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


# (logits [n, V] of some rows, which may be overwritten; which rows; whether to differentiate) → their values [n] and,
# where asked for, slopes d value / d logits [n, V].
Rule = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]


def _chunked(states: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, rule: Rule) -> Tensor:
    return _Chunked.apply(states, weight, bias, temperature, rule)  # type: ignore[return-value]


class _Chunked(torch.autograd.Function):
    """A number per state by way of its logits.

    With a frozen unembedding the forward pass, which has the logits at hand, also forms the gradient in the states: it
    is known up to a factor per state, so that one product with the vocabulary replaces two. Where the unembedding is
    trained, the backward pass computes the logits again.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, rule: Rule
    ) -> Tensor:
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        at_once = wants_states and not (wants_weight or wants_bias)
        values = torch.empty(len(states), dtype=torch.float32, device=states.device)
        d_states = torch.empty_like(states) if at_once else None
        for rows in _chunks(len(states), weight.shape[0]):
            values[rows], slopes = rule(_logits(states[rows], weight, bias, temperature), rows, at_once)
            if d_states is not None and slopes is not None:
                d_states[rows] = slopes.to(weight.dtype) @ weight
        ctx.temperature, ctx.rule, ctx.d_states = temperature, rule, d_states
        ctx.save_for_backward(*(() if at_once else (states, weight, bias)))
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0][:, None] / ctx.temperature
        if ctx.d_states is not None:
            return (ctx.d_states * gradient).to(ctx.d_states.dtype), None, None, None, None
        states, weight, bias = ctx.saved_tensors
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_states = torch.empty_like(states) if wants_states else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        for rows in _chunks(len(states), weight.shape[0]):
            _, slopes = ctx.rule(_logits(states[rows], weight, bias, ctx.temperature), rows, True)
            d_logits = slopes.mul_(gradient[rows])
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


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = F.linear(states, weight, bias)
    # .to(float32, copy) may alias a float32 tensor; F.linear's result is ours, so dividing in place is safe.
    logits = logits.float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def _chunks(count: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_BYTES // (4 * vocabulary))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
