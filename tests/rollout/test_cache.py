"""Decoding with the cache is the full forward pass, also after rows were dropped, reordered and repeated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.architectures import VOCABULARY, policy
from torch import Tensor
from transformers import Cache, DynamicCache

from ppomax.models.players import Policy
from ppomax.rollout.cache import (
    PreallocatedLayer,
    forget_columns,
    keep_rows,
    layers_of,
    preallocated_cache,
    take_in,
    without,
)

TOLERANCE = 1e-5
WIDTH, STEPS = 9, 6


@pytest.fixture
def player(lively: str) -> Policy:
    """A whole, frozen policy of three layers."""
    return policy(lively)


def left_padded() -> tuple[Tensor, list[int]]:
    """[4, WIDTH] ids whose first WIDTH − length entries are padding."""
    draw = torch.Generator().manual_seed(3)
    lengths = [9, 4, 6, 1]
    return torch.randint(3, VOCABULARY, (4, WIDTH), generator=draw), lengths


def masks(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Attention mask and positions of left-padded rows."""
    start = WIDTH - torch.tensor(lengths)[:, None]
    t = torch.arange(WIDTH)[None, :]
    return (t >= start).long(), (t - start).clamp(min=0)


def full_logits(player: Policy, ids: list[int]) -> Tensor:
    """[V] after the last id, without cache, mask or neighbours."""
    return player.model(torch.tensor([ids])).logits[0, -1]


def logits_of(player: Policy, states_BH: Tensor) -> Tensor:
    """[B, V] of the sampler's states."""
    of = player.unembed(states_BH)
    return of.logits(slice(0, len(states_BH)), 1.0, of.room()).T


def prefilled(player: Policy, source: list[int]) -> tuple[Cache, list[list[int]], Tensor, Tensor]:
    """A cache of the given rows, room for two more and for STEPS tokens; their ids, where they start, their logits."""
    ids, lengths = left_padded()
    mask, position = masks(lengths)
    cache, new, index = preallocated_cache(3, len(source) + 2, WIDTH + STEPS), DynamicCache(), torch.tensor(source)
    logits = logits_of(player, player.next_states(ids, mask, position, new))
    take_in(cache, new, index, WIDTH)
    rows = [ids[i, WIDTH - lengths[i] :].tolist() for i in source]
    return cache, rows, WIDTH - torch.tensor(lengths)[index], logits[index]


def expect_steps(
    player: Policy, cache: Cache, rows: list[list[int]], start_B: Tensor, column: int, *, steps: int
) -> None:
    """Some more tokens, after each of which the logits are those of the whole row read at once."""
    for step in range(steps):
        token = torch.tensor([(7 * step + 11 * i) % VOCABULARY for i in range(len(rows))])
        rows[:] = [[*row, int(t)] for row, t in zip(rows, token, strict=True)]
        mask = (torch.arange(column + 1)[None, :] >= start_B[:, None]).long()
        states = player.next_states(token[:, None], mask, (column - start_B)[:, None], cache)
        logits = logits_of(player, states)
        assert logits.dtype == torch.float32
        for i, row in enumerate(rows):
            torch.testing.assert_close(logits[i], full_logits(player, row), atol=TOLERANCE, rtol=1e-5)
        column += 1
    assert cache.layers[0].get_seq_length() == column == cache.layers[2].get_seq_length()


@torch.inference_mode()
@pytest.mark.parametrize("source", [[0, 1, 2, 3], [3, 3, 1, 1, 1], [1]])
def test_decoding_with_the_cache_is_the_full_forward(player: Policy, source: list[int]) -> None:
    cache, rows, start_B, logits = prefilled(player, source)
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i], full_logits(player, row), atol=TOLERANCE, rtol=1e-5)
    expect_steps(player, cache, rows, start_B, WIDTH, steps=STEPS)
    assert cache.layers[0].get_seq_length() == WIDTH + STEPS == cache.layers[2].get_max_length()


@torch.inference_mode()
@pytest.mark.parametrize("chosen", [[2, 0], [1], [3, 2, 1, 0]])
def test_rows_may_be_dropped_and_reordered(player: Policy, chosen: list[int]) -> None:
    cache, rows, start_B, _ = prefilled(player, [0, 1, 2, 3])
    keep_rows(cache, chosen)
    expect_steps(player, cache, [rows[i] for i in chosen], start_B[chosen], WIDTH, steps=3)


