"""Where a PPO iteration's time goes: the parts add up, and their tokens are those of the rollout."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from ppomax.config import CriticConfig, OptimConfig, PPOConfig, SamplingConfig
from ppomax.data.readers import read_dialogues
from ppomax.models.load import load_causal_lm, load_tokenizer, resolve_compute
from ppomax.models.players import Policy
from ppomax.stages.inputs import dialogue_tokens
from ppomax.stages.ppo import ppo
from ppomax.stages.reward import reward
from ppomax.stages.sft import sft
from ppomax.types import Rollout
from stages.toy import (
    TOP_LAYER,
    dialogue_rows,
    pair_rows,
    ppo_config,
    prepared,
    prompt_rows,
    reward_config,
    sft_config,
    write_rows,
)

PARTS = {
    "generate": {"prefill", "decode"},
    "score": {"policy", "reference", "critic", "reward/stages.toy:share_of_e"},
    "train": {"policy", "critic", "step", "ptx"},
}


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def config_for(folder: Path, **changes: Any) -> PPOConfig:
    """Two iterations with every part: one for the critic alone, one with policy and ptx."""
    prompts = write_rows(folder / "prompts.jsonl", prompt_rows(45))
    ptx = write_rows(folder / "ptx.jsonl", dialogue_rows())
    settings: dict[str, Any] = {"iterations": 2, "ptx_data": (ptx,), "ptx_weight": 0.1, "samples_per_prompt": 2}
    return ppo_config(folder / "ppo", "tiny", prompts, **{**settings, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[PPOConfig, list[dict[str, Any]]]:
    """A run on packed batches, and its rows."""
    config = config_for(tmp_path_factory.mktemp("breakdown"))
    ppo(config)
    return config, rows_of(config.run_dir)


def test_every_part_has_its_keys(run: tuple[PPOConfig, list[dict[str, Any]]]) -> None:
    _, (critic_only, row) = run
    for outer, inner in PARTS.items():
        assert {f"seconds/{outer}/{part}" for part in inner | {"other"}} <= row.keys()
        for part in inner - {"step", "reward/stages.toy:share_of_e"}:
            for what in ("tokens", "padding", "flops", "flops_per_second"):
                assert f"{what}/{outer}/{part}" in row, (what, outer, part)
    assert "tokens/score/reward/stages.toy:share_of_e" not in row
    assert not {"seconds/train/policy", "seconds/train/ptx", "flops/train/policy"} & critic_only.keys()
    assert row["tokens_per_second"] == pytest.approx(row["tokens/generated"] / row["seconds/total"])
    used = psutil.Process().memory_info().rss / 2**30
    assert 0.5 * used < row["peak_memory_gib"] < 100, "of this process, in GiB"


def test_parts_add_up(run: tuple[PPOConfig, list[dict[str, Any]]]) -> None:
    for row in run[1]:
        outer = sum(row[f"seconds/{part}"] for part in (*PARTS, "other"))
        assert outer == pytest.approx(row["seconds/total"], abs=1e-6)
        for part in PARTS:
            prefix = f"seconds/{part}/"
            inner = {key: value for key, value in row.items() if key.startswith(prefix)}
            assert sum(inner.values()) == pytest.approx(row[f"seconds/{part}"], abs=1e-6)
            assert min(inner.values()) >= 0
            flops = sum(value for key, value in row.items() if key.startswith(f"flops/{part}/"))
            assert flops == row[f"flops/{part}"]
        assert sum(row[f"flops/{part}"] for part in PARTS) == row["flops/total"]


def first_rollout(config: PPOConfig, folder: Path) -> Rollout:
    """The rollout of iteration 0, sampled again."""
    return prepared(config.model_copy(update={"run_dir": folder})).roll_out(0)


def test_tokens_are_those_of_the_rollout(run: tuple[PPOConfig, list[dict[str, Any]]], tmp_path: Path) -> None:
    config, (row, _) = run
    rollout = first_rollout(config, tmp_path / "again")
    prompts, responses = set(rollout.prompt_ids), rollout.responses()
    assert len(prompts) == 8
    assert row["tokens/generate/prefill"] == sum(map(len, prompts))
    width = max(map(len, prompts))
    assert row["padding/generate/prefill"] == pytest.approx(1 - sum(map(len, prompts)) / (8 * width))
    # The last token of a response is drawn, not read.
    assert row["tokens/generate/decode"] == sum(len(ids) - 1 for ids in responses)
    # Samples of a prompt stand in one packed batch, which holds the prompt once.
    read = sum(map(len, prompts)) + sum(map(len, responses))
    epochs = config.critic.pretrain_epochs
    for part, times in (("score/policy", 1), ("score/reference", 1), ("score/critic", 1), ("train/critic", epochs)):
        assert row[f"tokens/{part}"] == times * read and row[f"padding/{part}"] == 0
    # The policy has a head of V columns where the critic has one: both read all tokens.
    policy = row["flops/score/policy"] - 2 * 259 * 32 * sum(map(len, responses))
    assert row["flops/score/critic"] - policy == 2 * 32 * read
    assert row["flops/train/critic"] == 3 * epochs * row["flops/score/critic"]


def test_padded_batches_say_how_much_is_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppomax.models.players.packing_is_exact", lambda base: False)
    config = config_for(tmp_path, samples_per_prompt=1, ptx_data=(), ptx_weight=None)
    ppo(config)
    row, _ = rows_of(config.run_dir)
    rollout = first_rollout(config, tmp_path / "again")
    lengths = [len(p) + len(r) for p, r in zip(rollout.prompt_ids, rollout.responses(), strict=True)]
    assert row["tokens/score/reference"] == row["tokens/score/policy"] == sum(lengths)
    assert 0 < row["padding/score/reference"] < 0.5
    assert row["padding/score/reference"] == row["padding/train/critic"]
    slots = sum(lengths) / (1 - row["padding/score/reference"])
    assert slots == pytest.approx(round(slots)) and round(slots) <= len(lengths) * max(lengths)


def test_a_shared_trunk_is_a_part_of_its_own(tmp_path: Path) -> None:
    config = config_for(tmp_path, compute=TOP_LAYER)
    ppo(config)
    _, row = rows_of(config.run_dir)
    assert row["tokens/score/trunk"] == row["tokens/score/policy"]
    per_token = 2 * sum(p.numel() for p in _layer(config) if p.ndim == 2)
    attention = row["flops/score/trunk"] - per_token * row["tokens/score/trunk"]
    assert 0 < attention < row["flops/score/trunk"] / 4
    # One layer below, one above: the same but for the heads.
    assert row["flops/score/critic"] - row["flops/score/trunk"] == 2 * 32 * row["tokens/score/critic"]
    assert row["flops/train/critic"] == 3 * row["flops/score/critic"]
    # The frozen unembedding has no gradient of its own.
    heads = row["flops/score/policy"] - row["flops/score/trunk"]
    assert row["flops/train/policy"] == 3 * row["flops/score/policy"] - heads


def _layer(config: PPOConfig) -> list[torch.nn.Parameter]:
    job = prepared(config.model_copy(update={"run_dir": config.run_dir.with_name("other")}))
    return [*job.players.policy.base.layers[0].parameters()]


def test_rows_without_a_critic(tmp_path: Path) -> None:
    critic = CriticConfig(init=None, pretrain_iterations=0, optim=OptimConfig(lr=5e-3))
    config = config_for(
        tmp_path,
        iterations=1,
        critic=critic,
        baseline="batch_mean",
        advantage="whole_return",
        sampling=SamplingConfig(max_new_tokens=4),
    )
    ppo(config)
    (row,) = rows_of(config.run_dir)
    assert not [key for key in row if "critic" in key and "/" in key]
    assert math.isclose(sum(row[f"seconds/{part}"] for part in (*PARTS, "other")), row["seconds/total"], abs_tol=1e-6)


def test_rows_of_runs_that_only_train(tmp_path: Path) -> None:
    dialogues, pairs = write_rows(tmp_path / "d.jsonl", dialogue_rows()), write_rows(tmp_path / "p.jsonl", pair_rows())
    learning = sft_config(tmp_path / "sft", dialogues, heldout=0, epochs=1, batch_size=225)
    sft(learning)
    (row,) = rows_of(learning.run_dir)
    rows, _ = dialogue_tokens(load_tokenizer("tiny"), read_dialogues([dialogues])[0], learning.max_length)
    # A packed batch holds the first token of a dialogue, which all of them share, once in every microbatch.
    shared = (len(rows) - 1) - (sum(len(r.ids) for r in rows) - row["tokens/read"])
    assert 0 <= shared < 10
    assert row["padding"] == 0 and row["tokens"] < row["tokens/read"]
    assert row["tokens_per_second"] == pytest.approx(row["tokens/read"] / row["seconds"])
    assert row["flops_per_second"] == pytest.approx(row["flops"] / row["seconds"])

    ranking = reward_config(tmp_path / "reward", "tiny", pairs, max_steps=1)
    reward(ranking)
    (row,) = rows_of(ranking.run_dir)
    per_token = row["flops"] / row["tokens/read"]
    model = load_causal_lm("tiny", resolve_compute("cpu", "float32"))
    policy = Policy(model, train_layers=None, trained=False)
    parameters = sum(p.numel() for p in policy.base.layers.parameters() if p.ndim == 2)
    assert 6 * parameters < per_token < 12 * parameters


def test_every_key_is_in_the_docs(run: tuple[PPOConfig, list[dict[str, Any]]], tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`([^`\s]+)`", text))
    dialogues, pairs = write_rows(tmp_path / "d.jsonl", dialogue_rows()), write_rows(tmp_path / "p.jsonl", pair_rows())
    learning = sft_config(tmp_path / "sft", dialogues, epochs=0.2)
    ranking = reward_config(tmp_path / "reward", "tiny", pairs, max_steps=1)
    sft(learning)
    reward(ranking)
    rows = [*run[1], *rows_of(learning.run_dir), *rows_of(ranking.run_dir)]
    for key in {key for row in rows for key in row} - told:
        what, _, part = key.partition("/")
        part = re.sub(r"^score/reward/.*", "score/reward/NAME", part)
        assert (what == "score" and "score/NAME" in told) or {f"{what}/PART", part} <= told, key
