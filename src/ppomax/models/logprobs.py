"""Log-probs, entropies and exact KLs straight from hidden states; no [N, V] float tensor outlives its chunk."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Float32 logits held at once: for a vocabulary of 49,152 tokens those of 680 states.
CHUNK_BYTES = 2**27
# Rows of logits start at multiples of so many numbers, a processor's vector, where they are long enough to gain by it:
# the product that writes them takes up to half as long again otherwise (docs/performance.md).
ALIGNED, SHORTEST_ALIGNED = 8, 64


def chunk_rows(vocabulary: int) -> int:
    """States whose logits are held at once."""
    most = max(1, CHUNK_BYTES // (4 * vocabulary))
    return most if most < SHORTEST_ALIGNED else most - most % ALIGNED


@dataclass(frozen=True)
class Unembedded:
    """Hidden states [N, H] and the unembedding (weight [V, H], bias [V] or None) that turns them into logits."""

    states_NH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None = None

    def logits(self, rows: slice, temperature: float, room: Tensor) -> Tensor:
        """Float32 logits [V, n] of n rows, divided by `temperature`, written to the start of `room`.

        The vocabulary comes first because weight · statesᵀ is the faster product on CPU, and so are sums over it.
        """
        logits_Vn = _view(room, self.weight_VH, rows)
        states_Hn = self.states_NH[rows].T
        if self.weight_VH.dtype == room.dtype:
            torch.mm(self.weight_VH, states_Hn, out=logits_Vn)
        else:
            logits_Vn.copy_(torch.mm(self.weight_VH, states_Hn))
        if self.bias_V is not None:
            logits_Vn += self.bias_V[:, None]
        return logits_Vn if temperature == 1.0 else logits_Vn.div_(temperature)

    def chunks(self) -> list[slice]:
        """Rows whose logits fit in CHUNK_BYTES, in pieces of about the same size."""
        count, most = len(self.states_NH), chunk_rows(self.weight_VH.shape[0])
        pieces = max(1, math.ceil(count / most))
        size = max(1, _width(math.ceil(count / pieces)))
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def room(self) -> Tensor:
        """Memory for the logits of one chunk, used again for the next: fresh pages cost as much as a reduction."""
        V = self.weight_VH.shape[0]
        return torch.empty(
            V * _width(min(len(self.states_NH), chunk_rows(V))), dtype=torch.float32, device=self.weight_VH.device
        )


def token_logprobs(
    states_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """log softmax(states·weightᵀ / temperature) at `targets_N`: float32 [N], differentiable in states, weight and bias.

    d logits = one_hot(target) − softmax.
    """

    def rule(logits_Vn: Tensor, rows: slice, factor_n: Tensor | None) -> tuple[Tensor, Tensor | None]:
        target = targets_N[None, rows]
        value, _, total = _log_softmax(logits_Vn, target, out=logits_Vn)
        if factor_n is None:
            return value, None
        return value, logits_Vn.mul_(-factor_n / total).scatter_add_(0, target, factor_n[None])

    return _chunked(states_NH, weight_VH, bias_V, temperature, rule)


def token_entropy(
    states_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None = None, *, temperature: float = 1.0
) -> Tensor:
    """The exact entropy over the vocabulary, nats: float32 [N], differentiable in states, weight and bias.

    d logits = −p · (log p + H).
    """

    def rule(logits_Vn: Tensor, rows: slice, factor_n: Tensor | None) -> tuple[Tensor, Tensor | None]:
        log_p = logits_Vn.sub_(logits_Vn.logsumexp(0))
        p = log_p.exp()
        entropy = -(p * log_p).sum(0)
        return entropy, None if factor_n is None else p.mul_(log_p.add_(entropy)).mul_(-factor_n)

    return _chunked(states_NH, weight_VH, bias_V, temperature, rule)


def token_kl(of: Unembedded, against: Unembedded, *, temperature: float = 1.0) -> Tensor:
    """The exact KL(of ‖ against) over the vocabulary, nats: float32 [N], differentiable in `of` only.

    d logits = p · (log p − log q − KL).
    """
    room = against.room()

    def rule(logits_Vn: Tensor, rows: slice, factor_n: Tensor | None) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            log_q = against.logits(rows, temperature, room)
            difference = log_q.sub_(log_q.logsumexp(0)).neg_()
        log_p = logits_Vn.sub_(logits_Vn.logsumexp(0))
        difference += log_p
        p = log_p.exp_()
        kl = (p * difference).sum(0)
        return kl, None if factor_n is None else p.mul_(difference.sub_(kl)).mul_(factor_n)

    return _chunked(of.states_NH, of.weight_VH, of.bias_V, temperature, rule)


@torch.no_grad()
def token_statistics(
    states_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 [N] each, without gradient: log-prob and exact entropy at `temperature`, log-prob at temperature 1."""
    logprobs, entropies, plains = torch.empty(3, len(targets_N), device=states_NH.device)
    of = Unembedded(states_NH, weight_VH, bias_V)
    room, spare = of.room(), of.room()
    for rows in of.chunks():
        logits = of.logits(rows, 1.0, room)
        exponentials = _view(spare, weight_VH, rows)
        plains[rows], largest, total = _log_softmax(logits, targets_N[None, rows], out=exponentials)
        logprobs[rows] = plains[rows]
        if temperature != 1.0:
            logits.div_(temperature)
            logprobs[rows], largest, total = _log_softmax(logits, targets_N[None, rows], out=exponentials)
        # Logits less the largest: their size would cancel away a small entropy's digits.
        entropies[rows] = total.log() - exponentials.mul_(logits.sub_(largest)).sum(0) / total
    return logprobs, entropies, plains


