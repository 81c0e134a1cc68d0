from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppomax.data.batches import (
    balanced_batches,
    epoch_order,
    least_padded,
    padded_batches,
    prompt_batches,
    token_budget_batches,
)

lengths_lists = st.lists(st.integers(1, 300), max_size=200)


def test_token_budget_by_hand() -> None:
    # Sorted: 9 8 | 5 5 4 | 3 1 with budget 18 (2*9, 3*5 then 4*5 = 20 > 18, 2*3) and at most 3 rows.
    assert token_budget_batches([5, 9, 1, 5, 8, 3, 4], budget=18, max_rows=3) == [[1, 4], [0, 3, 6], [5, 2]]


def test_a_row_over_the_budget_is_alone() -> None:
    assert token_budget_batches([3, 50, 2], budget=10, max_rows=8) == [[1], [0, 2]]


@given(lengths_lists, st.integers(1, 1000), st.integers(0, 500))
def test_padded_batches_hold_the_budget_and_every_row_once(lengths: list[int], budget: int, overhead: int) -> None:
    batches = padded_batches(lengths, budget=budget, overhead=overhead)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget for batch in batches)
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths, reverse=True)


def test_padded_batches_pad_where_a_pass_costs_more() -> None:
    assert padded_batches([5, 40, 5, 38], budget=1000, overhead=50) == [[1, 3], [0, 2]]
    assert padded_batches([5, 40, 5, 38], budget=1000, overhead=71) == [[1, 3, 0, 2]]


@given(lengths_lists, st.integers(1, 1000), st.integers(1, 20))
def test_token_budget_holds_and_every_row_comes_once(lengths: list[int], budget: int, max_rows: int) -> None:
    batches = token_budget_batches(lengths, budget=budget, max_rows=max_rows)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= max_rows
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    in_order = [lengths[i] for batch in batches for i in batch]
    assert in_order == sorted(lengths, reverse=True)


def all_cuts(count: int) -> Iterator[list[range]]:
    """Every way to cut `count` rows in a row into pieces."""
    for places in product([False, True], repeat=max(count - 1, 0)):
        edges = [0, *(i + 1 for i, cut in enumerate(places) if cut), count]
        yield [range(a, b) for a, b in pairwise(edges)] if count else []


@given(st.lists(st.integers(1, 60), max_size=8), st.integers(1, 150), st.integers(0, 40))
def test_no_other_cuts_of_sorted_rows_have_less_padding(lengths: list[int], budget: int, overhead: int) -> None:
    lengths = sorted(lengths, reverse=True)

    def cost(passes: Sequence[range]) -> int:
        return sum(len(rows) * lengths[rows[0]] + overhead for rows in passes)

    allowed = [
        cuts for cuts in all_cuts(len(lengths))
        if all(len(rows) == 1 or len(rows) * lengths[rows[0]] <= budget for rows in cuts)
    ]  # fmt: skip
    found = least_padded(lengths, budget=budget, overhead=overhead)
    assert found in allowed
    assert cost(found) == min(map(cost, allowed))


def test_prompt_batches_by_hand() -> None:
    prompts, responses = [[1, 1], [2], [1, 1], [2], [3]], [[0] * n for n in (3, 9, 5, 1, 2)]
    # Longest first: prompt 2 (1 + 9), prompt 1 (2 + 5), prompt 3. Budget 12: 1 + 9 + 1 = 11; 2 + 5 + 3 = 10, then 3.
    assert prompt_batches(prompts, responses, budget=12) == [[1, 3], [2, 0], [4]]
    # A prompt that exceeds the budget is spread, and read again in each batch: 1 + 9 | 1 + 1.
    assert prompt_batches(prompts[:2] + prompts[3:4], responses[:2] + responses[3:4], budget=10)[:2] == [[1], [2, 0]]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30)), max_size=60), st.integers(1, 100))
def test_prompt_batches_hold_the_budget_and_every_row_comes_once(rows: list[tuple[int, int]], budget: int) -> None:
    prompts, responses = [[p] * (p + 1) for p, _ in rows], [[0] * n for _, n in rows]
    batches = prompt_batches(prompts, responses, budget=budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    for batch in batches:
        assert batch
        distinct = {tuple(prompts[i]) for i in batch}
        assert len(batch) == 1 or sum(map(len, distinct)) + sum(len(responses[i]) for i in batch) <= budget


@given(lengths_lists, st.integers(1, 3000), st.integers(1, 8), st.integers(0, 20), st.integers(0, 3))
def test_balanced_batches_hold_their_bounds(
    lengths: list[int], budget: int, min_rows: int, extra: int, epoch: int
) -> None:
    max_rows = min_rows + extra
    batches = balanced_batches(
        lengths, tokens_per_batch=budget, min_rows=min_rows, max_rows=max_rows, seed=3, epoch=epoch
    )
    flat = [i for batch in batches for i in batch]
    assert flat == epoch_order(len(lengths), seed=3, epoch=epoch)
    for batch in batches[:-1]:
        assert min_rows <= len(batch) <= max_rows
        assert len(batch) == min_rows or sum(lengths[i] for i in batch) <= budget
    for batch, following in pairwise(batches):
        full = len(batch) == max_rows
        assert full or sum(lengths[i] for i in batch) + lengths[following[0]] > budget
    if len(batches) > 1:
        assert min_rows <= len(batches[-1]) < max_rows + min_rows


def test_a_small_last_batch_is_merged() -> None:
    # Ten equal rows, four a batch by the budget: 4, 4, 2 becomes 4, 6.
    sizes = [len(b) for b in balanced_batches([10] * 10, tokens_per_batch=40, min_rows=3, max_rows=5, seed=0, epoch=0)]
    assert sizes == [4, 6]


def test_the_bounds_of_the_paper_are_the_defaults() -> None:
    def sizes(length: int) -> list[int]:
        return [len(b) for b in balanced_batches([length] * 256, tokens_per_batch=2048, seed=0, epoch=0)]

    assert sizes(2048) == [4] * 64
    assert sizes(1) == [128, 128]


def test_epoch_order_is_a_permutation_that_seed_and_epoch_decide() -> None:
    orders = [epoch_order(50, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert epoch_order(50, seed=1, epoch=1) == orders[3]
    assert epoch_order(0, seed=0, epoch=0) == []


def test_epoch_order_does_not_change_between_releases() -> None:
    assert epoch_order(8, seed=7, epoch=2) == [0, 3, 5, 1, 4, 2, 6, 7]


def test_epoch_order_leaves_the_global_generator_alone() -> None:
    import numpy as np

    np.random.seed(0)
    expected = np.random.random()
    np.random.seed(0)
    epoch_order(10, seed=5, epoch=0)
    assert np.random.random() == expected


def test_impossible_bounds() -> None:
    with pytest.raises(ValueError, match="budget: found 0, expected at least 1"):
        token_budget_batches([1], budget=0, max_rows=1)
    with pytest.raises(ValueError, match="max_rows: found 2, expected at least min_rows = 4"):
        balanced_batches([1], tokens_per_batch=1, min_rows=4, max_rows=2, seed=0, epoch=0)


def test_no_rows() -> None:
    assert token_budget_batches([], budget=1, max_rows=1) == []
    assert balanced_batches([], tokens_per_batch=1, seed=0, epoch=0) == []
