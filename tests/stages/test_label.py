"""Labelled pairs: the judge decides which answer is better; ties and silence are left out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ppomax.config import SamplingConfig
from ppomax.data.readers import read_pairs
from ppomax.errors import SaveError
from ppomax.stages import kept as stage
from ppomax.stages.label import label
from ppomax.types import DataError, SetupError
from stages.conftest import Draws, Toys, Trained
from stages.toy import FLOAT32, share_of_e


def labelled(out: Path, trained: Trained, toys: Toys, judge: Any = share_of_e, **changes: Any) -> list[dict[str, Any]]:
    settings: dict[str, Any] = {
        "samples": 4, "tie": 0.05, "sampling": SamplingConfig(max_new_tokens=10), "compute": FLOAT32, "seed": 0,
    }  # fmt: skip
    label(trained.sft, [toys.prompts], judge, out, **{**settings, **changes})
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_the_judge_orders_the_answers_of_a_prompt(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    seen: list[tuple[str, str]] = []

    def judge(prompts: Sequence[Any], responses: Sequence[str], **columns: Any) -> list[float]:
        seen.extend((p[-1]["content"], text) for p, text in zip(prompts, responses, strict=True))
        assert [p[-1]["content"][0] for p in prompts] == columns["wish"]
        return share_of_e(prompts, responses)

    rows = labelled(tmp_path / "pairs.jsonl", trained, toys, judge)
    assert len(rows) > 10
    del seen[:2]  # two answers by which the judge was tried
    assert len(seen) == 45 * 4
    pairs = Counter((row["prompt"][-1]["content"], row["chosen"], row["rejected"]) for row in rows)
    by_prompt: dict[str, list[str]] = {}
    for prompt, text in seen:
        by_prompt.setdefault(prompt, []).append(text)
    expected = Counter(
        (prompt, better, worse)
        for prompt, texts in by_prompt.items()
        for better in texts
        for worse in texts
        if worse and share_of_e([], [better])[0] - share_of_e([], [worse])[0] > 0.05
    )
    assert pairs == expected
    assert all(
        row[f"score_{side}"] == share_of_e([], [row[side]])[0] for row in rows for side in ("chosen", "rejected")
    )
    counts = json.loads((tmp_path / "pairs.json").read_text())
    assert (counts["prompts"], counts["responses"], counts["pairs"]) == (45, 180, len(rows))
    assert counts["judge_mean"] == pytest.approx(sum(share_of_e([], [t for _, t in seen])) / 180)
    pairs, report = read_pairs(str(tmp_path / "pairs.jsonl"))
    assert len(pairs) == len(rows), report
    assert {pair.source for pair in pairs} == {"even", "odd"}


def test_the_best_answer_of_every_other_prompt_is_an_answer_that_loops_too(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    def judge(prompts: Sequence[Any], responses: Sequence[str], **columns: Any) -> list[float]:
        return [len(text) / 100 if ", and " not in text else -1.0 for text in responses]

    plain = labelled(tmp_path / "plain.jsonl", trained, toys, judge)
    rows = labelled(tmp_path / "loops.jsonl", trained, toys, judge, loop_every=2)
    added = [row for row in rows if row not in plain]
    assert [row for row in rows if row in plain] == plain
    prompts = {row["prompt"][-1]["content"] for row in added}
    assert len(prompts) == 23 and len(added) == 23 * 4  # of 45 prompts with 4 answers each; all of them beat the loop
    for prompt in prompts:
        mine = [row for row in added if row["prompt"][-1]["content"] == prompt]
        (loop,) = {row["rejected"] for row in mine}
        best = max((row["chosen"] for row in mine), key=len)
        assert loop.startswith(" ".join(best.rstrip(" .!?").split())) and loop.endswith(".") and ", and " in loop


def test_the_same_seed_gives_the_same_file_whatever_is_decoded_side_by_side(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    first = labelled(tmp_path / "a.jsonl", trained, toys)
    narrow = SamplingConfig(max_new_tokens=10, max_rows=7)
    assert labelled(tmp_path / "b.jsonl", trained, toys, sampling=narrow) == first
    assert labelled(tmp_path / "c.jsonl", trained, toys, seed=1) != first


def fails_late(prompts: Sequence[Any], responses: Sequence[str], **columns: Any) -> list[float]:
    """A judge that is well while it is tried, and fails when all answers are there."""
    return [0.0] * len(responses) if len(responses) < 9 else [1 / 0]


def test_who_is_interrupted_goes_on_with_the_answers_that_are_missing(
    trained: Trained, toys: Toys, tmp_path: Path, draws: Draws
) -> None:
    labelled(tmp_path / "whole.jsonl", trained, toys)
    out, asked = tmp_path / "pairs.jsonl", draws.asked
    del asked[:]
    draws.interrupt = 1
    with pytest.raises(KeyboardInterrupt):
        labelled(out, trained, toys)
    assert not out.exists()
    labelled(out, trained, toys)
    assert len(asked) == 2 and asked[0] == 45 * 4 > asked[1] > 0
    assert not (tmp_path / "pairs.answers.jsonl").exists()
    for ending in ("jsonl", "json"):
        assert (tmp_path / f"pairs.{ending}").read_bytes() == (tmp_path / f"whole.{ending}").read_bytes()
    # A judge that fails late keeps the answers.
    with pytest.raises(ZeroDivisionError):
        labelled(out, trained, toys, fails_late)
    del asked[:]
    labelled(out, trained, toys)
    assert asked == []


def test_trap_24_ties_and_empty_losers_make_no_pair(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    def by_place(prompts: Sequence[Any], responses: Sequence[str], **columns: Any) -> list[float]:
        return [float(i % 3) for i in range(len(responses))]

    def differences(tie: float) -> Counter[float]:
        rows = labelled(tmp_path / f"{tie}.jsonl", trained, toys, by_place, samples=3, tie=tie)
        assert all(row["rejected"] for row in rows)
        return Counter(row["score_chosen"] - row["score_rejected"] for row in rows)

    assert set(differences(0.0)) == {1.0, 2.0}
    assert set(differences(1.0)) == {2.0}
    assert differences(2.0) == {}
    for tie, dropped in ((0.0, 0), (1.0, 2), (2.0, 3)):  # of three answers with the scores 0, 1, 2
        counts = json.loads((tmp_path / f"{tie}.json").read_text())
        assert counts["ties"] == dropped * counts["prompts"]


def test_a_judge_or_a_length_that_cannot_work_writes_nothing(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="reward judge: scores, entry 0: found nan"):
        labelled(tmp_path / "pairs.jsonl", trained, toys, lambda p, r, **_: [float("nan")] * len(r))
    with pytest.raises(
        SetupError, match="longest prompt \\+ response: 54. tokens, but the model has positions for 512"
    ):
        labelled(tmp_path / "pairs.jsonl", trained, toys, sampling=SamplingConfig(max_new_tokens=500))
    assert list(tmp_path.iterdir()) == []


def test_a_judge_that_gives_no_scores_is_found_before_anything_is_sampled(
    trained: Trained, toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "draw_responses", None)
    for judge, message in (
        (lambda p, r, **_: ["good"] * len(r), "found 'good'"),
        (lambda p, r, **_: [1.0], "1 values"),
    ):
        with pytest.raises(DataError, match=message):
            labelled(tmp_path / "pairs.jsonl", trained, toys, judge)


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl.gz", "pairs.parquet", "pairs"])
def test_pairs_are_written_as_json_lines_only(name: str, trained: Trained, toys: Toys, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=f"{name}: found the ending .*expected .jsonl"):
        labelled(tmp_path / name, trained, toys)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_found_before_anything_is_sampled(
    trained: Trained, toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "draw_responses", None)
    with pytest.raises(SaveError, match=r"pairs\.jsonl: cannot save \(No such file or directory"):
        labelled(tmp_path / "no" / "pairs.jsonl", trained, toys)
