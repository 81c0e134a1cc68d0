"""A key/value cache that is allocated once and written in place, whose rows come and go while others are decoded.

All rows end at the same column, where the next token goes; each begins where its own prompt begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer


class PreallocatedLayer(CacheLayerMixin):
    """Keys and values [rows, heads, capacity, D]; attention sees `count` rows and `filled` columns, as a view."""

    is_sliding = False

    def __init__(self, rows: int, capacity: int) -> None:
        super().__init__()
        self.rows, self.capacity = rows, capacity
        self.count = self.filled = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        shape = (self.rows, key_states.shape[1], self.capacity)
        self.keys = key_states.new_zeros((*shape, key_states.shape[-1]))
        self.values = value_states.new_zeros((*shape, value_states.shape[-1]))
        self.is_initialized = True

    def _stored(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def take_in(self, keys: Tensor, values: Tensor, source_N: Tensor, column: int) -> None:
        """N more rows, which end before `column`: copies of the rows `source_N` of keys and values [., heads, T, D]."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        end = self.count + len(source_N)
        for stored, new in zip(self._stored(), (keys, values), strict=True):
            stored[self.count : end, :, column - new.shape[2] : column] = new.index_select(0, source_N)
        self.count, self.filled = end, column

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, end = self.filled, self.filled + key_states.shape[-2]
        if end > self.capacity:  # a slice past the end would drop the token without a word
            raise ValueError(f"cache: found {end} tokens, expected at most its capacity of {self.capacity}")
        keys, values = self._stored()
        keys[: self.count, :, start:end] = key_states
        values[: self.count, :, start:end] = value_states
        self.filled = end
        return keys[: self.count, :, :end], values[: self.count, :, :end]

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        # The first versions of transformers 5 give the positions of the query's tokens, later ones their number.
        count = len(query_length) if isinstance(query_length, Tensor) and query_length.ndim else int(query_length)
        return self.filled + count, 0

    def get_seq_length(self) -> int:
        return self.filled

    def get_max_length(self) -> int:
        return self.capacity

    get_max_cache_shape = get_max_length

    def move(self, source_N: Tensor, target_N: Tensor, count: int) -> None:
        """Copy rows to other places; the first `count` rows are then what there is."""
        for stored in self._stored():
            stored[target_N] = stored[source_N]
        self.count = count

    def forget(self, columns: int) -> None:
        """Drop the leftmost columns, which no row uses any more."""
        for stored in self._stored():
            used = stored[: self.count, :, columns : self.filled].clone()
            stored[: self.count, :, : self.filled - columns] = used
        self.filled -= columns


def preallocated_cache(layers: int, rows: int, capacity: int) -> Cache:
    """A cache for `layers` layers of `rows` rows of `capacity` tokens."""
    return Cache(layers=[PreallocatedLayer(rows, capacity) for _ in range(layers)])


def layers_of(cache: Cache) -> list[PreallocatedLayer]:
    """The layers of a preallocated cache."""
    return cache.layers  # type: ignore[return-value]


def take_in(cache: Cache, prefilled: Cache, source_N: Tensor, column: int) -> None:
    """More rows, which end before `column`: copies of the rows `source_N` of a cache that was just prefilled."""
    for layer, new in zip(layers_of(cache), prefilled.layers, strict=True):
        assert isinstance(new, DynamicLayer) and new.keys is not None and new.values is not None
        layer.take_in(new.keys, new.values, source_N, column)


def keep_rows(cache: Cache, rows: Sequence[int]) -> None:
    """Keep the given rows of every layer, each once, in the given order. Rows that stay in place cost nothing."""
    moved = [(source, target) for target, source in enumerate(rows) if source != target]
    device = layers_of(cache)[0].device
    source_N, target_N = torch.tensor(moved, dtype=torch.long, device=device).reshape(-1, 2).unbind(1)
    for layer in layers_of(cache):
        layer.move(source_N, target_N, len(rows))


def forget_columns(cache: Cache, columns: int) -> None:
    """Drop the leftmost columns of every layer."""
    for layer in layers_of(cache):
        layer.forget(columns)


def without(count: int, dropped: Sequence[int]) -> list[int]:
    """The rows that stay of `count`, the last ones in the places of the dropped: few move, and few are copied."""
    gone = set(dropped)
    last = iter([row for row in range(count - 1, -1, -1) if row not in gone])
    return [next(last) if row in gone else row for row in range(count - len(gone))]
