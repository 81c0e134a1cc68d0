"""The native sampler: prompts in, sampled ids out, one random stream per sequence.

A token is drawn by inverting the cumulative distribution at the sequence's own uniform number, so a sequence does not
depend on its neighbours, the batch size or the process count. Finished rows leave the decode batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from ppomax.models.flops import work_of
from ppomax.models.players import Policy
from ppomax.monitor.clock import Clock
from ppomax.rollout.cache import preallocated_cache, row_index, select_rows, without


@dataclass(frozen=True)
class Sampled:
    """One response: its ids (eos included if it was sampled), their log-probs, whether the length limit cut it."""

    ids: list[int]
    logprobs: list[float]
    truncated: bool


@dataclass(frozen=True)
class Distribution:
    """What is sampled from: softmax(logits / temperature), optionally warped (evaluation only)."""

    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None

    @property
    def warped(self) -> bool:
        """True if the support or the ratios differ from a plain tempered softmax."""
        return any(option is not None for option in (self.top_p, self.top_k, self.repetition_penalty))


@torch.inference_mode()
def sample(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    uniforms_BR: Tensor,
    *,
    distribution: Distribution,
    eos_ids: Sequence[int],
    max_rows: int,
    progress: Callable[[int], None] | None = None,
    clock: Clock | None = None,
) -> list[Sampled]:
    """One response per entry of `prompts` (token ids; equal prompts are prefilled once).

    uniforms_BR: float32 [B, R] in [0, 1), R = length limit. max_rows: sequences side by side. progress: called with
    the number of newly finished responses. clock: told what prefill and decoding took.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i])))
    results: list[Sampled | None] = [None] * len(prompts)
    with policy.decoding():
        for start in range(0, len(order), max_rows):
            rows = order[start : start + max_rows]
            decoded = _decode(
                policy, [prompts[i] for i in rows], uniforms_BR[rows], distribution, set(eos_ids), clock or Clock()
            )
            for i, sampled in zip(rows, decoded, strict=True):
                results[i] = sampled
            if progress is not None:
                progress(len(rows))
    return [r for r in results if r is not None]


def _decode(
    policy: Policy, prompts: list[Sequence[int]], uniforms_BR: Tensor, distribution: Distribution, eos: set[int],
    clock: Clock,
) -> list[Sampled]:  # fmt: skip
    device = policy.device
    limit, width = uniforms_BR.shape[1], max(len(p) for p in prompts)
    cache = preallocated_cache(policy.model.config.num_hidden_layers, width + limit)  # type: ignore[union-attr]
    cost = policy.costs.trunk + policy.costs.forward
    distinct = {tuple(p) for p in prompts}
    read = work_of(cost, ((0, len(p)) for p in distinct), slots=len(distinct) * width, places=len(distinct))
    with clock("generate/prefill", read):
        prefilled = _prefill(policy, prompts, width, cache, device)
    with clock("generate/decode"):
        sampled = _continue(policy, uniforms_BR.to(device), distribution, eos, cache, *prefilled)
    # The last token of a response is drawn and not read.
    spans = [(len(p), len(p) + len(s.ids) - 1) for p, s in zip(prompts, sampled, strict=True)]
    clock.count("generate/decode", work_of(cost, spans, places=sum(len(s.ids) - 1 for s in sampled)))
    return sampled


def _continue(
    policy: Policy, uniforms_BR: Tensor, distribution: Distribution, eos: set[int], cache: Any, logits_BV: Tensor,
    mask_BS: Tensor, length_B: Tensor, history: Tensor | None,
) -> list[Sampled]:  # fmt: skip
    """Responses to prompts that are prefilled."""
    B, limit = uniforms_BR.shape
    ids: list[list[int]] = [[] for _ in range(B)]
    logprobs: list[list[float]] = [[] for _ in range(B)]
    alive = list(range(B))
    for r in range(limit):
        token_B, logprob_B = draw(logits_BV, uniforms_BR[alive, r], distribution, history)
        ended = []
        for row, (token, logprob) in enumerate(zip(token_B.tolist(), logprob_B.tolist(), strict=True)):
            ids[alive[row]].append(token)
            logprobs[alive[row]].append(logprob)
            if token in eos:
                ended.append(row)
        if len(ended) == len(alive) or r + 1 == limit:
            break
        if ended:
            keep = without(len(alive), ended)
            index = row_index(keep, uniforms_BR.device)
            select_rows(cache, index)
            token_B, mask_BS, length_B = token_B[index], mask_BS[index], length_B[index]
            history = history[index] if history is not None else None
            alive = [alive[row] for row in keep]
        mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(alive), 1)], dim=1)
        if history is not None:
            history = torch.cat([history, token_B[:, None]], dim=1)
        logits_BV = policy.next_logits(token_B[:, None], mask_BS, length_B[:, None], cache)
        length_B = length_B + 1
    return [Sampled(i, p, i[-1] not in eos) for i, p in zip(ids, logprobs, strict=True)]


def _prefill(policy, prompts, width, cache, device):
    """Left-padded prompts through the model once each; rows of equal prompts are copies of the first."""
    unique: dict[tuple[int, ...], int] = {}
    source = [unique.setdefault(tuple(p), len(unique)) for p in prompts]
    lengths = torch.tensor([len(p) for p in unique], device=device)
    # Padding repeats the row's first token, so that nothing depends on a pad id.
    padded = torch.tensor([[p[0]] * (width - len(p)) + list(p) for p in unique], device=device)
    mask = torch.arange(width, device=device)[None, :] >= (width - lengths)[:, None]
    position = (torch.arange(width, device=device)[None, :] - (width - lengths)[:, None]).clamp(min=0)
    logits = policy.next_logits(padded, mask.long(), position, cache)
    index = row_index(source, device)
    select_rows(cache, index)
    return logits[index], mask.long()[index], lengths[index], padded[index]


def draw(
    logits_BV: Tensor, uniform_B: Tensor, distribution: Distribution, history_BS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token [B] where the cumulative distribution passes `uniform_B`, and its log-prob [B]."""
    if distribution.warped:
        logits_BV = _warp(logits_BV, distribution, history_BS)
    scaled = logits_BV / distribution.temperature if distribution.temperature != 1.0 else logits_BV
    probabilities = torch.softmax(scaled, dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    # Scaled by the row's own total: a float32 sum may end at 0.99999.
    target = (uniform_B * cumulative[:, -1])[:, None]
    token = torch.searchsorted(cumulative, target, right=True).clamp(max=logits_BV.shape[1] - 1)
    return token[:, 0], probabilities.gather(1, token)[:, 0].log()


def _warp(logits_BV: Tensor, distribution: Distribution, history_BS: Tensor | None) -> Tensor:
    """transformers' own processors; temperature is applied before top-p and top-k, as `generate` does."""
    processors = LogitsProcessorList()
    if distribution.repetition_penalty is not None:
        processors.append(RepetitionPenaltyLogitsProcessor(distribution.repetition_penalty))
    logits_BV = processors(history_BS, logits_BV) / distribution.temperature  # type: ignore[arg-type]
    nucleus = LogitsProcessorList()
    if distribution.top_k is not None:
        nucleus.append(TopKLogitsWarper(distribution.top_k))
    if distribution.top_p is not None:
        nucleus.append(TopPLogitsWarper(distribution.top_p))
    return nucleus(history_BS, logits_BV) * distribution.temperature  # type: ignore[arg-type]
