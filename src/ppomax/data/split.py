"""Train and held-out rows that share no prompt, whatever the order of the rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol, TypeVar

from ppomax.types import DataError


class Keyed(Protocol):
    """A row that knows which prompt it belongs to."""

    @property
    def key(self) -> str: ...


T = TypeVar("T", bound=Keyed)


def split_by_key(rows: Sequence[T], heldout: float | int, seed: int) -> tuple[list[T], list[T]]:
    """Split rows into (train, heldout) by a hash of (seed, key); both keep the order of `rows`.

    A float in (0, 1) is the chance of each prompt to be held out: a prompt's side never depends on the other rows.
    An int is an exact number of distinct prompts: those with the smallest hashes.
    """
    keys = sorted({row.key for row in rows}, key=lambda key: _hash(seed, key))
    if isinstance(heldout, float):
        if not 0 < heldout < 1:
            raise DataError(f"held-out fraction: found {heldout}, expected 0 < fraction < 1 (an integer is a count)")
        held = {key for key in keys if _hash(seed, key) < heldout * 2**64}
    else:
        if not 0 < heldout < len(keys):
            raise DataError(f"held-out count: found {heldout}, expected 1 to {len(keys) - 1} of {len(keys)} prompts")
        held = set(keys[:heldout])
    if not held or len(held) == len(keys):
        raise DataError(
            f"held-out fraction {heldout} of {len(keys)} prompts leaves one side empty; give a count or more data"
        )
    return [row for row in rows if row.key not in held], [row for row in rows if row.key in held]


def _hash(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big")
