"""Decoding with the cache is the full forward pass, also after rows were dropped, reordered and repeated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.architectures import VOCABULARY, policy
from torch import Tensor

from ppomax.models.players import Policy
from ppomax.rollout.cache import PreallocatedLayer, preallocated_cache, row_index, select_rows, without

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


@torch.inference_mode()
def test_decoding_with_the_cache_is_the_full_forward(player: Policy) -> None:
    ids, lengths = left_padded()
    mask, position = masks(lengths)
    cache = preallocated_cache(3, WIDTH + STEPS)
    rows = [ids[i, WIDTH - n :].tolist() for i, n in enumerate(lengths)]
    logits = player.next_logits(ids, mask, position, cache)
    length = torch.tensor(lengths)
    for step in range(STEPS):
        assert logits.dtype == torch.float32
        for i, row in enumerate(rows):
            torch.testing.assert_close(logits[i], full_logits(player, row), atol=TOLERANCE, rtol=1e-5)
        token = torch.tensor([(7 * step + 11 * i) % VOCABULARY for i in range(len(rows))])
        rows = [[*row, int(t)] for row, t in zip(rows, token, strict=True)]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        logits = player.next_logits(token[:, None], mask, length[:, None], cache)
        length = length + 1
    assert cache.layers[0].get_seq_length() == WIDTH + STEPS == cache.layers[2].get_max_length()


@torch.inference_mode()
@pytest.mark.parametrize("chosen", [[2, 0], [3, 3, 1, 1, 1], [1], [3, 2, 1, 0]])
def test_rows_may_be_dropped_reordered_and_repeated(player: Policy, chosen: list[int]) -> None:
    ids, lengths = left_padded()
    mask, position = masks(lengths)
    cache = preallocated_cache(3, WIDTH + STEPS)
    rows = [ids[i, WIDTH - n :].tolist() for i, n in enumerate(lengths)]
    player.next_logits(ids, mask, position, cache)
    index = row_index(chosen, torch.device("cpu"))
    select_rows(cache, index)
    mask, length, rows = mask[index], torch.tensor(lengths)[index], [rows[i] for i in chosen]
    for step in range(3):
        token = torch.arange(len(rows)) + 20 * step + 5
        rows = [[*row, int(t)] for row, t in zip(rows, token, strict=True)]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        logits = player.next_logits(token[:, None], mask, length[:, None], cache)
        length = length + 1
        for i, row in enumerate(rows):
            torch.testing.assert_close(logits[i], full_logits(player, row), atol=TOLERANCE, rtol=1e-5)


def test_a_layer_writes_in_place_and_shows_only_what_is_filled() -> None:
    layer = PreallocatedLayer(capacity=5)
    first = torch.arange(12.0).view(1, 2, 3, 2)
    keys, values = layer.update(first, -first)
    assert torch.equal(keys, first) and torch.equal(values, -first)
    memory = layer.keys.data_ptr()
    keys, values = layer.update(torch.full((1, 2, 1, 2), 50.0), torch.full((1, 2, 1, 2), 60.0))
    assert layer.keys.data_ptr() == memory == keys.data_ptr(), "no copy of the cache"
    assert keys.shape == (1, 2, 4, 2) and torch.equal(keys[:, :, :3], first) and bool((keys[:, :, 3] == 50).all())
    assert torch.equal(values[:, :, :3], -first) and bool((values[:, :, 3] == 60).all())
    assert layer.get_seq_length() == 4 and layer.get_mask_sizes(1) == (5, 0)


def test_more_tokens_than_the_capacity_are_an_error() -> None:
    layer = PreallocatedLayer(capacity=2)
    layer.update(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
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
    layer = PreallocatedLayer(capacity=3)
    x = torch.arange(24.0).view(4, 1, 3, 2)
    layer.update(x, -x)
    memory = layer.keys.data_ptr()
    layer.select(torch.tensor(without(4, [1])))
    assert layer.keys.data_ptr() == memory and torch.equal(layer.keys, x[[0, 3, 2]])
    assert torch.equal(layer.values, -x[[0, 3, 2]])
