"""What a reward model learns from and is judged on: sizes by source, file weights, the test set, the data card."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from ppomax.data.chat import CHATML
from ppomax.models.load import load_tokenizer
from ppomax.stages.reward import reward
from ppomax.stages.reward_data import reward_rows
from ppomax.types import DataError
from stages.conftest import Toys, Trained
from stages.toy import pair_rows, reward_config, write_rows


def test_three_sides_with_sizes_by_source_share_no_prompt(tmp_path: Path, toys: Toys, trained: Trained) -> None:
    sizes = {"heldout": {"a": 3, "r": 2}, "test": {"s": 5}}
    data = reward_rows(reward_config(tmp_path, trained.sft, toys.pairs, **sizes), load_tokenizer(trained.sft))
    assert Counter(row.source for row in data.heldout) == {"a": 3, "r": 2}
    assert Counter(row.source for row in data.test) == {"s": 5}
    sides = [{row.key for row in rows} for rows in (data.learn, data.heldout, data.test)]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 225
    assert {name: part["prompts"] for name, part in data.card["parts"].items()} == {
        "learn": 215, "heldout": 5, "test": 5,
    }  # fmt: skip


def test_a_heavy_file_is_read_more_often_and_a_light_one_less(tmp_path: Path, trained: Trained) -> None:
    rows = pair_rows()
    heavy, light = write_rows(tmp_path / "a.jsonl", rows[:100]), write_rows(tmp_path / "b.jsonl", rows[100:200])
    config = reward_config(tmp_path, trained.sft, f"{heavy}#source=a&weight=2", heldout={"a": 10})
    config = config.model_copy(update={"data": (*config.data, f"{light}#source=b&weight=0.25")})
    data = reward_rows(config, load_tokenizer(trained.sft))
    times = Counter((row.source, row.key) for row in data.learn)
    assert {n for (source, _), n in times.items() if source == "a"} == {2}
    assert {n for (source, _), n in times.items() if source == "b"} == {1}
    # A hundred draws at a quarter: standard deviation 4.3.
    assert 10 < sum(source == "b" for source, _ in times) < 40
    # Held-out rows count once.
    assert len(data.heldout) == len({row.key for row in data.heldout}) == 10
    assert data.card["sources"]["b"] == {"rows": 100, "prompts": 100, "weights": [0.25]}


def test_weights_that_leave_nothing(tmp_path: Path, trained: Trained) -> None:
    data = write_rows(tmp_path / "a.jsonl", pair_rows()[:5])
    config = reward_config(tmp_path, trained.sft, f"{data}#weight=1e-9", heldout=0)
    with pytest.raises(DataError, match="the weights of the files leave none of 5 rows"):
        reward_rows(config, load_tokenizer(trained.sft))


def test_the_summary_is_of_the_test_rows_and_the_card_is_in_the_run(
    tmp_path: Path, toys: Toys, trained: Trained
) -> None:
    run = tmp_path / "run"
    summary = reward(reward_config(run, trained.sft, toys.pairs, heldout=20, test=30, epochs=1))
    assert (summary["judged_on"], summary["heldout_pairs"]) == ("test", 30)
    card = json.loads((run / "data.json").read_text(encoding="utf-8"))
    assert [card["parts"][name]["prompts"] for name in ("learn", "heldout", "test")] == [175, 20, 30]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "175 rows, 175 prompts; " in page and "for the test" in page


def test_sides_of_which_no_pair_fits_are_named_with_their_setting(tmp_path: Path, trained: Trained) -> None:
    long = write_rows(
        tmp_path / "long.jsonl", [{"prompt": f"q{i}", "chosen": "x" * 99, "rejected": "y"} for i in (1, 2)]
    )
    short = f"{write_rows(tmp_path / 'short.jsonl', pair_rows()[:20])}#source=short"
    config = reward_config(tmp_path, trained.sft, f"{long}#source=long", heldout={"short": 4}, max_length=90)
    config = config.model_copy(update={"data": (*config.data, short)})
    tokenizer = load_tokenizer(trained.sft)
    for changes, name in (
        ({"heldout": {"long": 2}}, "2 pairs that heldout sets aside"), ({"test": {"long": 2}}, "2 pairs that test sets aside"),
        ({"heldout_data": (long,), "data": (short,)}, "2 pairs of heldout_data"), ({"data": (long,), "heldout": 0}, "2 pairs"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=rf"^none of {name} is left \(2 longer than 90 tokens.*; raise max_length"):
            reward_rows(config.model_copy(update=changes), tokenizer)


def test_a_prompt_of_two_sources_has_one_side_and_is_a_row_of_each(tmp_path: Path, trained: Trained) -> None:
    data = write_rows(tmp_path / "p.jsonl", pair_rows()[:40])
    config = reward_config(tmp_path, trained.sft, f"{data}#source=a", heldout=0.3, test=0.3)
    config = config.model_copy(update={"data": (*config.data, f"{data}#source=b")})
    rows = reward_rows(config, load_tokenizer(trained.sft))
    sides = [{row.key for row in side} for side in (rows.learn, rows.heldout, rows.test)]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 40
    assert Counter((row.source, row.key) for row in rows.learn) == {(s, key): 1 for s in "ab" for key in sides[0]}


def test_pairs_that_the_chat_template_refuses_are_left_out_of_both_files(tmp_path: Path, trained: Trained) -> None:
    tokenizer = load_tokenizer(trained.sft)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
    )
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    refused = {"prompt": asked, "chosen": "a", "rejected": "b"}
    data = write_rows(tmp_path / "a.jsonl", [*pair_rows()[:9], refused])
    watched = write_rows(tmp_path / "b.jsonl", [refused, *pair_rows()[9:12]])
    config = reward_config(tmp_path, trained.sft, data, heldout_data=(watched,))
    rows = reward_rows(config, tokenizer)
    reason = "refused by the chat template: System role not supported"
    assert rows.card["dropped"] == {reason: {"rows": 1, "first": f"{data}:10"}}
    assert f"dropped 1 {reason} (first {watched}:1)" in rows.report
    assert (len(rows.learn), len(rows.heldout)) == (9, 3)
