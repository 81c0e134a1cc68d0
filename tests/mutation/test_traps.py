"""The list of wrong versions fits the code and the tests as they are; `make mutate` runs it."""

from __future__ import annotations

import ast
from functools import cache

import pytest

from mutation.mutant import ROOT, Mutation, traps_in
from mutation.traps import MUTATIONS, TRAPS
from mutation.trial import Outcome
from mutation.witness import is_assertion

each = pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.trap} {m.what}")


@cache
def functions_of(file: str) -> frozenset[str]:
    """The names of the functions of a test file."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def test_every_trap_is_planted() -> None:
    assert {mutation.trap for mutation in MUTATIONS} == set(TRAPS) == set(range(1, 32))


@each
def test_it_can_be_planted_and_read_by_python(mutation: Mutation) -> None:
    ast.parse(mutation.text())
    assert mutation.old != mutation.new


@each
def test_its_tests_exist_and_are_named_after_the_trap(mutation: Mutation) -> None:
    assert mutation.tests
    for test in mutation.tests:
        file, _, name = test.partition("::")
        assert name.partition("[")[0] in functions_of(file), test
        assert mutation.trap in traps_in(test), test


def test_no_two_are_the_same() -> None:
    texts = {(mutation.file, mutation.text()) for mutation in MUTATIONS}
    assert len(texts) == len(MUTATIONS) == len({(mutation.trap, mutation.what) for mutation in MUTATIONS})


def test_a_place_that_is_gone_or_not_the_only_one_is_named() -> None:
    for old, count in (("no such line", 0), ("import ", 5)):
        mutation = Mutation(1, "nothing", "rl/masked.py", old, "", ())
        with pytest.raises(ValueError, match=rf"trap 1, nothing: found {count} times in rl/masked.py, expected once"):
            mutation.text()


@pytest.mark.parametrize(
    ("name", "traps"),
    [
        ("test_trap_4_whiten_by_hand", {4}), ("test_trap_19_and_24_no_pair", {19, 24}), ("test_traps_3_and_5_x", {3, 5}),
        ("test_trap_11_15_16_the_order[score]", {11, 15, 16}), ("test_trap_14_k1_and_k3_agree", {14}),
        ("test_trap_22_after_5_steps", {22}), ("test_moments_by_hand", set()),
    ],
)  # fmt: skip
def test_a_test_says_which_traps_it_watches(name: str, traps: set[int]) -> None:
    assert traps_in(f"tests/rl/test_x.py::{name}") == traps


def test_only_a_failed_assertion_in_a_run_that_ended_with_1_is_a_catch() -> None:
    noticed = {"test": "tests/a.py::test_b", "noticed": True, "error": "call: AssertionError: "}
    assert Outcome(1, noticed, "", 0.0).verdict == "a.py::test_b"
    assert Outcome(0, {}, "", 0.0).verdict == "SURVIVED"
    crashed = {**noticed, "noticed": False, "error": "call: TypeError: x"}
    for outcome in (Outcome(1, crashed, "", 0.0), *(Outcome(code, noticed, "", 0.0) for code in (None, 2, 3, 4, 5))):
        assert outcome.caught_by is None
        assert outcome.verdict.startswith("NO VERDICT")


def test_what_counts_as_an_assertion() -> None:
    assert is_assertion(AssertionError("x"))
    assert not is_assertion(ValueError("x"))
    with pytest.raises(pytest.fail.Exception) as caught, pytest.raises(ValueError):
        pass
    assert is_assertion(caught.value)
