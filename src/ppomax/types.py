"""The values that travel between modules: frozen, and each refuses a wrong shape when it is made.

Axes: B sequences, P prompt tokens, R response tokens, T prompt+response tokens, H hidden, V vocabulary.
Column r of every [B, R] tensor belongs to response token r; masks are bool, True = counts, and come from lengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, TypedDict

import torch
from torch import Tensor

from ppomax.errors import DataError as DataError
from ppomax.errors import SetupError as SetupError


class _Turn(TypedDict):
    role: str
    content: str


class Message(_Turn, total=False):
    """One turn of a dialogue: `role` is system, user or assistant. learnt: False for an answer that is only read."""

    learnt: bool


@dataclass(frozen=True)
class Prompt:
    """A dialogue that ends with a user turn. `key` identifies its text whatever the order of rows.

    weight: how often an epoch reads it.
    """

    messages: tuple[Message, ...]
    key: str
    source: str = "default"
    columns: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0


@dataclass(frozen=True)
class Dialogue:
    """A dialogue whose assistant turns are to be learnt. `text` holds plain text instead (for ptx)."""

    messages: tuple[Message, ...]
    key: str
    source: str = "default"
    text: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Pair:
    """A preference: `chosen` is better than `rejected` as the next assistant turn after `prompt`.

    gap: how much better, where the row says so (`score_chosen` − `score_rejected`).
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    key: str
    source: str = "default"
    gap: float | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Rollout:
    """Responses sampled from the policy, B of them.

    prompt_ids: B ragged tuples of token ids, template included.
    response_ids_BR: int64, right padded; length_B: counted tokens, the sampled eos included.
    behaviour_logprobs_BR: float32, what the sampler says it sampled with; 0 where masked.
    truncated_B: bool, True where the length limit cut the response before an eos.
    sample_B: int64, which of a prompt's samples this is.
    """

    prompts: tuple[Prompt, ...]
    prompt_ids: tuple[tuple[int, ...], ...]
    response_ids_BR: Tensor
    length_B: Tensor
    behaviour_logprobs_BR: Tensor
    truncated_B: Tensor
    sample_B: Tensor

    def __post_init__(self) -> None:
        B, R = _axes(self.response_ids_BR, "response_ids_BR", 2)
        _expect(self.behaviour_logprobs_BR, "behaviour_logprobs_BR", (B, R))
        for name in ("length_B", "truncated_B", "sample_B"):
            _expect(getattr(self, name), name, (B,))
        for name in ("prompts", "prompt_ids"):
            if len(getattr(self, name)) != B:
                raise ValueError(f"{name}: found {len(getattr(self, name))} entries, expected {B}")
        if self.truncated_B.dtype != torch.bool:
            raise ValueError(f"truncated_B: found {self.truncated_B.dtype}, expected torch.bool")
        if B and (int(self.length_B.min()) < 1 or int(self.length_B.max()) > R):
            raise ValueError(f"length_B: found values outside 1..{R}")

    @property
    def mask_BR(self) -> Tensor:
        """Bool [B, R]: True on the first length_B tokens of each row."""
        return length_mask(self.length_B, self.response_ids_BR.shape[1])

    def __len__(self) -> int:
        return len(self.prompts)

    def pairs(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(prompt ids, response ids) of every row: what tells equal answers to equal prompts."""
        return [(p, tuple(r)) for p, r in zip(self.prompt_ids, self.responses(), strict=True)]

    def responses(self) -> list[list[int]]:
        """The sampled ids of each row, without padding."""
        return [row[:n].tolist() for row, n in zip(self.response_ids_BR, self.length_B.tolist(), strict=True)]

    def take(self, rows: Sequence[int]) -> Rollout:
        """The rollout of a subset of rows, in the given order."""
        return _take(self, rows)


# What is stored of a rollout beside its prompts.
ROLLOUT_TENSORS = tuple(f.name for f in fields(Rollout) if not f.name.startswith("prompt"))


@dataclass(frozen=True)
class ScoredRollouts:
    """A rollout with everything that the update needs.

    old_logprobs_BR, reference_logprobs_BR: float32, of the sampled tokens under the policy at sampling time (as the
    trainer re-scores it) and under the frozen reference. values_BR: float32, V(s_r) before response token r.
    score_B: float32 weighted sum of `components` (each [B], by name). dense_BR: per-token reward or None.
    bootstrap_B: V of the cut state for truncated rows that are bootstrapped, else 0. full_kl_BR: the exact KL(policy ‖
    reference) at each state, where it was asked for.
    """

    rollout: Rollout
    old_logprobs_BR: Tensor
    reference_logprobs_BR: Tensor
    values_BR: Tensor
    score_B: Tensor
    components: Mapping[str, Tensor]
    bootstrap_B: Tensor
    dense_BR: Tensor | None = None
    full_kl_BR: Tensor | None = None

    def __post_init__(self) -> None:
        B, R = self.rollout.response_ids_BR.shape
        for name in ("old_logprobs_BR", "reference_logprobs_BR", "values_BR"):
            _expect(getattr(self, name), name, (B, R))
        for name in ("score_B", "bootstrap_B"):
            _expect(getattr(self, name), name, (B,))
        for name, value in self.components.items():
            _expect(value, f"components[{name}]", (B,))
        for name in ("dense_BR", "full_kl_BR"):
            if getattr(self, name) is not None:
                _expect(getattr(self, name), name, (B, R))


@dataclass(frozen=True)
class Experience:
    """What one minibatch of the update reads: rollouts with advantages and returns, [B, R] float32.

    reference_logprobs_BR: for objectives that look at the reference. weights_BR: truncated importance weights, or None.
    """

    rollout: Rollout
    old_logprobs_BR: Tensor
    old_values_BR: Tensor
    advantages_BR: Tensor
    returns_BR: Tensor
    reference_logprobs_BR: Tensor
    weights_BR: Tensor | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.rollout.response_ids_BR.shape)
        for f in fields(self):
            if f.name != "rollout" and getattr(self, f.name) is not None:
                _expect(getattr(self, f.name), f.name, shape)

    def __len__(self) -> int:
        return len(self.rollout)

    def take(self, rows: Sequence[int]) -> Experience:
        """The experience of a subset of rows, in the given order."""
        return _take(self, rows)

    def cut(self, width: int, device: str) -> Experience:
        """The first `width` columns, on the device of the models; the rollout stays where it is."""
        rollout = replace(
            self.rollout, response_ids_BR=self.rollout.response_ids_BR[:, :width],
            behaviour_logprobs_BR=self.rollout.behaviour_logprobs_BR[:, :width],
        )  # fmt: skip
        moved = {
            f.name: to_device(getattr(self, f.name)[:, :width], device)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, rollout=rollout, **moved)


@dataclass(frozen=True)
class TokenBatch:
    """Prompt+response ids for one forward pass, right padded: ids_BT int64, length_B and prompt_length_B int64.

    Right padding under causal attention needs no mask: nothing that counts can see the padding.
    trunk_BTH: the states above the frozen lower layers, where they are already known.
    """

    ids_BT: Tensor
    length_B: Tensor
    prompt_length_B: Tensor
    trunk_BTH: Tensor | None = None

    def __post_init__(self) -> None:
        B, T = _axes(self.ids_BT, "ids_BT", 2)
        _expect(self.length_B, "length_B", (B,))
        _expect(self.prompt_length_B, "prompt_length_B", (B,))
        if B and (int(self.prompt_length_B.min()) < 1 or int(self.length_B.max()) > T):
            raise ValueError(f"prompt_length_B must be ≥ 1 and length_B ≤ {T}")

    @cached_property
    def response_width(self) -> int:
        """R: the longest response of the batch."""
        return max(int((self.length_B - self.prompt_length_B).max()), 1)

    @cached_property
    def mask_BR(self) -> Tensor:
        """Bool [B, R]: the response tokens that exist."""
        return length_mask(self.length_B - self.prompt_length_B, self.response_width)

    @cached_property
    def packing(self) -> Packing:
        """The batch's tokens in one line: no padding, and what several rows share as their prompt only once."""
        return Packing.of(self)

    def with_trunk(self, trunk_BTH: Tensor) -> TokenBatch:
        """The same batch with the states of the frozen lower layers filled in."""
        return replace(self, trunk_BTH=trunk_BTH)


@dataclass(frozen=True)
class Packing:
    """Where the N tokens of a packed batch come from and go to: its G distinct prompts first, then its B responses.

    source_N: position in the flattened [B·T] batch; position_N: in its own sequence. place_BT: packed index of every
    (b, t), 0 for padding. Attention works on padded blocks: prompt_GP and response_BR are packed indices (padding: 0),
    prompt_B is the prompt of each response, block_N is where token n stands in [G·P | B·R], visible_BRS (bool,
    S = P + R) is what a response token may see: its own prompt, itself, and the response before it.
    """

    source_N: Tensor
    position_N: Tensor
    place_BT: Tensor
    prompt_GP: Tensor
    response_BR: Tensor
    prompt_B: Tensor
    block_N: Tensor
    visible_BRS: Tensor

    @classmethod
    def of(cls, batch: TokenBatch) -> Packing:
        """Pack a batch; equal prompts are found by their ids."""
        ids, lengths, prompt_lengths = batch.ids_BT.tolist(), batch.length_B.tolist(), batch.prompt_length_B.tolist()
        B, T = batch.ids_BT.shape
        known: dict[tuple[int, ...], int] = {}
        prompt_of = [known.setdefault(tuple(row[:p]), len(known)) for row, p in zip(ids, prompt_lengths, strict=True)]
        first = [prompt_of.index(g) for g in range(len(known))]
        P, R = max(prompt_lengths), batch.response_width
        source, position, block = [], [], []
        place_BT, prompt_GP, response_BR = [[0] * T for _ in range(B)], [[0] * P for _ in first], [[0] * R for _ in ids]
        for g, b in enumerate(first):
            for t in range(prompt_lengths[b]):
                prompt_GP[g][t] = len(source)
                source.append(b * T + t)
                position.append(t)
                block.append(g * P + t)
        for b, (p, n) in enumerate(zip(prompt_lengths, lengths, strict=True)):
            place_BT[b][:p] = prompt_GP[prompt_of[b]][:p]
            for t in range(p, n):
                place_BT[b][t] = response_BR[b][t - p] = len(source)
                source.append(b * T + t)
                position.append(t)
                block.append(len(first) * P + b * R + t - p)
        s, r = torch.arange(P + R), torch.arange(R)
        own = (s[None, :] >= P) & (s[None, :] - P <= r[:, None])
        visible_BRS = (s < torch.tensor(prompt_lengths)[:, None])[:, None, :] & (s < P) | own
        device = batch.ids_BT.device
        parts = (source, position, place_BT, prompt_GP, response_BR, prompt_of, block)
        indices = [torch.tensor(part, device=device) for part in parts]
        return cls(*indices, visible_BRS=visible_BRS.to(device))


@dataclass(frozen=True)
class Work:
    """What passes had to do: tokens that they read, slots that the linear layers computed for them (padding included),
    and floating-point operations that were needed.
    """

    tokens: int = 0
    slots: int = 0
    flops: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.slots + other.slots, self.flops + other.flops)

    def needed(self, counts: float) -> Work:
        """This, if the pass counts; if it is made only because other processes make one, all its slots are padding."""
        return self if counts else Work(slots=self.slots)


