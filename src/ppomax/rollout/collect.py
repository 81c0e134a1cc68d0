"""From an iteration number to a Rollout: which prompts, which random streams, sampled ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ppomax.data.batches import epoch_order
from ppomax.engine.randomness import seeds_for, uniforms_for
from ppomax.models.players import Policy
from ppomax.monitor.clock import Clock
from ppomax.rollout.sampler import Distribution, Sampled, sample
from ppomax.rollout.vllm import VLLM
from ppomax.types import Prompt, Rollout

# What decoders make of the bytes of a character whose last ones are missing.
_PART = re.compile("\ufffd{1,3}$")


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn, and what ends them.

    limit: tokens of a response. eos_ids: tokens that end it; stop: whether its ids so far do. max_rows: responses side
    by side; max_tokens: of their cache (of the native sampler, as `max_rows` is).
    """

    limit: int
    distribution: Distribution
    eos_ids: Sequence[int]
    max_rows: int
    max_tokens: int | None = None
    stop: Callable[[Sequence[int]], bool] | None = None


def iteration_prompts(count: int, per_iteration: int, iteration: int, seed: int) -> list[int]:
    """Prompt indices of an iteration: consecutive pieces of endlessly many seeded permutations of `count` prompts."""
    start = iteration * per_iteration
    picked, orders = [], {}
    for position in range(start, start + per_iteration):
        epoch, within = divmod(position, count)
        if epoch not in orders:
            orders[epoch] = epoch_order(count, seed=seed, epoch=epoch)
        picked.append(orders[epoch][within])
    return picked


def repeated(indices: Sequence[int], samples: int) -> tuple[list[int], list[int]]:
    """Every index `samples` times, with a sample number that is unique per index within the batch."""
    seen: dict[int, int] = {}
    rows, numbers = [], []
    for index in indices:
        for _ in range(samples):
            rows.append(index)
            numbers.append(seen.get(index, 0))
            seen[index] = numbers[-1] + 1
    return rows, numbers


def collect(
    policy: Policy, prompts: Sequence[Prompt], prompt_ids: Sequence[tuple[int, ...]], indices: Sequence[int],
    *, samples: int, iteration: int, seed: int, how: Sampling, progress: Callable[[int], None] | None = None,
    clock: Clock | None = None, part: slice = slice(None), engine: VLLM | None = None,
) -> Rollout:  # fmt: skip
    """Sample `samples` responses for each of the given prompts; `part`: of some rows only.

    engine: who samples instead of the native sampler; it knows no `stop`.
    """
    rows, numbers = (row[part] for row in repeated(indices, samples))
    ids = [prompt_ids[i] for i in rows]
    if engine is None:
        sampled = draw_responses(
            policy, ids, rows, numbers, iteration=iteration, seed=seed, how=how, progress=progress, clock=clock
        )
    else:
        seeds = seeds_for(seed, iteration, rows, numbers)
        sampled = engine.sample(
            policy, ids, seeds, limit=how.limit, distribution=how.distribution, eos_ids=how.eos_ids, clock=clock
        )
        if progress is not None:
            progress(len(rows))
    return as_rollout(sampled, prompts, prompt_ids, rows, numbers)


def draw_responses(
    policy: Policy, ids: Sequence[tuple[int, ...]], rows: Sequence[int], numbers: Sequence[int],
    *, iteration: int, seed: int, how: Sampling, progress: Callable[[int], None] | None = None,
    ended: Callable[[int, Sampled], None] | None = None, clock: Clock | None = None,
) -> list[Sampled]:  # fmt: skip
    """One response to each of `ids` by the native sampler, from the random stream of its prompt and sample numbers."""
    uniforms_BR = uniforms_for(seed, iteration, rows, numbers, how.limit)
    return sample(
        policy, ids, uniforms_BR, distribution=how.distribution, eos_ids=how.eos_ids, max_rows=how.max_rows,
        max_tokens=how.max_tokens, stop=how.stop, progress=progress, ended=ended, clock=clock,
    )  # fmt: skip


def as_rollout(
    sampled: Sequence[Sampled], prompts: Sequence[Prompt], prompt_ids: Sequence[tuple[int, ...]], rows: Sequence[int],
    numbers: Sequence[int],
) -> Rollout:  # fmt: skip
    """Responses as tensors; response b is the `numbers[b]`-th to prompt `rows[b]`."""
    lengths = [len(s.ids) for s in sampled]
    ids_BR = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    logprobs_BR = torch.zeros(len(rows), max(lengths))
    for b, s in enumerate(sampled):
        ids_BR[b, : lengths[b]] = torch.tensor(s.ids)
        logprobs_BR[b, : lengths[b]] = torch.tensor(s.logprobs)
    return Rollout(
        tuple(prompts[i] for i in rows), tuple(tuple(prompt_ids[i]) for i in rows), ids_BR, torch.tensor(lengths),
        logprobs_BR, torch.tensor([s.truncated for s in sampled]), torch.tensor(numbers),
    )  # fmt: skip


def response_texts(tokenizer, rollout: Rollout) -> list[str]:
    """What the responses say, special tokens left out, and the character of which the length limit left a part."""
    texts = tokenizer.batch_decode(rollout.responses(), skip_special_tokens=True)
    return [
        (_PART.sub("", text) if cut else text).strip()
        for text, cut in zip(texts, rollout.truncated_B.tolist(), strict=True)
    ]


def eos_token_ids(model, tokenizer) -> list[int]:
    """Every id that ends a response: the tokenizer's eos and those of the model's generation config."""
    ids = {int(tokenizer.eos_token_id)}
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids.update([configured] if isinstance(configured, int) else configured or [])
    return sorted(ids)


def stop_check(tokenizer, strings: Sequence[str]) -> Callable[[Sequence[int]], bool] | None:
    """Whether the text of a response's ids contains one of some strings; asked after every token. None: no strings."""
    if not strings:
        return None
    # A token is at least a byte, and the last one alone can be new. A tail that begins inside a character spoils that.
    longest = max(len(string.encode()) for string in strings) + 4

    def stops(ids: Sequence[int]) -> bool:
        text = tokenizer.decode(list(ids[-longest:]), skip_special_tokens=False)
        return any(string in text for string in strings)

    return stops