# (logits [V, n] of some rows, which may be overwritten; which rows; factors [n], or None: no slopes) → their values [n]
# and the slopes d value / d logits [V, n] times the factors.
Rule = Callable[[Tensor, slice, Tensor | None], tuple[Tensor, Tensor | None]]


def _chunked(states: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, rule: Rule) -> Tensor:
    return _Chunked.apply(states, weight, bias, temperature, rule, torch.is_grad_enabled())  # type: ignore[return-value]


class _Chunked(torch.autograd.Function):
    """A number per state by way of its logits.

    With a frozen unembedding the forward pass, which has the logits at hand, also forms the gradient in the states: it
    is known up to a factor per state, so that one product with the vocabulary replaces two. Where the unembedding is
    trained, the backward pass computes the logits again, but for the last chunk, whose slopes wait for it in the place
    of their logits.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, rule: Rule, learns: bool
    ) -> Tensor:
        wants_states, wants_weight, wants_bias = (learns and wanted for wanted in ctx.needs_input_grad[:3])
        at_once = wants_states and not (wants_weight or wants_bias)
        values = torch.empty(len(states), dtype=torch.float32, device=states.device)
        ones = torch.ones_like(values)
        d_states = torch.empty_like(states) if at_once else None
        of = Unembedded(states, weight, bias)
        room, chunks = of.room(), of.chunks()
        last = chunks[-1] if chunks and (wants_weight or wants_bias) else None
        slopes = None
        for rows in chunks:
            logits = of.logits(rows, temperature, room)
            values[rows], slopes = rule(logits, rows, ones[rows] if at_once or rows == last else None)
            if d_states is not None and slopes is not None:
                d_states[rows] = slopes.to(weight.dtype).T @ weight
        ctx.temperature, ctx.rule, ctx.d_states = temperature, rule, d_states
        ctx.slopes_of_last = None if last is None else slopes
        ctx.save_for_backward(*(() if at_once else (states, weight, bias)))
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0] / ctx.temperature
        if ctx.d_states is not None:
            return (ctx.d_states * gradient[:, None]).to(ctx.d_states.dtype), None, None, None, None, None
        states, weight, bias = ctx.saved_tensors
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_states = torch.empty_like(states) if wants_states else None
        d_weight = None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        of = Unembedded(states, weight, bias)
        # The slopes that waited are overwritten; for who asks for gradients again they are computed like the others.
        slopes, ctx.slopes_of_last, room = ctx.slopes_of_last, None, None
        for rows in reversed(of.chunks()):
            if slopes is None:
                room = of.room() if room is None else room
                _, slopes = ctx.rule(of.logits(rows, ctx.temperature, room), rows, gradient[rows])
            else:
                slopes.mul_(gradient[rows])
            if d_bias is not None:
                d_bias += slopes.sum(1)
            slopes = slopes.to(weight.dtype)
            if d_states is not None:
                d_states[rows] = slopes.T @ weight
            if wants_weight:
                d_weight = _plus_product(d_weight, slopes, states[rows])
            slopes = None
        if wants_weight:
            d_weight = torch.zeros_like(weight) if d_weight is None else d_weight.to(weight.dtype)
        return d_states, d_weight, None if d_bias is None else d_bias.to(bias.dtype), None, None, None


def _log_softmax(logits_Vn: Tensor, target_1n: Tensor, *, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The targets' log-probs [n], the largest logits [n], the sums [n] of exp(logits − largest), written to `out`."""
    chosen, largest = logits_Vn.gather(0, target_1n)[0], logits_Vn.amax(0)
    total = torch.sub(logits_Vn, largest, out=out).exp_().sum(0)
    return chosen - largest - total.log(), largest, total


def _plus_product(sum_VH: Tensor | None, slopes_Vn: Tensor, states_nH: Tensor) -> Tensor:
    """A float32 sum plus slopes · states, without a product of its own where the types allow it."""
    if sum_VH is None:
        return (slopes_Vn @ states_nH).float()
    if slopes_Vn.dtype == sum_VH.dtype:
        return torch.addmm(sum_VH, slopes_Vn, states_nH, out=sum_VH)
    return sum_VH.add_(slopes_Vn @ states_nH)


def _view(room: Tensor, weight_VH: Tensor, rows: slice) -> Tensor:
    """The start of `room` as [V, n]."""
    V, n = weight_VH.shape[0], rows.stop - rows.start
    return room[: V * _width(n)].view(V, _width(n))[:, :n]


def _width(n: int) -> int:
    """Numbers from the start of one row of n logits to that of the next."""
    return n if n < SHORTEST_ALIGNED else math.ceil(n / ALIGNED) * ALIGNED