@torch.inference_mode()
def test_rows_come_in_while_others_are_decoded_and_columns_without_a_row_go(player: Policy) -> None:
    cache, rows, start_B, _ = prefilled(player, [0, 1, 2, 3])
    expect_steps(player, cache, rows, start_B, WIDTH, steps=2)
    keep_rows(cache, [1, 3])  # rows of 4 and 1 tokens, two more by now
    rows, start_B, column = [rows[1], rows[3]], start_B[[1, 3]], WIDTH + 2
    ids = torch.tensor([[9, 8, 7], [6, 6, 5]])
    mask, new = torch.tensor([[1, 1, 1], [0, 1, 1]]), DynamicCache()
    player.next_states(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), new)
    take_in(cache, new, torch.tensor([1, 0, 1]), column)
    rows += [[6, 5], [9, 8, 7], [6, 5]]
    start_B = torch.cat([start_B, column - torch.tensor([2, 3, 2])])
    expect_steps(player, cache, rows, start_B, column, steps=3)
    free = int(start_B.min())
    assert free == 5
    forget_columns(cache, free)
    expect_steps(player, cache, rows, start_B - free, column + 3 - free, steps=5)
    # When all have gone, the next ones begin at the left again.
    keep_rows(cache, [])
    take_in(cache, new, torch.tensor([0]), 3)
    expect_steps(player, cache, [[9, 8, 7]], torch.tensor([0]), 3, steps=4)


def test_a_layer_writes_in_place_and_shows_only_what_is_filled() -> None:
    layer = PreallocatedLayer(rows=2, capacity=5)
    first = torch.arange(12.0).view(1, 2, 3, 2)
    layer.take_in(first, -first, torch.tensor([0]), 3)
    memory = layer.keys.data_ptr()
    keys, values = layer.update(torch.full((1, 2, 1, 2), 50.0), torch.full((1, 2, 1, 2), 60.0))
    assert layer.keys.data_ptr() == memory == keys.data_ptr(), "no copy of the cache"
    assert keys.shape == (1, 2, 4, 2) and torch.equal(keys[:, :, :3], first) and bool((keys[:, :, 3] == 50).all())
    assert torch.equal(values[:, :, :3], -first) and bool((values[:, :, 3] == 60).all())
    assert layer.get_seq_length() == 4 and layer.get_mask_sizes(1) == (5, 0)
    # transformers 5.0 gives positions instead of their number.
    assert layer.get_mask_sizes(torch.tensor([4])) == (5, 0) and layer.get_mask_sizes(torch.tensor([4, 5])) == (6, 0)


def test_more_tokens_than_the_capacity_are_an_error() -> None:
    layer = PreallocatedLayer(rows=1, capacity=2)
    layer.take_in(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), torch.tensor([0]), 2)
    with pytest.raises(ValueError, match="found 3 tokens, expected at most its capacity of 2"):
        layer.update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))


@pytest.mark.parametrize(
    ("count", "dropped", "expected"),
    [(4, [1], [0, 3, 2]), (4, [3], [0, 1, 2]), (5, [0, 4], [3, 1, 2]), (5, [0, 1, 2], [4, 3]), (3, [0, 1, 2], [])],
)
def test_the_last_rows_take_the_places_of_the_dropped(count: int, dropped: list[int], expected: list[int]) -> None:
    assert without(count, dropped) == expected


@given(st.integers(1, 40), st.sets(st.integers(0, 39)))
def test_the_rows_that_stay_are_those_that_were_not_dropped(count: int, dropped: set[int]) -> None:
    gone = {row for row in dropped if row < count}
    kept = without(count, sorted(gone))
    assert sorted(kept) == [row for row in range(count) if row not in gone]
    # Every row below the new count that was not dropped stays where it is.
    assert all(kept[row] == row for row in range(len(kept)) if row not in gone)


def test_rows_that_stay_are_not_copied() -> None:
    cache = preallocated_cache(1, rows=4, capacity=3)
    layer = layers_of(cache)[0]
    x = torch.arange(24.0).view(4, 1, 3, 2)
    layer.take_in(x, -x, torch.arange(4), 3)
    memory = layer.keys.data_ptr()
    keep_rows(cache, without(4, [1]))
    assert layer.keys.data_ptr() == memory and torch.equal(layer.keys[:3], x[[0, 3, 2]])
    assert torch.equal(layer.values[:3], -x[[0, 3, 2]])
