"""A trained reward model on pairs of others: the same scores as transformers gives, told apart by subset."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from ppomax.cli import main
from ppomax.config import RankConfig
from ppomax.data.chat import render_prompt, render_response
from ppomax.models.load import load_tokenizer
from ppomax.stages import rank as stage
from ppomax.stages.rank import rank
from ppomax.types import SetupError
from stages.conftest import Toys, Trained
from stages.toy import FLOAT32, other_vocabulary, pair_rows, write_rows


def rows() -> list[dict[str, str]]:
    """As RewardBench writes them: a prompt, two answers, and the subset that they belong to."""
    kept = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in pair_rows()[::9]]
    return [row | {"subset": "hard" if i % 3 else "easy"} for i, row in enumerate(kept)]


def test_each_subset_has_the_accuracy_that_transformers_finds(trained: Trained, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", rows())
    found = rank(RankConfig(run_dir=tmp_path / "run", reward=trained.reward, data=(data,), compute=FLOAT32))
    model = AutoModelForSequenceClassification.from_pretrained(trained.reward)
    tokenizer = load_tokenizer(trained.reward)
    right: dict[str, list[float]] = {"easy": [], "hard": []}
    with torch.no_grad():
        for row in rows():
            prompt = render_prompt(tokenizer, [{"role": "user", "content": row["prompt"]}])
            scores = [
                float(model.model(torch.tensor([[*prompt, *render_response(tokenizer, row[side])]])).last_hidden_state[0, -1]
                 @ model.score.weight[0])
                for side in ("chosen", "rejected")
            ]  # fmt: skip
            right[row["subset"]].append(float(scores[0] > scores[1]))
    for name, hits in right.items():
        assert found["accuracy_by_source"][name]["accuracy"] == pytest.approx(sum(hits) / len(hits))
    assert found["heldout_pairs"] == len(rows())
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Fit for PPO?" in report and "Calibration" in report


def test_interrupted_it_says_that_nothing_is_kept(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*given: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(stage, "score_rows", interrupt)
    data = write_rows(tmp_path / "pairs.jsonl", rows())
    assert main(["rank", "--run-dir", str(tmp_path / "run"), "--reward", trained.reward, "--data", data]) == 130
    said = capsys.readouterr().err.strip()
    assert said.endswith("stopped at once; nothing is kept. To do it again: the same command")
    assert not (tmp_path / "run").exists()


def test_on_the_command_line(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", rows())
    words = [
        "--run-dir",
        str(tmp_path / "run"),
        "--reward",
        trained.reward,
        "--data",
        data,
        "--compare",
        trained.reward,
    ]
    assert main(["rank", *words]) == 0
    printed = capsys.readouterr().out
    assert "accuracy_by_source.easy" in printed and "compared_with.agreement" in printed


def test_a_reward_model_is_asked_through_its_own_template(trained: Trained, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", rows())
    found = {}
    for name, compute in (("own", FLOAT32), ("given", FLOAT32.model_copy(update={"chat_template": "role-tags"}))):
        config = RankConfig(run_dir=tmp_path / name, reward=trained.reward, data=(data,), compute=compute)
        found[name] = rank(config)["margin_histogram"]
    assert found["own"] == found["given"]


def test_a_policy_is_no_reward_model(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="no trained score head"):
        rank(RankConfig(run_dir=tmp_path / "run", reward=trained.sft, data=(toys.pairs,), compute=FLOAT32))


def test_another_vocabulary_is_refused(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    other = other_vocabulary(tmp_path / "other")
    with pytest.raises(SetupError, match="compare: .* has another vocabulary"):
        rank(RankConfig(run_dir=tmp_path / "run", reward=trained.reward, data=(toys.pairs,), compare=other))
