"""Weighted sums of rewards: parsed, kept apart by name, added with their weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.architectures import scalar

from ppomax.data.chat import render_prompt, render_response
from ppomax.rewards.mixture import Term, is_function, parse_terms, score_texts, weighted_sum
from ppomax.rewards.model import RewardModel
from ppomax.types import DataError, Message, Prompt, Rollout, SetupError

TEXTS = ["abc", "de"]


def rollout_of(columns: tuple[dict[str, Any], dict[str, Any]] = ({}, {})) -> Rollout:
    """Two rows whose responses have 4 and 2 tokens."""
    prompts = tuple(
        Prompt((Message(role="user", content=t),), key=t, columns=c) for t, c in zip("xy", columns, strict=True)
    )
    return Rollout(
        prompts, ((1, 5), (1, 6)), torch.tensor([[7, 8, 9, 2], [7, 2, 0, 0]]), torch.tensor([4, 2]),
        torch.zeros(2, 4), torch.tensor([False, False]), torch.zeros(2, dtype=torch.long),
    )  # fmt: skip


def length(prompts: Any, responses: list[str], **columns: Any) -> list[float]:
    return [float(len(r)) for r in responses]


def steps(prompts: Any, responses: list[str], **columns: Any) -> list[list[float]]:
    return [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0]]


@pytest.mark.parametrize(
    ("spec", "term"),
    [
        ("0.7*runs/rm/final", (0.7, "runs/rm/final")),
        ("-0.3*pkg.mod:fn", (-0.3, "pkg.mod:fn")),
        ("+2*dir", (2.0, "dir")),
        (".5 * dir", (0.5, "dir")),
        (" 1e-3 *  a b ", (1e-3, "a b")),
        ("0*dir", (0.0, "dir")),
        ("2.*dir", (2.0, "dir")),
        ("pkg:fn", (1.0, "pkg:fn")),
        ("runs/3/final", (1.0, "runs/3/final")),
        ("runs/*odd", (1.0, "runs/*odd")),
        ("3*4*dir", (3.0, "4*dir")),
    ],
)
def test_specs_are_a_weight_and_a_name(spec: str, term: tuple[float, str]) -> None:
    assert parse_terms((spec,)) == [term]


def test_several_terms_keep_their_order() -> None:
    assert parse_terms(("0.7*dir", "0.3*mod:fn")) == [(0.7, "dir"), (0.3, "mod:fn")]


def test_no_reward_at_all_is_an_error() -> None:
    with pytest.raises(SetupError, match="reward: found none, expected a reward-model directory or module:function"):
        parse_terms(())


@pytest.mark.parametrize("spec", ["mod:fn", "pkg.mod:fn", "_a1.b:_f"])
def test_functions_are_recognised(spec: str) -> None:
    assert is_function(spec)


@pytest.mark.parametrize("spec", ["runs/rm/final", "owner/name", "C:\\model", "mod:", ":fn", "a:b:c", "/x:y", "tiny"])
def test_everything_else_is_a_model(spec: str) -> None:
    assert not is_function(spec)


def test_trap_16_components_are_unweighted_and_the_sum_is_weighted() -> None:
    terms = [Term("length", 2.0, length), Term("minus", -0.5, lambda p, r, **c: [10.0, 20.0])]
    components, dense = score_texts(terms, rollout_of(), TEXTS)
    assert dense is None
    assert {name: c.tolist() for name, c in components.items()} == {"length": [3.0, 2.0], "minus": [10.0, 20.0]}
    # 2·3 − 0.5·10 = 1 and 2·2 − 0.5·20 = −6.
    total = weighted_sum(terms, components)
    assert total.tolist() == [1.0, -6.0] and total.dtype == torch.float32


def test_dense_rewards_are_weighted_placed_by_token_and_add_up() -> None:
    terms = [Term("steps", 0.5, steps), Term("length", 1.0, length), Term("again", -1.0, steps)]
    components, dense = score_texts(terms, rollout_of(), TEXTS)
    assert components["steps"].tolist() == [0.0, 0.0] == components["again"].tolist()
    assert weighted_sum(terms, components).tolist() == [3.0, 2.0]
    # (0.5 − 1) times 1 2 3 4 and 5 6, zero beyond the response.
    assert dense is not None and dense.tolist() == [[-0.5, -1.0, -1.5, -2.0], [-2.5, -3.0, 0.0, 0.0]]


def test_functions_see_prompts_texts_and_columns() -> None:
    seen: dict[str, Any] = {}

    def watch(prompts: Any, responses: Any, **columns: Any) -> list[float]:
        seen.update(prompts=prompts, responses=responses, columns=columns)
        return [0.0, 0.0]

    score_texts([Term("watch", 1.0, watch)], rollout_of(({"gold": 3}, {"gold": 4, "more": "z"})), TEXTS)
    assert [p[0]["content"] for p in seen["prompts"]] == ["x", "y"] and seen["responses"] == TEXTS
    # The sampled ids come without padding, so that a dense reward knows its tokens.
    assert seen["columns"] == {"gold": [3, 4], "more": [None, "z"], "response_ids": [[7, 8, 9, 2], [7, 2]]}


def test_models_that_read_ids_are_left_to_the_ids(lively_reward: str, tiny_tokenizer: Any) -> None:
    def model(name: str, reads_ids: bool) -> Term:
        return Term(name, 1.0, RewardModel(name, scalar(lively_reward), tiny_tokenizer, reads_ids, 4096, 256))

    components, _ = score_texts([model("ids", True), model("text", False)], rollout_of(), TEXTS)
    assert set(components) == {"text"}
    rows = [
        (render_prompt(tiny_tokenizer, p.messages), render_response(tiny_tokenizer, text))
        for p, text in zip(rollout_of().prompts, TEXTS, strict=True)
    ]
    assert components["text"].tolist() == pytest.approx(model("x", True).reward.score_rows(rows), abs=1e-5)


def test_sums_that_leave_float32_are_refused() -> None:
    terms = [Term("one", 1.0, length), Term("other", 10.0, length)]
    message = r"reward: response 1: found inf as 1 × one \+ 10 × other, expected a finite number"
    with pytest.raises(DataError, match=message):
        weighted_sum(terms, {"one": torch.tensor([1.0, 2.0]), "other": torch.tensor([1e37, 1e38])})
    with pytest.raises(DataError, match="reward: response 0: found -inf as -10 × steps"):
        score_texts([Term("steps", -10.0, lambda p, r, **c: [[1.0, 2.0, 1e38, 4.0], [5.0, 6.0]])], rollout_of(), TEXTS)
