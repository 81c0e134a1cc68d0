"""Counter-based random numbers: every stream is named by (seed, *key) and no global seed is ever touched.

A row's uniforms depend on its own key alone, so batch size, neighbours and the number of processes change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def generator_for(seed: int, *key: int) -> np.random.Generator:
    """The numpy Generator named by (seed, *key), e.g. for the shuffle of one epoch.

    Two uses that share a seed need keys that differ: put a constant per purpose first.
    Source: Philox4x64-10, Salmon et al. (2011), "Parallel random numbers: as easy as 1, 2, 3".
    """
    values = [int(value) for value in (seed, *key)]
    if any(not 0 <= value < 2**64 for value in values):
        raise ValueError(f"seed and key: found {values}, expected integers in 0 .. 2**64 - 1")
    # SeedSequence([5]) equals SeedSequence([5, 0]), and 2**32 equals [0, 1]: the count and two fixed words per
    # value keep all keys apart.
    words = [len(values)] + [word for value in values for word in (value & 0xFFFFFFFF, value >> 32)]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def uniforms(seed: int, *key: int, size: int) -> Tensor:
    """`size` uniforms of the stream (seed, *key): float32 [size], multiples of 2**-24 in [0, 1), never 1.

    A longer draw begins with the shorter one.
    """
    return torch.from_numpy(generator_for(seed, *key).random(size, dtype=np.float32))


def uniforms_for(
    seed: int, iteration: int, prompt_index_B: Tensor | Sequence[int], sample_B: Tensor | Sequence[int], width: int
) -> Tensor:
    """Uniforms for the tokens of a batch: float32 [B, width] in [0, 1), row b from its own stream.

    The stream of row b is (seed, iteration, prompt_index_B[b], sample_B[b]); column r is for response token r.
    """
    prompts = [int(index) for index in prompt_index_B]
    samples = [int(index) for index in sample_B]
    rows = [uniforms(seed, iteration, p, s, size=width) for p, s in zip(prompts, samples, strict=True)]
    return torch.stack(rows) if rows else torch.empty(0, width)


def seeds_for(seed: int, iteration: int, prompts: Sequence[int], samples: Sequence[int]) -> list[int]:
    """One seed below 2**63 per row, for samplers with generators of their own: from the streams of `uniforms_for`."""
    generators = (generator_for(seed, iteration, p, s) for p, s in zip(prompts, samples, strict=True))
    return [int(generator.integers(2**63, dtype=np.uint64)) for generator in generators]
