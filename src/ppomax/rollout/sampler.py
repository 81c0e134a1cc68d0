"""The native sampler: prompts in, sampled ids out, one random stream per sequence.

A token is drawn by inverting the cumulative distribution at the sequence's own uniform number, so a sequence does not
depend on its neighbours, the batch size or the process count. Finished rows leave the batch, and new ones come in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ppomax.data.batches import least_padded
from ppomax.models.flops import CPU_PASS, work_of
from ppomax.models.players import Policy
from ppomax.monitor.clock import Clock
from ppomax.rollout.cache import forget_columns, keep_rows, preallocated_cache, take_in, without

# Prefilling a few rows reads all weights as decoding a token does, so places are left empty until an eighth is free.
REFILL = 8
# Slots of a pass over prompts at most, which bounds its memory.
PREFILL = 4096
# Columns of the cache beyond the longest sequence, by the length limit: how seldom it is moved to the left.
SPARE = 4
# Tokens of the vocabulary whose probabilities are summed before one of them is drawn.
BLOCK = 256


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


def cache_shape(sequences: int, prompt: int, limit: int, *, max_rows: int, max_tokens: int | None) -> tuple[int, int]:
    """Rows and columns of the cache for prompts of at most `prompt` tokens and `limit` more."""
    columns = prompt + limit
    rows = _rows(columns, max_rows, max_tokens)
    if sequences > rows:
        columns += max(limit // SPARE, 1)
        rows = _rows(columns, max_rows, max_tokens)
    return min(rows, sequences), columns


def _rows(columns: int, max_rows: int, max_tokens: int | None) -> int:
    return max_rows if max_tokens is None else max(1, min(max_rows, max_tokens // columns))


@torch.inference_mode()
def sample(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    uniforms_BR: Tensor,
    *,
    distribution: Distribution,
    eos_ids: Sequence[int],
    max_rows: int,
    max_tokens: int | None = None,
    stop: Callable[[Sequence[int]], bool] | None = None,
    progress: Callable[[int], None] | None = None,
    ended: Callable[[int, Sampled], None] | None = None,
    clock: Clock | None = None,
) -> list[Sampled]:
    """One response per entry of `prompts` (token ids; equal prompts that come in together are prefilled once).

    uniforms_BR: float32 [B, R] in [0, 1), R = length limit. max_rows: sequences side by side. max_tokens: of the cache.
    stop: whether a response so far is complete, beside `eos_ids`. progress: called with the number of newly finished
    responses. ended: called with the number of each prompt and its response when that has ended. clock: told what
    prefill and decoding took.
    """
    clock, cost = clock or Clock(), policy.costs.trunk + policy.costs.forward
    # Longest first, so that whoever comes in later fits into the columns of the first; equal ones together.
    waiting = deque(sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), tuple(prompts[i]), i)))
    longest = max(map(len, prompts), default=0)
    rows, columns = cache_shape(
        len(prompts), longest, uniforms_BR.shape[1], max_rows=max_rows, max_tokens=max_tokens
    )  # fmt: skip
    batch = _Batch(policy, prompts, uniforms_BR.to(policy.device), distribution, set(eos_ids), stop, rows, columns)
    with policy.decoding():
        while waiting or batch.alive:
            coming = [waiting.popleft() for _ in range(min(len(waiting), rows - len(batch.alive)))]
            with clock("generate/prefill"):
                read, slots = batch.take_in(coming)
            spans = [(0, length) for length in read]
            clock.count("generate/prefill", work_of(cost, spans, slots=slots, places=len(read)))
            with clock("generate/decode"):
                while batch.alive and (not waiting or rows - len(batch.alive) < max(1, rows // REFILL)):
                    over = batch.step()
                    if ended is not None:
                        for i in over:
                            ended(i, batch.response(i))
                    if progress is not None and over:
                        progress(len(over))
    results = [batch.response(i) for i in range(len(prompts))]
    # The last token of a response is drawn and not read.
    spans = [(len(p), len(p) + len(s.ids) - 1) for p, s in zip(prompts, results, strict=True)]
    clock.count("generate/decode", work_of(cost, spans, places=sum(len(s.ids) - 1 for s in results)))
    return results


class _Batch:
    """The rows that are decoded side by side, by the number of their prompt.

    A row's tokens stand in the columns `start_B` to `column` of the cache; whatever is left of them is masked.
    """

    def __init__(
        self, policy: Policy, prompts: Sequence[Sequence[int]], uniforms_BR: Tensor, distribution: Distribution,
        eos: set[int], stop: Callable[[Sequence[int]], bool] | None, rows: int, columns: int,
    ) -> None:  # fmt: skip
        self.policy, self.prompts, self.uniforms_BR, self.distribution = policy, prompts, uniforms_BR, distribution
        self.eos, self.stop, self.columns = eos, stop, columns
        self.cache = preallocated_cache(policy.model.config.num_hidden_layers, rows, columns)  # type: ignore[union-attr]
        self.responses: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
        self.complete: set[int] = set()
        self.alive: list[int] = []
        self.column = 0
        device = uniforms_BR.device
        self.start_B = torch.empty(0, dtype=torch.long, device=device)
        # The states after which the next tokens come, and memory for the logits of some of them.
        self.states_BH = self.room = torch.empty(0, device=device)
        # All columns' tokens, where something counts them.
        self.history_BS: Tensor | None = None

    def take_in(self, coming: Sequence[int]) -> tuple[list[int], int]:
        """Prefill more prompts, the longest first, equal ones together and read once; their lengths, and the slots."""
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for i in coming:
            rows_of.setdefault(tuple(self.prompts[i]), []).append(i)
        distinct = list(rows_of)
        lengths = [len(prompt) for prompt in distinct]
        if not self.alive:
            self.column = max(lengths, default=0)
        passes = least_padded(lengths, budget=PREFILL, overhead=CPU_PASS)
        for members in passes:
            self._prefill([distinct[at] for at in members], [rows_of[distinct[at]] for at in members])
        if passes:
            self.room = self.policy.unembed(self.states_BH).room()
        return lengths, sum(len(members) * lengths[members[0]] for members in passes)

    def _prefill(self, distinct: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]) -> None:
        """Read prompts, left-padded; the rows of each are copies."""
        device = self.start_B.device
        source_N = torch.tensor([at for at, same in enumerate(rows) for _ in same], device=device)
        lengths = torch.tensor([len(prompt) for prompt in distinct], device=device)
        width = len(distinct[0])
        # Padding repeats the row's first token, so that nothing depends on a pad id.
        padded = torch.tensor([[p[0]] * (width - len(p)) + list(p) for p in distinct], device=device)
        at = torch.arange(width, device=device)[None, :] - (width - lengths)[:, None]
        mask_BS, prefilled = (at >= 0).long(), DynamicCache()
        states = self.policy.next_states(padded, mask_BS, at.clamp(min=0), prefilled)[source_N]
        take_in(self.cache, prefilled, source_N, self.column)
        if self.distribution.repetition_penalty is not None:
            before = padded[:, :1].expand(-1, self.column - width)
            ids = torch.cat([before, padded], dim=1)[source_N]
            self.history_BS = torch.cat([self.history_BS, ids]) if self.alive and self.history_BS is not None else ids
        self.start_B = torch.cat([self.start_B, self.column - lengths[source_N]])
        self.states_BH = torch.cat([self.states_BH, states]) if self.alive else states
        self.alive += [i for same in rows for i in same]

    def response(self, i: int) -> Sampled:
        """What a prompt was answered, so far."""
        return Sampled(*self.responses[i], truncated=i not in self.complete)

    def step(self) -> list[int]:
        """Draw a token for every row, and read those of the rows that go on; returns the prompts whose rows ended."""
        token_B, logprob_B = self._draw()
        ended, over = [], []
        for row, (i, token, logprob) in enumerate(zip(self.alive, token_B.tolist(), logprob_B.tolist(), strict=True)):
            ids, logprobs = self.responses[i]
            ids.append(token)
            logprobs.append(logprob)
            if token in self.eos or (self.stop is not None and self.stop(ids)):
                self.complete.add(i)
            if i in self.complete or len(ids) == self.uniforms_BR.shape[1]:
                ended.append(row)
                over.append(i)
        if ended:
            token_B = token_B[self._drop(ended)]
        if self.alive:
            self._read(token_B)
        return over

    def _draw(self) -> tuple[Tensor, Tensor]:
        """The next token [B] of every row, and its log-prob [B]."""
        of = self.policy.unembed(self.states_BH)
        uniform_B = self.uniforms_BR[self.alive, [len(self.responses[i][0]) for i in self.alive]]
        drawn = [
            draw(of.logits(rows, 1.0, self.room), uniform_B[rows], self.distribution,
                 None if self.history_BS is None else self.history_BS[rows])
            for rows in of.chunks()
        ]  # fmt: skip
        tokens, logprobs = zip(*drawn, strict=True)
        return torch.cat(tokens), torch.cat(logprobs)

    def _drop(self, ended: Sequence[int]) -> Tensor:
        """Let rows go; returns those that stay."""
        keep = without(len(self.alive), ended)
        index = torch.tensor(keep, dtype=torch.long, device=self.start_B.device)
        keep_rows(self.cache, keep)
        self.alive = [self.alive[row] for row in keep]
        self.start_B, self.states_BH = self.start_B[index], self.states_BH[index]
        self.history_BS = None if self.history_BS is None else self.history_BS[index]
        return index

    def _read(self, token_B: Tensor) -> None:
        """One column more, and the states at it."""
        if self.column == self.columns:
            self._forget(int(self.start_B.min()))
        if self.history_BS is not None:
            self.history_BS = torch.cat([self.history_BS, token_B[:, None]], dim=1)
        mask_BS = torch.arange(self.column + 1, device=token_B.device)[None, :] >= self.start_B[:, None]
        position_B = self.column - self.start_B
        self.states_BH = self.policy.next_states(token_B[:, None], mask_BS.long(), position_B[:, None], self.cache)
        self.column += 1

    def _forget(self, columns: int) -> None:
        """Make room on the right: nothing that lives stands in the leftmost columns."""
        forget_columns(self.cache, columns)
        self.start_B, self.column = self.start_B - columns, self.column - columns
        self.history_BS = None if self.history_BS is None else self.history_BS[:, columns:]


def draw(
    logits_VB: Tensor, uniform_B: Tensor, distribution: Distribution, history_BS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token [B] where the cumulative distribution passes `uniform_B`, and its log-prob [B]. Overwrites the logits.

    A block of the vocabulary is found first, then the token in it: a running sum over all of it takes as long as all
    else here.
    """
    if distribution.warped:
        logits_VB = _warp(logits_VB.T, distribution, history_BS).T
    elif distribution.temperature != 1.0:
        logits_VB.div_(distribution.temperature)
    weight_VB = logits_VB.sub_(logits_VB.amax(0)).exp_()
    V, B = weight_VB.shape
    whole = V // BLOCK
    sums = weight_VB[: whole * BLOCK].view(whole, BLOCK, B).sum(1)
    sums = torch.cat([sums, weight_VB[whole * BLOCK :].sum(0, keepdim=True)])
    total_B = sums.sum(0)
    block_B, rest_B = _passed(sums, uniform_B * total_B)
    member_SB = block_B * BLOCK + torch.arange(BLOCK, device=block_B.device)[:, None]
    inside_SB = weight_VB.gather(0, member_SB.clamp(max=V - 1)).masked_fill(member_SB >= V, 0.0)
    token_B = block_B * BLOCK + _passed(inside_SB, rest_B)[0]
    return token_B, (weight_VB.gather(0, token_B[None])[0] / total_B).log()


