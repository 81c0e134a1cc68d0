"""Streams depend on their key alone, never on neighbours, width or anything global."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppomax.engine.randomness import generator_for, seeds_for, uniforms, uniforms_for

keys = st.lists(st.integers(0, 2**64 - 1), max_size=4)


def test_range_dtype_and_distribution() -> None:
    u = uniforms(3, 1, size=200_000)
    assert u.dtype == torch.float32 and u.shape == (200_000,)
    assert float(u.min()) >= 0 and float(u.max()) < 1
    # mean 1/2 and variance 1/12, six standard errors: sqrt(1/12/n) = 6.5e-4
    assert abs(float(u.mean()) - 0.5) < 4e-3 and abs(float(u.var()) - 1 / 12) < 1e-3


def test_a_recorded_stream_never_changes() -> None:
    # Recorded once: a change here changes every recorded run.
    assert uniforms(7, 1, 2, 3, size=3).tolist() == [0.33967041969299316, 0.9433649182319641, 0.3517022132873535]


@given(keys, keys)
@settings(max_examples=200, deadline=None)
def test_different_keys_have_different_streams(a: list[int], b: list[int]) -> None:
    same = uniforms(0, *a, size=8).equal(uniforms(0, *b, size=8))
    assert same == (a == b)


@pytest.mark.parametrize(("a", "b"), [((5,), (5, 0)), ((2**32,), (0, 1)), ((1, 2), (2, 1))])
def test_keys_that_a_plain_seed_sequence_confuses(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    assert not uniforms(*a, size=8).equal(uniforms(*b, size=8))


@given(st.permutations(range(6)), st.integers(1, 9), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_a_row_ignores_order_neighbours_and_width(order: list[int], width: int, rows: int) -> None:
    prompts, samples = torch.tensor([0, 0, 1, 1, 7, 7]), torch.tensor([0, 1, 0, 1, 0, 3])
    whole = uniforms_for(11, 4, prompts, samples, 9)
    chosen = order[:rows]
    part = uniforms_for(11, 4, prompts[chosen], samples[chosen], width)
    assert part.equal(whole[chosen][:, :width])
    assert len({tuple(row) for row in whole.tolist()}) == 6


def test_row_is_the_stream_of_its_key_and_iterations_differ() -> None:
    u = uniforms_for(11, 4, [8], [2], 5)
    assert u[0].equal(uniforms(11, 4, 8, 2, size=5))
    assert not u.equal(uniforms_for(11, 5, [8], [2], 5))
    assert uniforms_for(11, 4, [], [], 5).shape == (0, 5)
    with pytest.raises(ValueError, match="zip"):
        uniforms_for(11, 4, [1, 2], [0], 5)


def test_no_global_state_is_touched() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    uniforms(1, 2, size=10)
    generator_for(1, 2).permutation(10)
    assert before[0].equal(torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_shuffles_repeat_and_differ_by_key() -> None:
    first = generator_for(1, 0).permutation(50)
    assert (first == generator_for(1, 0).permutation(50)).all()
    assert not (first == generator_for(1, 1).permutation(50)).all()


@pytest.mark.parametrize("key", [(-1,), (0, -3), (2**64,)])
def test_keys_out_of_range_are_refused(key: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected integers in 0 \.\. 2\*\*64 - 1"):
        generator_for(*key)


def test_seeds_belong_to_rows_and_differ_in_the_bits_that_a_small_generator_reads() -> None:
    prompts, samples = [4, 4, 0, 9], [0, 1, 0, 0]
    seeds = seeds_for(7, 3, prompts, samples)
    assert seeds == [seeds_for(7, 3, [p], [s])[0] for p, s in zip(prompts, samples, strict=True)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    many = seeds_for(0, 0, range(1000), [0] * 1000) + seeds_for(0, 1, range(1000), [0] * 1000)
    assert len({seed % 2**32 for seed in many}) == 2000
