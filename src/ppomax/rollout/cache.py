"""A key/value cache that is allocated once, written in place, and whose rows can be kept, dropped or repeated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


class PreallocatedLayer(CacheLayerMixin):
    """Keys and values [B, heads, capacity, D]; attention sees the filled part only, as a view."""

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.filled = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        shape = (*key_states.shape[:2], self.capacity)
        self.keys = key_states.new_zeros((*shape, key_states.shape[-1]))
        self.values = value_states.new_zeros((*shape, value_states.shape[-1]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        start, end = self.filled, self.filled + key_states.shape[-2]
        if end > self.capacity:  # a slice past the end would drop the token without a word
            raise ValueError(f"cache: found {end} tokens, expected at most its capacity of {self.capacity}")
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        self.filled = end
        if start == 0:  # dense tensors, which batched products read without a copy
            return key_states, value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.filled + int(query_length), 0

    def get_seq_length(self) -> int:
        return self.filled

    def get_max_length(self) -> int:
        return self.capacity

    get_max_cache_shape = get_max_length

    def select(self, rows: Tensor) -> None:
        """Keep the given rows, in the given order; one may be repeated. Rows that stay where they are cost nothing."""
        assert self.keys is not None and self.values is not None
        if len(rows) > len(self.keys):
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
            return
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
        for tensor in (self.keys, self.values):
            tensor[moved] = tensor[rows[moved]]
        self.keys, self.values = self.keys[: len(rows)], self.values[: len(rows)]


def preallocated_cache(layers: int, capacity: int) -> Cache:
    """A cache for `layers` layers of `capacity` tokens."""
    return Cache(layers=[PreallocatedLayer(capacity) for _ in range(layers)])


def select_rows(cache: Cache, rows: Tensor) -> None:
    """Keep the given rows of every layer, in the given order."""
    for layer in cache.layers:
        assert isinstance(layer, PreallocatedLayer)
        layer.select(rows)


def without(count: int, dropped: Sequence[int]) -> list[int]:
    """The rows that stay of `count`, the last ones in the places of the dropped: few move, and few are copied."""
    gone = set(dropped)
    last = iter([row for row in range(count - 1, -1, -1) if row not in gone])
    return [next(last) if row in gone else row for row in range(count - len(gone))]


def row_index(rows: list[int], device: torch.device) -> Tensor:
    """Row numbers as an index tensor."""
    return torch.tensor(rows, dtype=torch.long, device=device)
