"""The quickstart on the tiny model, whole: what it promises is there, it is reused, and it survives being killed."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ppomax.cli import main
from ppomax.data.readers import read_pairs, read_prompts
from ppomax.monitor.text import content_stems
from ppomax.stages.inputs import compute_of
from ppomax.stages.players import load_reward_model
from stages.drawing import every_picture
from stages.processes import Command, rows_in
from stages.toy import FLOAT32, file_hashes, metrics, same_bits, weights

pytestmark = pytest.mark.slow

KEYS = [
    "wall_seconds",
    "stage_seconds",
    "reward_accuracy",
    "gold",
    "kl_per_sequence",
    "length_before",
    "length_after",
    "distinct2_before",
    "distinct2_after",
    "topic_before",
    "topic_after",
    "iterations",
    "seed",
]
STAGES = {"model", "sft", "label", "reward", "ppo", "evaluate"}
TRAINED = ("sft", "reward", "ppo")


@dataclass(frozen=True)
class Finished:
    """A run that was killed twice and interrupted once before it was finished."""

    path: Path
    summary: dict[str, Any]


def summary_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "summary.json").read_text(encoding="utf-8"))


def words(path: Path, *more: str) -> list[str]:
    return ["quickstart", "--model", "tiny", "--run-dir", str(path), *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Finished:
    folder = tmp_path_factory.mktemp("quickstart")
    run = folder / "run"
    try:
        running = Command(words(run), folder / "log-1")
        running.wait_for(lambda: rows_in(run / "sft" / "metrics.jsonl") >= 20)
        assert running.stop(signal.SIGKILL) == -9
        running = Command(words(run), folder / "log-2")
        running.wait_for(lambda: rows_in(run / "ppo" / "metrics.jsonl") >= 7)
        assert running.stop(signal.SIGKILL) == -9
        labelled = (run / "pairs.jsonl").stat().st_mtime_ns
        running = Command(words(run), folder / "log-3")
        running.wait_for(lambda: rows_in(run / "ppo" / "metrics.jsonl") >= 9)
        assert running.stop(signal.SIGINT) == 130
        assert "(quickstart: the same command)" in running.said()
    finally:
        Command.end_all()
    with every_picture():
        assert main(words(run)) == 0
    assert (run / "pairs.jsonl").stat().st_mtime_ns == labelled
    return Finished(run, summary_of(run))


def test_the_summary_has_what_is_promised(finished: Finished) -> None:
    summary = finished.summary
    assert set(KEYS) <= set(summary)
    assert set(summary["stage_seconds"]) == STAGES
    assert summary["wall_seconds"] == pytest.approx(sum(summary["stage_seconds"].values()), abs=15)
    gold = summary["gold"]
    assert {"win", "tie", "lose", "win_rate", "ci95", "mean_before", "mean_after"} <= set(gold)
    assert gold["win"] + gold["tie"] + gold["lose"] == pytest.approx(1)
    assert gold["win_rate"] == pytest.approx(gold["win"] + gold["tie"] / 2)
    assert gold["ci95"][0] <= gold["win_rate"] <= gold["ci95"][1]
    numbers = [summary[key] for key in KEYS if key not in ("stage_seconds", "gold")]
    assert all(math.isfinite(number) for number in numbers)
    assert summary["iterations"] == len(metrics(finished.path / "ppo"))
    assert {"4", "16"} <= set(summary["best_of"])
    assert summary["wall_seconds"] < 150  # 25 on a core of its own


def test_enough_pairs_are_labelled_and_the_judge_tells_random_letters_apart(finished: Finished) -> None:
    pairs, _ = read_pairs(str(finished.path / "pairs.jsonl"))
    assert len(pairs) > 300
    rows = [json.loads(line) for line in (finished.path / "pairs.jsonl").read_text().splitlines()]
    assert all(row["score_chosen"] - row["score_rejected"] > 0.05 for row in rows)
    assert len({row["score_chosen"] for row in rows}) > 10
    assert 0 < finished.summary["gold"]["mean_before"] < 0.3
    reward = summary_of(finished.path / "reward")
    assert reward["heldout_pairs"] > 10


def test_held_out_prompts_were_never_trained_on(finished: Finished) -> None:
    """Trap 31, for the data of the quickstart itself."""
    config = (finished.path / "evaluate" / "config.yaml").read_text()
    heldout = next(line.split("- ")[1] for line in config.splitlines() if line.endswith("heldout.jsonl"))
    folder = Path(heldout).parent
    learnt = [p for name in ("prompts", "dialogues") for p in read_prompts(str(folder / f"{name}.jsonl"))[0]]
    unseen = read_prompts(heldout)[0]
    assert not {p.key for p in learnt} & {p.key for p in unseen}
    # Nor in other words: no single-turn prompt is about exactly what a held-out one is about.
    topics = {content_stems(p.messages[-1]["content"]): p for p in unseen if len(p.messages) == 1}
    asked = [p for p in learnt if len(p.messages) == 1 and content_stems(p.messages[0]["content"]) in topics]
    assert not asked, [p.messages[0]["content"] for p in asked]


@pytest.mark.parametrize("stage", TRAINED)
def test_every_final_directory_loads_with_plain_transformers(stage: str, finished: Finished) -> None:
    folder = finished.path / stage / "final"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hello?"}], add_generation_prompt=True)[
        "input_ids"
    ]
    kind = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    model = kind.from_pretrained(folder)
    assert same_bits(weights(folder), {k: v for k, v in model.state_dict().items() if k in weights(folder)})
    assert torch.isfinite(model(torch.tensor([ids])).logits).all()
    if stage != "reward":
        assert len(model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False)[0]) > len(ids)
    assert not list(folder.glob("*.bin")) and not list(folder.glob("*.pt"))


def test_plain_transformers_reproduces_the_reward_models_scores(finished: Finished) -> None:
    spec = str(finished.path / "reward" / "final")
    pairs = read_pairs(str(finished.path / "pairs.jsonl"))[0][:12]
    tokenizer = AutoTokenizer.from_pretrained(spec)
    turns = [[*pair.prompt, {"role": "assistant", "content": pair.chosen}] for pair in pairs]
    texts = [tokenizer.apply_chat_template(turn, tokenize=False) for turn in turns]
    batch = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        plain = AutoModelForSequenceClassification.from_pretrained(spec)(**batch).logits[:, 0]
    ours = load_reward_model(spec, tokenizer, compute_of(FLOAT32), FLOAT32)
    scores = ours.score_text([pair.prompt for pair in pairs], [pair.chosen for pair in pairs])
    assert plain.tolist() == pytest.approx(scores, abs=1e-4)
    assert len(set(scores)) == len({(pair.key, pair.chosen) for pair in pairs}) > 1


def test_the_report_is_one_self_contained_file(finished: Finished) -> None:
    html = (finished.path / "report.html").read_text(encoding="utf-8")
    loaded = re.findall(r"""(?:src|srcset|data|poster)\s*=\s*["']?([^"'\s>]+)""", html)
    assert not [value[:40] for value in loaded if not value.startswith("data:")]
    assert not re.search(r"<link|<script[^>]*\ssrc|@import|url\(\s*['\"]?(?!data:|#)", html)
    assert not re.search(r"""<(?:iframe|object|embed|img)[^>]*https?:""", html)
    assert len(re.findall(r"<svg|<img", html)) >= 5
    for stage in (*TRAINED, "evaluate"):
        assert (finished.path / stage / "report.html").stat().st_size > 1000


def test_run_again_it_reuses_everything(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    before = file_hashes(finished.path)
    began = time.process_time()
    assert main(words(finished.path)) == 0
    assert time.process_time() - began < 10
    after = file_hashes(finished.path)
    rewritten = {"report.html", "summary.json", "stage_seconds.json"}
    assert {k: v for k, v in after.items() if k not in rewritten} == {
        k: v for k, v in before.items() if k not in rewritten
    }
    again = summary_of(finished.path)
    assert without_times(again) == without_times(finished.summary)
    assert main(words(finished.path, "--seed", "1")) == 2
    assert "with other settings: seed: found 0, expected 1" in " ".join(capsys.readouterr().err.split())


def without_times(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in summary.items() if "seconds" not in name}


def test_killed_and_interrupted_it_is_what_it_would_have_been(finished: Finished, tmp_path: Path) -> None:
    """The stages that were stopped, done again without a stop; of the rest, what was there is reused."""
    stages = {name: (metrics(finished.path / name), weights(finished.path / name / "final")) for name in TRAINED}
    for name in ("ppo", "evaluate"):
        shutil.rmtree(finished.path / name)
    before = file_hashes(finished.path / "reward")
    assert main(words(finished.path)) == 0
    for name, (rows, tensors) in stages.items():
        assert metrics(finished.path / name) == rows, name
        assert same_bits(weights(finished.path / name / "final"), tensors), name
    assert file_hashes(finished.path / "reward") == before
    assert without_times(summary_of(finished.path)) == without_times(finished.summary)


def test_a_misspelt_model_costs_nothing(finished: Finished, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.path, run)
    before = file_hashes(run)
    assert main(["quickstart", "--run-dir", str(run), "--model", "tyni", "--fresh"]) == 2
    assert file_hashes(run) == before
    assert main(["quickstart", "--run-dir", str(tmp_path / "new"), "--model", "tyni"]) == 2
    assert not (tmp_path / "new").exists()


def test_fresh_starts_over(finished: Finished, command: type[Command], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.path, run)
    running = command(words(run, "--fresh"), tmp_path / "log")
    running.wait_for(lambda: 0 < rows_in(run / "sft" / "metrics.jsonl") < 50)
    running.stop(signal.SIGKILL)
    for name in ("summary.json", "pairs.jsonl", "reward", "ppo", "evaluate", "sft/final"):
        assert not (run / name).exists(), name
