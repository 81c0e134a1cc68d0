from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ppomax.data.card import Part, data_card, heldout_learnt_too, lengths
from ppomax.data.readers import read_dialogues, read_pairs
from ppomax.data.split import split_by_key
from ppomax.types import Dialogue


def pair(prompt: str, chosen: str, source: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": "no", "source": source}


def test_a_card_by_hand(write: Callable[..., Path]) -> None:
    path = write(
        pair("a", "x", "s"), pair("a", "x ", "s"), pair("a", "y", "s"), pair("b", "x", "t"), pair("c", "no", "t"),
        pair("d", " ", "t"),
    )  # fmt: skip
    pairs, report = read_pairs(f"{path}#weight=2")
    card = data_card(
        report,
        {"learn": Part(pairs[:3], [4, 8]), "heldout": Part(pairs[3:], [6]), "test": Part([], [])},
        fitted="all fit",
    )
    assert (card["read"], card["kept"], card["fitted"], card["share_a_heldout_prompt"]) == (6, 4, "all fit", 0)
    assert card["dropped"] == {
        "chosen == rejected": {"rows": 1, "first": f"{path}:5"}, "empty chosen": {"rows": 1, "first": f"{path}:6"},
    }  # fmt: skip
    assert card["changed"] == {}
    # The first two rows differ in a blank only.
    assert (card["prompts"], card["repeated_rows"], card["largest_prompt_group"]) == (2, 1, 3)
    assert card["sources"] == {
        "s": {"rows": 3, "prompts": 1, "weights": [2.0]}, "t": {"rows": 1, "prompts": 1, "weights": [2.0]},
    }  # fmt: skip
    assert list(card["parts"]) == ["learn", "heldout"]
    assert card["parts"]["learn"]["rows"] == 3 and card["parts"]["learn"]["prompts"] == 1


def test_lengths() -> None:
    found = lengths([1, 2, 2, 40])
    assert (found["total"], found["median"], found["longest"]) == (45, 2.0, 40)
    assert found["p95"] == pytest.approx(2 + 0.85 * 38)
    histogram = found["histogram"]
    assert sum(histogram["counts"]) == 4 and histogram["edges"][0] == 0 and histogram["edges"][-1] == 40
    assert lengths([]) == {}


def test_a_dialogue_is_repeated_when_prompt_and_last_answer_are(write: Callable[..., Path]) -> None:
    rows = [{"prompt": "a", "response": "x"}, {"prompt": "a", "response": "y"}, {"prompt": "a", "response": "x"}]
    dialogues, report = read_dialogues(str(write(*rows, {"text": "t"}, {"text": "t"})))
    card = data_card(report, {"learn": Part(dialogues, [3])}, fitted="")
    assert card["repeated_rows"] == 2


def test_the_parts_of_a_split_share_no_prompt(write: Callable[..., Path]) -> None:
    pairs, report = read_pairs(str(write(*[pair(str(i % 30), str(i), "st"[i % 2]) for i in range(90)])))
    learn, held = split_by_key(pairs, {"s": 4, "t": 2}, seed=0)
    card = data_card(report, {"learn": Part(learn, [1]), "heldout": Part(held, [1])}, fitted="")
    assert card["parts"]["learn"]["prompts"] + card["parts"]["heldout"]["prompts"] == card["prompts"] == 30
    assert (card["parts"]["heldout"]["rows"], card["largest_prompt_group"]) == (18, 3)


def test_held_out_dialogues_of_which_an_answer_is_learnt_are_counted(write: Callable[..., Path]) -> None:
    def cut(*texts: str, weight: int = 1) -> dict[str, Any]:
        return {
            "messages": [
                {"role": "assistant", "content": text, "weight": weight} if i % 2 else {"role": "user", "content": text}
                for i, text in enumerate(texts)
            ]
        }

    def read(*rows: dict[str, Any]) -> list[Dialogue]:
        return read_dialogues(str(write(*rows)))[0]

    whole, first, alike = cut("q", "a", "r", "b"), cut("q", "a"), cut("q ", "else", "s", "c")
    others = [cut("r", "b"), cut("x", "a", "r", "b"), {"text": "q"}]
    for learn, held, count in (
        ([whole], [first, *others], 1), ([first], [whole, alike, *others], 2), ([first, whole], others, 0),
        ([], [whole], 0), ([whole], [], 0),
    ):  # fmt: skip
        assert heldout_learnt_too(read(*learn, {"text": "t"}), read(*held, {"text": "u"})) == count
    # What is only read is not learnt.
    read_only = cut("q", "a", "r", "b")
    read_only["messages"][1]["weight"] = 0
    assert heldout_learnt_too(read(read_only), read(first)) == 0