def _passed(weight_NB: Tensor, target_B: Tensor) -> tuple[Tensor, Tensor]:
    """The entry [B] at which the running sum of weights passes the target, and what of the target is left before it."""
    cumulative = weight_NB.cumsum(0)
    # Below the end in any case: rounding must not pass the last entry that adds something.
    target_B = torch.minimum(target_B, torch.nextafter(cumulative[-1], torch.zeros_like(target_B)))
    index_B = (cumulative <= target_B).sum(0)
    before = torch.cat([torch.zeros_like(cumulative[:1]), cumulative]).gather(0, index_B[None])[0]
    return index_B, target_B - before


def _warp(logits_BV: Tensor, distribution: Distribution, history_BS: Tensor | None) -> Tensor:
    """transformers' own processors, temperature between the penalty and the cuts, as `generate` does."""
    processors = LogitsProcessorList()
    if distribution.repetition_penalty is not None:
        processors.append(RepetitionPenaltyLogitsProcessor(distribution.repetition_penalty))
    logits_BV = processors(history_BS, logits_BV) / distribution.temperature  # type: ignore[arg-type]
    nucleus = LogitsProcessorList()
    if distribution.top_k is not None:
        nucleus.append(TopKLogitsWarper(distribution.top_k))
    if distribution.top_p is not None:
        nucleus.append(TopPLogitsWarper(distribution.top_p))
    return nucleus(history_BS, logits_BV)  # type: ignore[arg-type]
