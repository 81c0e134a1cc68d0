from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppomax.data.split import split_by_key
from ppomax.types import DataError, Pair


def pair(key: str, chosen: str = "a") -> Pair:
    return Pair(({"role": "user", "content": key},), chosen, "b", key)


ROWS = [pair(f"{i % 200}", chosen=str(i)) for i in range(300)]


@given(st.permutations(range(60)), st.integers(0, 5))
def test_trap_31_a_prompt_keeps_its_side_whatever_the_order(order: list[int], seed: int) -> None:
    rows = [pair(str(i % 40), chosen=str(i)) for i in range(60)]
    for heldout in (0.3, 12):
        train, held = split_by_key(rows, heldout, seed)
        shuffled_train, shuffled_held = split_by_key([rows[i] for i in order], heldout, seed)
        assert {row.chosen for row in held} == {row.chosen for row in shuffled_held}
        assert {row.chosen for row in train} == {row.chosen for row in shuffled_train}


@pytest.mark.parametrize("heldout", [0.2, 40])
def test_trap_31_sides_share_no_key_lose_no_row_and_keep_the_order(heldout: float) -> None:
    train, held = split_by_key(ROWS, heldout, seed=1)
    assert not {row.key for row in train} & {row.key for row in held}
    assert sorted(train + held, key=lambda row: int(row.chosen)) == ROWS
    assert [int(row.chosen) for row in train] == sorted(int(row.chosen) for row in train)


def test_a_fraction_decides_each_prompt_alone() -> None:
    _, held = split_by_key(ROWS, 0.2, seed=1)
    _, held_of_fewer = split_by_key(ROWS[:150], 0.2, seed=1)
    assert {row.key for row in held_of_fewer} == {row.key for row in held} & {str(i) for i in range(150)}
    # 200 prompts at 0.2: mean 40, standard deviation 5.7.
    assert 20 <= len({row.key for row in held}) <= 60


def test_a_count_is_exact_in_prompts() -> None:
    _, held = split_by_key(ROWS, 37, seed=1)
    assert len({row.key for row in held}) == 37


def test_the_seed_changes_the_split() -> None:
    assert split_by_key(ROWS, 40, seed=1)[1] != split_by_key(ROWS, 40, seed=2)[1]


@pytest.mark.parametrize(
    ("heldout", "message"),
    [
        (0.0, "found 0.0, expected 0 < fraction < 1"),
        (1.0, r"found 1.0, expected 0 < fraction < 1 \(an integer is a count\)"),
        (0, "count: found 0, expected 1 to 199 of 200 prompts"),
        (200, "count: found 200, expected 1 to 199"),
        (1e-9, "leaves one side empty"),
    ],
)
def test_impossible_sizes(heldout: float, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_by_key(ROWS, heldout, seed=1)