def token_batch(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, pad: int = 0, device: str = "cpu"
) -> TokenBatch:
    """Right-pad prompt+response ids into one [B, T] batch; `pad` is never looked at."""
    rows = [list(p) + list(r) for p, r in zip(prompts, responses, strict=True)]
    width = max(len(row) for row in rows)
    ids_BT = torch.full((len(rows), width), pad, dtype=torch.long)
    for i, row in enumerate(rows):
        ids_BT[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    lengths = torch.tensor([len(row) for row in rows]), torch.tensor([len(p) for p in prompts])
    return TokenBatch(*(to_device(x, device) for x in (ids_BT, *lengths)))


def to_device(x: Tensor, device: str) -> Tensor:
    """A tensor on a device; to a GPU by way of pinned memory, so that nothing waits for the copy."""
    if x.device.type == "cpu" and torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def length_mask(length_B: Tensor, width: int) -> Tensor:
    """Bool [B, width]: True on the first length_B entries of each row."""
    return torch.arange(width, device=length_B.device)[None, :] < length_B[:, None]


def _take(value: Any, rows: Sequence[int]) -> Any:
    index = torch.as_tensor(rows, dtype=torch.long)
    taken: dict[str, Any] = {}
    for f in fields(value):
        item = getattr(value, f.name)
        if isinstance(item, Tensor):
            taken[f.name] = item[index]
        elif isinstance(item, tuple):
            taken[f.name] = tuple(item[i] for i in rows)
        elif item is not None:
            taken[f.name] = item.take(rows)
    return replace(value, **taken)


def _axes(tensor: Tensor, name: str, ndim: int) -> tuple[int, ...]:
    if tensor.ndim != ndim:
        raise ValueError(f"{name}: found shape {tuple(tensor.shape)}, expected {ndim} axes")
    return tuple(tensor.shape)


def _expect(tensor: Tensor, name: str, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: found shape {tuple(tensor.shape)}, expected {shape}")
