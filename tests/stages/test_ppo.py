"""PPO, whole: it raises the score that it is given, by every kind of reward, in every layout of the players."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ppomax.config import CriticConfig, KLConfig, OptimConfig, PPOConfig
from ppomax.config.recipes import ppo_max, vanilla
from ppomax.engine.optimiser import learning_rate
from ppomax.rewards.model import RewardModel
from ppomax.stages.ppo import ppo
from ppomax.types import SetupError
from stages import toy
from stages.conftest import Toys, Trained
from stages.toy import (
    LONGER,
    TOP_LAYER,
    file_hashes,
    first_iteration,
    metrics,
    ppo_config,
    prepared,
    same_bits,
    share_of_e,
    weights,
)

FAST = OptimConfig(lr=5e-3)


def column(config: PPOConfig, name: str) -> list[Any]:
    return [row[name] for row in metrics(config.run_dir)]


def recipe(base: PPOConfig, run_dir: Path, trained: Trained, toys: Toys, **changes: Any) -> PPOConfig:
    """A recipe as it is, but for data, sizes and learning rates."""
    critic = base.critic.model_copy(update={"optim": base.critic.optim.model_copy(update={"lr": 5e-3})})
    settings = ppo_config(run_dir, trained.sft, toys.prompts, **LONGER)
    taken = ("run_dir", "policy", "prompts", "iterations", "rollout_batch", "minibatch", "sampling", "compute", "save")
    return base.model_copy(
        update={name: getattr(settings, name) for name in (*taken, "max_prompt_tokens")}
        | {"optim": base.optim.model_copy(update={"lr": 5e-3}), "critic": critic, "reward": (trained.reward,)}
        | changes
    )


def test_a_callable_raises_its_score(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    result = ppo(
        config := ppo_config(tmp_path / "run", trained.sft, toys.prompts, **LONGER, kl=KLConfig(coefficient=None))
    )
    scores = column(config, "score_mean")
    assert sum(scores[:2]) / 2 < 0.15
    assert sum(scores[-3:]) / 3 > 0.3
    assert result["score_mean_last"] == scores[-1]
    assert column(config, "kl_per_sequence")[-1] > 1


def test_a_callable_by_name_and_as_an_object_are_the_same(base_run: PPOConfig, tmp_path: Path) -> None:
    as_object = base_run.model_copy(update={"run_dir": tmp_path / "run", "reward": ("never/looked/at",)})
    ppo(as_object, reward=share_of_e)
    assert metrics(as_object.run_dir) == metrics(base_run.run_dir)
    assert same_bits(weights(as_object.run_dir / "final"), weights(base_run.run_dir / "final"))


def test_a_callable_sees_messages_texts_and_the_rows_columns(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    seen: list[tuple[Any, ...]] = []

    def watch(prompts: Any, responses: Any, *, wish: list[str], **others: Any) -> list[float]:
        seen.append((prompts, responses, wish, others))
        return [float(len(text)) for text in responses]

    config = ppo_config(tmp_path / "run", trained.sft, toys.prompts, iterations=2, samples_per_prompt=2)
    ppo(config, reward=watch)
    prompts, responses, wish, others = seen[0]
    assert len(prompts) == len(responses) == 16
    assert [p[-1]["content"][0] for p in prompts] == wish
    assert prompts[0::2] == prompts[1::2]
    assert set(others) == {"response_ids", "source"} and set(others["source"]) == {"even", "odd"}
    assert [len(ids) > 0 for ids in others["response_ids"]] == [True] * 16
    rows = [json.loads(line) for line in (config.run_dir / "samples.jsonl").read_text().splitlines()]
    assert [row["response"] for row in rows[:8]] == responses[::2]
    assert [row["score"] for row in rows[:8]] == [len(text) for text in responses[::2]]
    assert [row["iteration"] for row in rows] == [0] * 8 + [1] * 8


def test_ppo_max_with_a_reward_model_and_ptx(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    config = recipe(ppo_max(), tmp_path / "run", trained, toys, ptx_data=(toys.dialogues,), iterations=16)
    ppo(config)
    rows = metrics(config.run_dir)
    assert [row["phase"] for row in rows] == ["critic"] * 2 + ["policy"] * 14
    assert sum(column(config, "score_mean")[-3:]) / 3 > sum(column(config, "score_mean")[:3]) / 3 + 0.5
    assert all(row["kl_coefficient"] == 0.05 and "ptx_loss" in row for row in rows[2:])
    assert rows[2]["ptx_loss"] == pytest.approx(3.1, abs=0.4)  # about what SFT ended with
    model = AutoModelForCausalLM.from_pretrained(config.run_dir / "final")
    assert model.num_parameters() == sum(t.numel() for t in weights(config.run_dir / "final").values())
    critic = AutoModelForSequenceClassification.from_pretrained(config.run_dir / "critic")
    assert critic.config.num_labels == 1


def test_vanilla_has_none_of_the_tricks(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    config = recipe(vanilla(), tmp_path / "run", trained, toys)
    job = prepared(config.model_copy(update={"run_dir": tmp_path / "look"}))
    heads = weights(Path(trained.reward))["score.weight"], job.players.critic.head.weight
    assert not torch.equal(*heads)
    assert job.optimisers.policy.max_grad_norm is job.optimisers.critic.max_grad_norm is None
    ppo(config)
    rows = metrics(config.run_dir)
    assert all(row["phase"] == "policy" and row["kl_coefficient"] == 0 and "ptx_loss" not in row for row in rows)
    # Neither normalised, nor clipped, nor less any KL: what RL sees is the score.
    assert column(config, "reward_sum") == pytest.approx(column(config, "score_mean"), abs=1e-5)
    assert rows[-1]["kl_per_sequence"] > 0.1
    assert sum(column(config, "score_mean")[-3:]) / 3 > sum(column(config, "score_mean")[:2]) / 2 + 0.3


def test_dense_rewards_train(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    config = ppo_config(
        tmp_path / "run", trained.sft, toys.prompts, **LONGER, reward=("stages.toy:dense_e",),
        kl=KLConfig(coefficient=None),
    )  # fmt: skip
    ppo(config)
    sums = column(config, "reward_sum")  # letters e in a response
    assert sums[0] < 1
    assert sum(sums[-3:]) / 3 > 2
    assert set(column(config, "score_mean")) == {0.0}


def test_a_weighted_sum_is_the_sum_of_its_logged_terms(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    terms = ("2*stages.toy:share_of_e", "-0.1*stages.toy:length_reward", f"0.5 * {trained.reward}")
    config = ppo_config(tmp_path / "run", trained.sft, toys.prompts, reward=terms)
    ppo(config)
    for row in metrics(config.run_dir):
        parts = [row[f"score/{name}"] for name in ("stages.toy:share_of_e", "stages.toy:length_reward", "reward")]
        assert row["score_mean"] == pytest.approx(2 * parts[0] - 0.1 * parts[1] + 0.5 * parts[2], abs=1e-5)
        assert 5 < parts[1] < 11


def test_reward_models_of_one_name_are_both_counted(
    trained: Trained, toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained.reward, "runs/helpful/final")
    shutil.copytree(trained.reward, "helpful")
    tensors = weights(Path("helpful"))
    save_file({**tensors, "score.weight": -tensors["score.weight"]}, "helpful/model.safetensors", {"format": "pt"})
    terms = ("0.7*runs/helpful/final", "0.3*helpful", "stages.toy:share_of_e", "stages.toy:share_of_e")
    job = prepared(ppo_config(tmp_path / "run", trained.sft, toys.prompts, reward=terms))
    names = ["helpful", "helpful 2", "stages.toy:share_of_e", "stages.toy:share_of_e 2"]
    assert [term.name for term in job.players.terms] == names
    scored = first_iteration(job).scored
    one, other, e, again = (scored.components[name] for name in names)
    assert torch.allclose(one, -other) and bool(one.any()) and torch.equal(e, again)
    assert torch.allclose(scored.score_B, 0.4 * one + 2 * e, atol=1e-5)


def test_what_is_no_reward_is_refused_before_anything_is_sampled(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    config = ppo_config(tmp_path / "run", trained.sft, toys.prompts)
    with pytest.raises(SetupError, match="reward: found list, expected one callable"):
        ppo(config, reward=[share_of_e, share_of_e])  # type: ignore[arg-type]
    why = r"it cannot be called with \(prompts, responses, wish=..., source=..., response_ids=...\)"
    with pytest.raises(SetupError, match=f"reward .*lambda>: {why}"):
        ppo(config, reward=lambda prompts, responses: [0.0] * len(responses))
    with pytest.raises(SetupError, match=f"judge math:fsum: {why}"):
        ppo(config.model_copy(update={"judge": "math:fsum"}))
    assert not config.run_dir.exists()


def test_a_judge_is_logged_and_changes_nothing(base_run: PPOConfig, tmp_path: Path) -> None:
    judged = base_run.model_copy(update={"run_dir": tmp_path / "run", "judge": "stages.toy:length_reward"})
    ppo(judged)
    rows = metrics(judged.run_dir)
    assert [row.pop("gold_mean") for row in rows] == pytest.approx([row["response_length"] for row in rows], abs=1.5)
    assert rows == metrics(base_run.run_dir)


def test_the_same_run_is_the_same_bit_for_bit_and_the_seed_matters(base_run: PPOConfig, tmp_path: Path) -> None:
    again = base_run.model_copy(update={"run_dir": tmp_path / "again"})
    ppo(again)
    assert metrics(again.run_dir) == metrics(base_run.run_dir)
    assert (again.run_dir / "samples.jsonl").read_bytes() == (base_run.run_dir / "samples.jsonl").read_bytes()
    for folder in ("final", "critic"):
        assert same_bits(weights(again.run_dir / folder), weights(base_run.run_dir / folder))
    texts = [
        first_iteration(prepared(base_run.model_copy(update={"run_dir": tmp_path / str(seed), "seed": seed}))).texts
        for seed in (0, 1)
    ]
    assert texts[0] != texts[1]


def test_trap_22_rates_and_steps_are_those_of_the_plan(
    trained: Trained, toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optim = OptimConfig(lr=1e-3, warmup=0.0, schedule="cosine", floor=0.1)
    critic = CriticConfig(
        init="policy", pretrain_iterations=2, optim=OptimConfig(lr=3e-3, warmup=0.5, schedule="linear")
    )
    config = ppo_config(
        tmp_path / "run", trained.sft, toys.prompts, iterations=6, rollout_batch=8, optim=optim, critic=critic
    )
    ppo(config)
    rows = metrics(config.run_dir)
    # One minibatch an iteration, the first two iterations for the critic alone: four policy steps.
    assert [row.get("lr_policy") for row in rows[:2]] == [None, None]
    rates = [learning_rate(s, 4, peak=1e-3, warmup=0.0, schedule="cosine", floor=0.1) for s in range(4)]
    assert [row["lr_policy"] for row in rows[2:]] == rates
    assert rates == pytest.approx([1e-3, 0.775e-3, 0.325e-3, 0.1e-3])
    # While it is pre-trained the critic's rate is constant and outside the schedule.
    assert [row["lr_critic"] for row in rows] == pytest.approx([3e-3, 3e-3, 1.5e-3, 3e-3, 3e-3, 0.3e-3])
    printed = capsys.readouterr().err
    assert "1 an iteration (8 responses each, 1 epochs), 4 in all" in printed
    assert "cosine, peak 0.001, warm-up 0 steps, last step 0.0001" in printed
    assert "linear, peak 0.003, warm-up 2 steps, last step 0.0003" in printed
    assert "8 responses = 8 prompts × 1, at most 10 tokens, temperature 1" in printed
    assert "1.07 passes" in printed  # 6 × 8 of 45 prompts


def test_a_shared_trunk_is_one_frozen_object_for_all_players(trained_top: Trained, toys: Toys, tmp_path: Path) -> None:
    config = ppo_config(
        tmp_path / "run", trained_top.sft, toys.prompts, **LONGER, reward=(trained_top.reward,), compute=TOP_LAYER,
        critic=CriticConfig(pretrain_iterations=1, optim=FAST),
    )  # fmt: skip
    job = prepared(config.model_copy(update={"run_dir": tmp_path / "look"}))
    lower = [id(p) for p in job.players.policy.base.layers[0].parameters()]
    (term,) = job.players.terms
    assert isinstance(term.reward, RewardModel)
    for player in (job.players.reference, job.players.critic, term.reward.scalar):
        assert [id(p) for p in player.base.layers[0].parameters()] == lower
        assert player.base.get_input_embeddings() is job.players.policy.base.get_input_embeddings()
        assert not {id(p) for p in player.base.layers[1].parameters()} & {
            id(p) for p in job.players.policy.base.layers[1].parameters()
        }
    ppo(config)
    before, after = weights(Path(trained_top.sft)), weights(config.run_dir / "final")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "layers.1." in name or name == "model.norm.weight"}
    assert sum(column(config, "score_mean")[-3:]) > sum(column(config, "score_mean")[:3])


def test_a_shared_trunk_gives_what_separate_ones_give(trained_top: Trained, toys: Toys, tmp_path: Path) -> None:
    """The states computed once, against the same layers frozen but computed by every player."""
    config = ppo_config(tmp_path / "a", trained_top.sft, toys.prompts, reward=(trained_top.reward,), compute=TOP_LAYER)
    whole = prepared(config.model_copy(update={"run_dir": tmp_path / "b", "compute": toy.FLOAT32}))
    shared = prepared(config)
    a, b = first_iteration(shared), first_iteration(whole)
    for name in ("old_logprobs_BR", "reference_logprobs_BR", "values_BR", "score_B"):
        assert torch.allclose(getattr(a.scored, name), getattr(b.scored, name), atol=1e-5), name


@pytest.mark.parametrize("init", ["reward", "policy"])
def test_a_reward_model_on_other_lower_layers_is_refused(
    init: str, trained: Trained, trained_top: Trained, toys: Toys, tmp_path: Path
) -> None:
    config = ppo_config(
        tmp_path / "run", trained_top.sft, toys.prompts, reward=(trained.reward,), compute=TOP_LAYER,
        critic=CriticConfig(init=init, pretrain_iterations=1),
    )  # fmt: skip
    with pytest.raises(SetupError, match="lower layers of policy and reward reward differ, first in embeddings.weight"):
        ppo(config)
    assert not config.run_dir.exists()


def test_a_stop_alarm_ends_the_run_saved_and_for_good(
    trained: Trained, toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ppo_config(tmp_path / "run", trained.sft, toys.prompts, stop_on_alarm=True)
    result = ppo(config)  # bytes at random: degenerate from the first iteration on
    assert result["iterations"] == 1
    assert result["alarms"] == ["Degenerate responses", "Responses cut by the length limit"]
    final = weights(config.run_dir / "final")
    # As if it had been killed after its last checkpoint: it must not go on where it was told to stop.
    (config.run_dir / "summary.json").unlink()
    assert ppo(config, resume=True)["iterations"] == 1
    assert same_bits(weights(config.run_dir / "final"), final)
    assert len(metrics(config.run_dir)) == 1


def test_a_finished_run_is_neither_repeated_nor_touched(
    base_run: PPOConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    before = file_hashes(base_run.run_dir)
    first = json.loads((base_run.run_dir / "summary.json").read_text(encoding="utf-8"))
    capsys.readouterr()
    assert ppo(base_run) == ppo(base_run, resume=True) == first
    assert file_hashes(base_run.run_dir) == before
    assert capsys.readouterr().err.count("already finished; --fresh starts over") == 2
    with pytest.raises(SetupError, match="with other settings: seed: found 0, expected 1"):
        ppo(base_run.model_copy(update={"seed": 1}))
