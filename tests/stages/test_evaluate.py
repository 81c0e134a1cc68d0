"""Evaluation: the numbers are those of plain transformers and plain Python, and comparing a model with itself ties."""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ppomax.config import EvaluateConfig, KLConfig, SamplingConfig
from ppomax.data.chat import render_prompt
from ppomax.data.readers import read_prompts
from ppomax.models.load import load_causal_lm, load_tokenizer
from ppomax.models.players import Policy
from ppomax.rewards.model import RewardModel
from ppomax.rollout.collect import collect, response_texts
from ppomax.stages import evaluate as stage
from ppomax.stages import kept
from ppomax.stages.evaluate import RANDOM_PURPOSE, evaluate
from ppomax.stages.inputs import compute_of, fitted_prompts, sampling_of
from ppomax.stages.ppo import ppo
from ppomax.types import DataError, SetupError
from stages import toy
from stages.conftest import Toys, Trained, evaluate_config
from stages.toy import FLOAT32, LONGER, file_hashes, ppo_config


@pytest.fixture(scope="module")
def improved(trained: Trained, toys: Toys, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A policy that PPO has taught to write the letter e."""
    run_dir = tmp_path_factory.mktemp("improved") / "ppo"
    ppo(ppo_config(run_dir, trained.sft, toys.prompts, **LONGER, kl=KLConfig(coefficient=None)))
    return str(run_dir / "final")


def rows_of(config: EvaluateConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run_dir / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def compared(
    improved: str, trained: Trained, toys: Toys, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EvaluateConfig, dict[str, Any]]:
    config = evaluate_config(tmp_path_factory.mktemp("evaluate") / "run", improved, trained, toys)
    return config, evaluate(config)


def test_what_was_taught_wins(compared: tuple[EvaluateConfig, dict[str, Any]]) -> None:
    _, summary = compared
    assert summary["gold"] == summary["judges"]["share_of_e"]
    assert summary["gold"]["win_rate"] > 0.65
    assert summary["gold"]["mean_after"] > summary["gold"]["mean_before"] + 0.2
    assert summary["reward"]["win_rate"] > 0.6  # the reward model learnt the same letter from pairs
    assert summary["kl_per_sequence"] > 1


def test_rates_are_those_of_the_sample_rows(compared: tuple[EvaluateConfig, dict[str, Any]]) -> None:
    config, summary = compared
    rows = rows_of(config)
    assert (summary["prompts"], summary["gold"]["comparisons"]) == (45, 90) == (45, len(rows))
    differences = [row["gold_after"] - row["gold_before"] for row in rows]
    wins = sum(d > 0.05 for d in differences)
    losses = sum(d < -0.05 for d in differences)
    ties = 90 - wins - losses
    gold = summary["gold"]
    assert (gold["win"], gold["tie"], gold["lose"]) == pytest.approx((wins / 90, ties / 90, losses / 90))
    assert gold["win_rate"] == pytest.approx((wins + ties / 2) / 90)
    assert gold["ci95"][0] < gold["win_rate"] < gold["ci95"][1]
    assert gold["mean_before"] == pytest.approx(sum(row["gold_before"] for row in rows) / 90)
    for source, rates in gold["by_source"].items():
        part = [d for d, row in zip(differences, rows, strict=True) if row["source"] == source]
        assert rates["comparisons"] == len(part)
        assert rates["win"] == pytest.approx(sum(d > 0.05 for d in part) / len(part))
    assert set(gold["by_source"]) == {"even", "odd"}
    assert [row["gold_after"] for row in rows] == toy.share_of_e([], [row["after"] for row in rows])


@pytest.mark.parametrize("warp", [{}, {"top_p": 0.9, "repetition_penalty": 1.1}])
def test_trap_25_and_26_perplexity_and_kl_are_those_of_plain_transformers(
    warp: dict[str, float], improved: str, trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    """Sampled tokens estimate the KL of the distribution that they come from; warped ones that of no model."""
    plain = {"top_p": None, "repetition_penalty": None}
    sampling = SamplingConfig(max_new_tokens=10, temperature=0.5, **{**plain, **warp})
    config = evaluate_config(tmp_path / "run", improved, trained, toys, sampling=sampling, best_of=())
    summary = evaluate(config)
    tokenizer = load_tokenizer(improved)
    policy = Policy(load_causal_lm(improved, compute_of(FLOAT32)), train_layers=None, trained=False)
    read = fitted_prompts(tokenizer, [toys.prompts], 512)
    prompts, ids = read.prompts, read.ids
    how = sampling_of(sampling, policy, tokenizer)
    answers = collect(
        policy, prompts, ids, range(len(prompts)), samples=2, iteration=RANDOM_PURPOSE, seed=config.seed, how=how
    )
    assert [row["after"] for row in rows_of(config)] == response_texts(tokenizer, answers)
    plain, baseline = (AutoModelForCausalLM.from_pretrained(name) for name in (improved, trained.sft))
    nll = kl = 0.0
    for prompt, response in zip(answers.prompt_ids, answers.responses(), strict=True):
        with torch.no_grad():
            logits = [
                m(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1] for m in (plain, baseline)
            ]
        index = torch.tensor(response)[:, None]
        nll -= float(logits[0].log_softmax(-1).gather(1, index).sum())  # temperature 1
        a, b = ((x / 0.5).log_softmax(-1) for x in logits)  # the one sampled at
        kl += float((a.exp() * (a - b)).sum() if warp else (a - b).gather(1, index).sum())
    assert summary["kl_estimator"] == ("full" if warp else "k1")
    tokens = sum(map(len, answers.responses()))
    assert summary["perplexity_after"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert summary["kl_per_sequence"] == pytest.approx(kl / 90, rel=1e-4)
    assert summary["kl_per_token"] == pytest.approx(kl / tokens, rel=1e-4)
    assert summary["length_after"] == pytest.approx(tokens / 90)


def test_rewards_agree_with_plain_transformers_and_best_of_n_takes_the_highest(
    compared: tuple[EvaluateConfig, dict[str, Any]], trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    config, summary = compared
    best = summary["best_of"]["16"]
    assert best["mean"] > summary["gold"]["mean_before"]  # the reward model prefers the letter
    assert best["win"] + best["tie"] + best["lose"] == pytest.approx(1)
    agreement = summary["reward_model"]["share_of_e"]
    assert agreement["accuracy"] > 0.6
    assert agreement["correlation"] > 0.2
    assert set(summary["reward_model"]) == {"share_of_e", "length_reward"}
    model = AutoModelForSequenceClassification.from_pretrained(trained.reward)
    tokenizer = load_tokenizer(trained.sft)
    prompts = itertools.chain.from_iterable([p, p] for p in read_prompts(toys.prompts)[0])
    found: dict[str, list[bool]] = {"before": [], "after": []}
    for prompt, row in zip(prompts, rows_of(config), strict=True):
        for side, agrees in found.items():
            answer = tokenizer(row[side])["input_ids"]
            if len(answer) > 8 or "\ufffd" in row[side]:
                continue  # cut by the limit, or not to be encoded again
            ids = [*render_prompt(tokenizer, prompt.messages), *answer, tokenizer.eos_token_id]
            with torch.no_grad():
                score = float(model.model(torch.tensor([ids])).last_hidden_state[0, -1] @ model.score.weight[0])
            agrees.append(abs(score - row[f"reward_{side}"]) < 1e-4)
    for agrees in found.values():  # of another row none would; space around an answer is not in its text
        assert len(agrees) >= 10 and sum(agrees) >= 0.5 * len(agrees)


def test_a_model_against_itself_ties_in_everything(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    config = evaluate_config(tmp_path / "run", trained.sft, trained, toys)
    summary = evaluate(config)
    assert (summary["gold"]["tie"], summary["gold"]["win_rate"]) == (1.0, 0.5)
    assert summary["reward"]["tie"] == 1.0
    assert summary["kl_per_sequence"] == pytest.approx(0, abs=1e-6)
    assert all(row["before"] == row["after"] for row in rows_of(config))
    pairs = [(summary[key], summary[key.replace("_before", "_after")]) for key in summary if key.endswith("_before")]
    assert len(pairs) >= 8
    assert all(before == after for before, after in pairs)


def test_an_answer_that_both_give_ties_whatever_rounding_makes_of_its_scores(
    trained: Trained, toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = RewardModel.score_rows

    def rounded(*args: Any, **kwargs: Any) -> list[float]:
        return [score + 1e-6 * random.random() for score in read(*args, **kwargs)]

    monkeypatch.setattr(RewardModel, "score_rows", rounded)
    found = evaluate(evaluate_config(tmp_path / "run", trained.sft, trained, toys))["reward"]
    assert (found["win"], found["tie"], found["lose"]) == (0.0, 1.0, 0.0)


def test_evaluating_again_gives_the_same_files_and_other_settings_are_refused(
    compared: tuple[EvaluateConfig, dict[str, Any]],
) -> None:
    config, summary = compared
    before = file_hashes(config.run_dir)
    assert evaluate(config) == summary
    after = file_hashes(config.run_dir)
    assert {k: v for k, v in after.items() if k != "report.html"} == {
        k: v for k, v in before.items() if k != "report.html"
    }
    assert (config.run_dir / "samples.md").read_text().startswith("| prompt | before | after |")
    with pytest.raises(SetupError, match="with other settings: seed: found 0, expected 1"):
        evaluate(config.model_copy(update={"seed": 1}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": None}, "best_of: found it without a reward model"),
        ({"judge": ()}, "best_of: found it without a reward model or without a judge"),
        ({"reward": None, "judge": (), "best_of": ()}, "judge: found neither a judge nor a reward model"),
    ],
)
def test_a_comparison_that_nothing_decides_is_refused(
    changes: dict[str, Any], message: str, trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    with pytest.raises(SetupError, match=message):
        evaluate(evaluate_config(tmp_path / "run", trained.sft, trained, toys, **changes))


def test_two_judges_of_one_name_both_count(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    (tmp_path / "other_judges.py").write_text(
        "def share_of_e(prompts, responses, **columns): return [0.0] * len(responses)"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        judges = ("stages.toy:share_of_e", "other_judges:share_of_e")
        found = evaluate(evaluate_config(tmp_path / "run", trained.sft, trained, toys, judge=judges, max_prompts=3))
    finally:
        sys.path.remove(str(tmp_path))
    assert tuple(found["judges"]) == judges and found["gold"] == found["judges"][judges[0]]
    assert found["judges"][judges[1]]["tie"] == 1.0


def test_answers_outlive_a_judge_that_fails(
    trained: Trained, toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def judge(prompts: Any, responses: list[str], **columns: Any) -> list[float]:
        assert len(columns["response_ids"]) == len(responses)
        asked.append(responses)
        if len(asked) > 1:  # the first time it is only tried
            raise OSError("no answer")
        return [0.0] * len(responses)

    monkeypatch.setattr(toy, "share_of_e", judge)
    config = evaluate_config(tmp_path / "run", trained.sft, trained, toys, max_prompts=3, best_of=())
    with pytest.raises(OSError, match="no answer"):
        evaluate(config)
    rows = rows_of(config)
    assert len(rows) == 2 * 3 * 2 and {row["source"] for row in rows} == {"even", "odd"}
    monkeypatch.undo()
    monkeypatch.setattr(kept, "draw_responses", None)  # nothing is sampled again
    evaluate(config)
    assert [row["after"] for row in rows_of(config)] == [row["after"] for row in rows]
    assert all("gold_after" in row for row in rows_of(config))


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (lambda prompts, responses, **_: ["good"] * len(responses), "share_of_e: scores, entry 0: found 'good'"),
        (lambda prompts, responses, **_: [1.0], "share_of_e: found 1 values for 2 responses"),
        (lambda prompts, responses: [1.0], "judge share_of_e: it cannot be called with"),
    ],
)
def test_a_judge_that_gives_no_scores_is_found_before_anything_is_sampled(
    judge: Any, message: str, trained: Trained, toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy, "share_of_e", judge)
    monkeypatch.setattr(stage, "Kept", None)
    with pytest.raises((DataError, SetupError), match=message):
        evaluate(evaluate_config(tmp_path / "run", trained.sft, trained, toys))
    assert not (tmp_path / "run").exists()


def test_a_reward_model_that_cannot_read_the_prompts_is_found_before_anything_is_sampled(
    trained: Trained, toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(trained.reward, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    tokenizer.save_pretrained(other)
    prompts = tmp_path / "prompts.jsonl"
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "apple?"}]
    prompts.write_text('{"prompt": "river?"}\n' + json.dumps({"prompt": asked}) + "\n", encoding="utf-8")
    monkeypatch.setattr(stage, "Kept", None)
    config = evaluate_config(tmp_path / "run", trained.sft, trained, toys, reward=str(other))
    with pytest.raises(SetupError, match="no system"):
        evaluate(config.model_copy(update={"prompts": (str(prompts),)}))


@pytest.mark.parametrize(("best_of", "answers"), [((), 2 + 2), ((5,), 6 + 2)])
def test_every_answer_is_judged_and_scored_once(
    best_of: tuple[int, ...], answers: int, trained: Trained, toys: Toys, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    judged, scored, share_of_e, score_rows = [], [], toy.share_of_e, RewardModel.score_rows

    def judge(prompts: Any, responses: list[str], **columns: Any) -> list[float]:
        judged.extend(responses)
        return share_of_e(prompts, responses)

    def score(model: RewardModel, rows: Any) -> list[float]:
        scored.extend(rows)
        return score_rows(model, rows)

    monkeypatch.setattr(toy, "share_of_e", judge)
    monkeypatch.setattr(RewardModel, "score_rows", score)
    changes = {"judge": ("stages.toy:share_of_e",), "best_of": best_of, "max_prompts": 2}
    found = evaluate(evaluate_config(tmp_path / "run", trained.sft, trained, toys, **changes))
    del judged[:2]  # two answers by which the judge was tried
    assert len(judged) == len(scored) == found["prompts"] * answers > 0
    assert found["reward_model"]["share_of_e"].keys() == {"accuracy", "correlation"}


def test_another_n_does_not_change_the_best_of_n(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    changes = {"judge": ("stages.toy:share_of_e",), "max_prompts": 8}
    alone, beside = (
        evaluate(evaluate_config(tmp_path / name, trained.sft, trained, toys, best_of=best_of, **changes))["best_of"][
            "2"
        ]
        for name, best_of in (("alone", (2,)), ("beside", (2, 7)))
    )
    assert alone == beside
    assert alone["tie"] < 1  # a candidate of its own would often be the best of two


def test_samples_are_shown_as_text_and_not_as_markdown(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "a | b\\c\n<b>d</b> ![e](f)"}) + "\n", encoding="utf-8")
    config = evaluate_config(tmp_path / "run", trained.sft, trained, toys, best_of=(), samples_per_prompt=1)
    evaluate(config.model_copy(update={"prompts": (str(prompts),)}))
    shown = (config.run_dir / "samples.md").read_text(encoding="utf-8").splitlines()[2]
    assert shown.startswith(r"| a \| b\\c \<b>d\</b> !\[e](f) | ")


def test_the_limit_of_prompts_is_per_source(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    config = evaluate_config(tmp_path / "run", trained.sft, trained, toys, max_prompts=2, reward=None, best_of=())
    summary = evaluate(config)
    assert summary["prompts"] == 4
    assert [row["source"] for row in rows_of(config)] == ["even", "even", "odd", "odd"] * 2
    assert "reward" not in summary
    assert "reward_model" not in summary


def test_models_of_different_vocabularies_are_not_compared(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    other = toy.other_vocabulary(tmp_path / "other")
    with pytest.raises(SetupError, match=rf"baseline {other}: found another vocabulary than that of the policy"):
        evaluate(evaluate_config(tmp_path / "run", trained.sft, trained, toys, baseline=other))
    assert not (tmp_path / "run").exists()


def test_answers_that_cannot_fit_into_the_context_are_refused(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    sampling = SamplingConfig(max_new_tokens=500)
    with pytest.raises(SetupError, match="policy: longest prompt \\+ response: 5.. tokens, but the model has .* 512"):
        evaluate(evaluate_config(tmp_path / "run", trained.sft, trained, toys, sampling=sampling))
    short = tmp_path / "reward"
    shutil.copytree(trained.reward, short)
    written = json.loads((short / "config.json").read_text(encoding="utf-8"))
    (short / "config.json").write_text(json.dumps(written | {"max_position_embeddings": 16}), encoding="utf-8")
    with pytest.raises(SetupError, match="reward model: longest prompt \\+ response: .. tokens, .* positions for 16"):
        evaluate(evaluate_config(tmp_path / "run", trained.sft, trained, toys, reward=str(short)))
    with pytest.raises(SetupError, match="--prompts: found nothing, expected held-out prompts"):
        evaluate(evaluate_config(tmp_path / "run", trained.sft, trained, toys).model_copy(update={"prompts": ()}))
    assert not (tmp_path / "run").exists()


def test_a_baseline_with_another_template_is_named(
    trained: Trained, toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(trained.sft, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.chat_template = "Chat: " + tokenizer.chat_template
    tokenizer.save_pretrained(other)
    changes: dict[str, Any] = {"max_prompts": 1, "best_of": (), "samples_per_prompt": 1}
    evaluate(evaluate_config(tmp_path / "a", trained.sft, trained, toys, baseline=str(other), **changes))
    assert f"the baseline {other} has another chat template" in capsys.readouterr().out
    evaluate(evaluate_config(tmp_path / "b", trained.sft, trained, toys, **changes))
    assert "another chat template" not in capsys.readouterr().out
