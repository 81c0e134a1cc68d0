from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppomax.data.split import by_weight, copies, split_by_key
from ppomax.types import DataError, Pair


def pair(key: str, chosen: str = "a", source: str = "default", weight: float = 1.0) -> Pair:
    return Pair(({"role": "user", "content": key},), chosen, "b", key, source, weight=weight)


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


MIXED = [pair(f"{i % 150}", chosen=str(i), source="helpful" if i % 150 < 100 else "harmless") for i in range(400)]


def held_prompts(heldout: float | int | dict[str, int], **options: str) -> tuple[int, int]:
    """Held-out prompts of the helpful and of the harmless rows of MIXED."""
    held = {(row.source, row.key) for row in split_by_key(MIXED, heldout, seed=1, **options)[1]}
    return sum(s == "helpful" for s, _ in held), sum(s == "harmless" for s, _ in held)


def test_a_count_is_shared_out_in_proportion_to_the_sources() -> None:
    # Two thirds of the prompts are helpful.
    assert [held_prompts(n) for n in (3, 30, 31, 32)] == [(2, 1), (20, 10), (21, 10), (21, 11)]


def test_counts_by_source() -> None:
    assert held_prompts({"helpful": 7, "harmless": 3}) == (7, 3)
    assert held_prompts({"harmless": 50}) == (0, 50)


def test_another_purpose_is_another_draw_of_the_same_size() -> None:
    draws = [{row.key for row in split_by_key(MIXED, 40, 1, purpose=purpose)[1]} for purpose in ("", "test")]
    assert draws[0] != draws[1] and len(draws[0]) == len(draws[1]) == 40
    # Independent draws: what is left after the first is as likely as anything to be in the second.
    rest, _ = split_by_key(MIXED, 0.5, 1, purpose="test")
    assert 0.3 < len({row.key for row in split_by_key(rest, 0.5, 1)[1]}) / len({row.key for row in rest}) < 0.7


def test_a_prompt_in_two_sources_has_one_side() -> None:
    rows = [pair(str(i), source=source) for i in range(20) for source in ("b", "a")]
    train, held = split_by_key(rows, 5, seed=0)
    assert (len(train), len(held)) == (30, 10) and not {row.key for row in train} & {row.key for row in held}


@given(st.permutations(range(60)))
def test_trap_31_counts_by_source_do_not_depend_on_the_order(order: list[int]) -> None:
    rows = [pair(str(i % 40), chosen=str(i), source="ab"[i % 2]) for i in range(60)]
    for heldout in (9, {"a": 4, "b": 2}):
        expected = {row.chosen for row in split_by_key(rows, heldout, 3)[1]}
        assert {row.chosen for row in split_by_key([rows[i] for i in order], heldout, 3)[1]} == expected


def test_weights_repeat_rows() -> None:
    rows = [pair(str(i), weight=2.25) for i in range(1000)]
    times = [copies(row.weight, 0, row.key) for row in rows]
    assert set(times) == {2, 3}
    # A thousand draws at 0.25: standard deviation 14.
    assert 200 < times.count(3) < 300
    assert len(by_weight(rows, 0)) == sum(times)
    assert by_weight([pair("x"), pair("y", weight=3)], 0) == [pair("x"), *[pair("y", weight=3)] * 3]
    half = [pair(str(i), weight=0.5) for i in range(1000)]
    assert 400 < len(by_weight(half, 0)) < 600
    assert by_weight(half, 0) != by_weight(half, 1)


def test_the_seed_changes_the_split() -> None:
    assert split_by_key(ROWS, 40, seed=1)[1] != split_by_key(ROWS, 40, seed=2)[1]


@pytest.mark.parametrize(("heldout", "sizes"), [(1e-9, (199, 1)), (1 - 1e-9, (1, 199))])
def test_a_share_that_would_leave_a_side_empty_leaves_it_one_prompt(heldout: float, sizes: tuple[int, int]) -> None:
    sides = split_by_key(ROWS, heldout, seed=1)
    assert tuple(len({row.key for row in side}) for side in sides) == sizes
    assert split_by_key(ROWS[::-1], heldout, seed=1)[1] == sides[1][::-1]
    with pytest.raises(DataError, match="leaves one side empty"):
        split_by_key(ROWS[:1], heldout, seed=1)


@pytest.mark.parametrize(
    ("heldout", "message"),
    [
        (0.0, "found 0.0, expected 0 < fraction < 1"),
        (1.0, r"found 1.0, expected 0 < fraction < 1 \(an integer is a count\)"),
        (0, "count: found 0, expected 1 to 199 of 200 prompts"),
        (200, "count: found 200, expected 1 to 199"),
        ({"default": 0}, "leaves one side empty"),
        ({"default": 201}, "held-out count of source 'default': found 201, expected 0 to 200"),
        ({"helpful": 3}, "held-out source 'helpful': found no such rows, expected one of default"),
    ],
)
def test_impossible_sizes(heldout: float, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_by_key(ROWS, heldout, seed=1)
