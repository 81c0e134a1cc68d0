"""Which rows go together: microbatches under a token budget, epoch orders, and the reward model's batches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np


def token_budget_batches(lengths: Sequence[int], *, budget: int, max_rows: int) -> list[list[int]]:
    """Microbatches of row indices with rows * longest length <= budget tokens and at most `max_rows` rows.

    Longest rows first, so that neighbours have similar lengths (little padding) and the largest memory need comes at
    the start. A row longer than the budget gets a batch of its own. Every index occurs exactly once.
    """
    _expect_positive(budget=budget, max_rows=max_rows)
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # The first row of a batch is its longest.
        if batches and len(batches[-1]) < max_rows and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def least_padded(lengths: Sequence[int], *, budget: int, overhead: int) -> list[range]:
    """Passes over neighbouring rows, `lengths` descending: the cuts with the fewest slots in all, in which each pass
    counts `overhead` more. A pass has at most `budget` slots, or one row."""
    _expect_positive(budget=budget)
    cost, starts = [0], [0]
    for end in range(1, len(lengths) + 1):
        best = None
        for start in range(end - 1, -1, -1):
            slots = (end - start) * lengths[start]
            if best is not None and slots > budget:
                break
            if best is None or cost[start] + slots < best[0]:
                best = cost[start] + slots, start
        assert best is not None
        cost.append(best[0] + overhead)
        starts.append(best[1])
    cuts = [len(lengths)]
    while cuts[-1]:
        cuts.append(starts[cuts[-1]])
    cuts.reverse()
    return [range(start, end) for start, end in itertools.pairwise(cuts)]


def padded_batches(lengths: Sequence[int], *, budget: int, overhead: int) -> list[list[int]]:
    """Microbatches of row indices for padded passes: at most `budget` slots, or one row, and as little padding as is
    worth a pass, which costs as much as `overhead` slots. Longest rows first; every index occurs exactly once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    passes = least_padded([lengths[i] for i in order], budget=budget, overhead=overhead)
    return [[order[place] for place in part] for part in passes]


def prompt_batches(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, budget: int
) -> list[list[int]]:
    """Microbatches of row indices for packed passes: at most `budget` tokens, where equal prompts count once.

    Rows of one prompt stand together, longest first, so that neighbours have similar lengths; a prompt whose rows
    exceed the budget is spread over several batches. Every index occurs exactly once.
    """
    _expect_positive(budget=budget)
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows_of.setdefault(tuple(prompt), []).append(i)
    longest = {prompt: len(prompt) + max(len(responses[i]) for i in rows) for prompt, rows in rows_of.items()}
    batches: list[list[int]] = []
    room = 0
    for prompt in sorted(rows_of, key=lambda prompt: (-longest[prompt], rows_of[prompt][0])):
        rows = sorted(rows_of[prompt], key=lambda i: (-len(responses[i]), i))
        whole = len(prompt) + sum(len(responses[i]) for i in rows)
        if not batches or room < whole:
            batches.append([])
            room = budget
        room -= len(prompt)
        for i in rows:
            if batches[-1] and room < len(responses[i]):
                batches.append([])
                room = budget - len(prompt)
            batches[-1].append(i)
            room -= len(responses[i])
    return batches


def epoch_order(n: int, *, seed: int, epoch: int) -> list[int]:
    """A permutation of range(n) that depends on (seed, epoch) only, equal under every numpy version."""
    # Raw bits of a bit generator are stable by contract; `Generator.permutation` is not.
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(bits, kind="stable").tolist()


def balanced_batches(
    lengths: Sequence[int], *, tokens_per_batch: int, seed: int, epoch: int, min_rows: int = 4, max_rows: int = 128
) -> list[list[int]]:
    """Shuffled batches of about `tokens_per_batch` tokens, the dynamic batches of a reward model.

    A batch closes before the row that would take it over the budget, but not below `min_rows` rows, and at `max_rows`
    in any case. A last batch below `min_rows` is merged into the one before it, which may then exceed `max_rows`.
    Source: "Secrets of RLHF I", section 4.2 (at least 4, at most 128 samples a batch).
    """
    _expect_positive(tokens_per_batch=tokens_per_batch, min_rows=min_rows)
    if max_rows < min_rows:
        raise ValueError(f"max_rows: found {max_rows}, expected at least min_rows = {min_rows}")
    batches: list[list[int]] = [[]]
    tokens = 0
    for i in epoch_order(len(lengths), seed=seed, epoch=epoch):
        rows = len(batches[-1])
        if rows >= max_rows or (rows >= min_rows and tokens + lengths[i] > tokens_per_batch):
            batches.append([])
            tokens = 0
        batches[-1].append(i)
        tokens += lengths[i]
    if len(batches) > 1 and len(batches[-1]) < min_rows:
        batches[-2].extend(batches.pop())
    return batches if batches[0] else []


def _expect_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}: found {value}, expected at least 1")
