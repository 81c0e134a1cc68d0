"""Train and held-out rows that share no prompt, whatever the order of the rows; and how often an epoch reads a row."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from ppomax.types import DataError

Size = float | int | Mapping[str, int]


class Keyed(Protocol):
    """A row that knows which prompt it belongs to, where it came from and how much it weighs."""

    @property
    def key(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def weight(self) -> float: ...


T = TypeVar("T", bound=Keyed)


def split_by_key(rows: Sequence[T], heldout: Size, seed: int, *, purpose: str = "") -> tuple[list[T], list[T]]:
    """Split rows into (train, heldout) by a hash of (purpose, seed, key); both keep the order of `rows`.

    A float in (0, 1) is the chance of each prompt to be held out: a prompt's side never depends on the other rows, but
    that neither side is left empty: the prompt that was nearest to the other side is then there.
    An int is an exact number of distinct prompts, shared out over the sources in proportion to their prompts. A mapping
    is the number of prompts by source. Of every source, those with the smallest hashes are held out.
    """
    hashes = {key: _hash(seed, purpose + key) for key in {row.key for row in rows}}
    if isinstance(heldout, float):
        if not 0 < heldout < 1:
            raise DataError(f"held-out fraction: found {heldout}, expected 0 < fraction < 1 (an integer is a count)")
        held = {key for key in hashes if hashes[key] < heldout * 2**64}
        held = held or {min(hashes, key=lambda key: (hashes[key], key))}
        if len(held) == len(hashes):
            held.discard(max(hashes, key=lambda key: (hashes[key], key)))
    else:
        by_source = _keys_by_source(rows)
        for keys in by_source.values():
            keys.sort(key=lambda key: hashes[key])
        if isinstance(heldout, int):
            if not 0 < heldout < len(hashes):
                raise DataError(
                    f"held-out count: found {heldout}, expected 1 to {len(hashes) - 1} of {len(hashes)} prompts"
                )
            counts = _in_proportion(heldout, {source: len(keys) for source, keys in by_source.items()})
        else:
            counts = _checked(heldout, by_source)
        held = {key for source, count in counts.items() for key in by_source[source][:count]}
    if not held or len(held) == len(hashes):
        kind = "fraction" if isinstance(heldout, float) else "size"
        raise DataError(
            f"held-out {kind} {heldout} of {len(hashes)} prompts leaves one side empty; give a count or more data"
        )
    return [row for row in rows if row.key not in held], [row for row in rows if row.key in held]


def copies(weight: float, seed: int, key: str) -> int:
    """How often an epoch reads a row: `weight` times, its fraction being the chance of one time more.

    All rows of one key agree, whatever the other rows are.
    """
    whole = int(weight)
    return whole + (_hash(seed, f"weight:{key}") < (weight - whole) * 2**64)


def weighted_order(rows: Sequence[Keyed], seed: int) -> list[int]:
    """The indices of an epoch: each row as often as its weight says. DataError if none is left."""
    order = [i for i, row in enumerate(rows) for _ in range(copies(row.weight, seed, row.key))]
    if rows and not order:
        raise DataError(f"the weights of the files leave none of {len(rows)} rows; give larger ones")
    return order


def by_weight(rows: Sequence[T], seed: int) -> list[T]:
    """The rows of an epoch."""
    return [rows[i] for i in weighted_order(rows, seed)]


def _keys_by_source(rows: Sequence[Keyed]) -> dict[str, list[str]]:
    """Distinct keys by source; a key in several sources belongs to the first by name."""
    source_of: dict[str, str] = {}
    for row in rows:
        source_of[row.key] = min(row.source, source_of.get(row.key, row.source))
    return {
        source: [key for key, its in source_of.items() if its == source] for source in sorted(set(source_of.values()))
    }


def _in_proportion(total: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """`total` shared out by size; what rounding leaves goes to the largest remainders."""
    everything = sum(sizes.values())
    exact = {source: total * size / everything for source, size in sizes.items()}
    shares = {source: int(share) for source, share in exact.items()}
    by_remainder = sorted(exact, key=lambda source: (shares[source] - exact[source], source))
    for source in by_remainder[: total - sum(shares.values())]:
        shares[source] += 1
    return shares


def _checked(counts: Mapping[str, int], by_source: Mapping[str, Sequence[str]]) -> Mapping[str, int]:
    for source, count in counts.items():
        if source not in by_source:
            raise DataError(f"held-out source '{source}': found no such rows, expected one of {', '.join(by_source)}")
        if not 0 <= count <= len(by_source[source]):
            raise DataError(
                f"held-out count of source '{source}': found {count}, expected 0 to {len(by_source[source])} prompts"
            )
    return counts


def _hash(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big")
