"""Whole runs with adapters or the score head alone: they learn, resume bit for bit, and leave plain models behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ppomax.config import CriticConfig, ModelConfig, OptimConfig, SaveConfig
from ppomax.models.load import load_tokenizer
from ppomax.rewards.model import RewardModel
from ppomax.stages import players as loading
from ppomax.stages.inputs import compute_of
from ppomax.stages.players import load_players
from ppomax.stages.reward import reward
from ppomax.stages.sft import sft
from ppomax.types import token_batch
from stages.conftest import Toys, Trained
from stages.toy import FLOAT32, expect_exact_resume, metrics, ppo_config, reward_config, sft_config, weights

LORA = FLOAT32.model_copy(update={"lora_rank": 8})


def test_sft_by_adapters_learns_other_answers(tmp_path: Path, toys: Toys, trained: Trained) -> None:
    # The chosen answers of the pairs, which the model has not seen.
    sft(sft_config(tmp_path / "run", toys.pairs, model=trained.sft, compute=LORA, optim=OptimConfig(lr=2e-2)))
    losses = [row["loss"] for row in metrics(tmp_path / "run")]
    assert losses[-1] < 0.9 * losses[0]
    assert not any("lora" in name or "base_layer" in name for name in weights(tmp_path / "run" / "final"))
    assert (tmp_path / "run" / "final" / "adapter" / "adapter_config.json").is_file()


HEAD_ALONE = FLOAT32.model_copy(update={"train_layers": 0})


@pytest.mark.parametrize(
    ("compute", "lm_weight", "lr", "accuracy"),
    [(LORA, 0.2, 2e-2, 0.8), (HEAD_ALONE, None, 5e-2, 0.7)],
    ids=["adapters", "head alone"],
)
def test_a_reward_model_of_few_parameters_ranks_held_out_pairs(
    tmp_path: Path,
    toys: Toys,
    trained: Trained,
    compute: ModelConfig,
    lm_weight: float | None,
    lr: float,
    accuracy: float,
) -> None:
    changes = {"compute": compute, "lm_weight": lm_weight, "optim": OptimConfig(lr=lr)}
    summary = reward(reward_config(tmp_path / "run", trained.sft, toys.pairs, **changes))
    assert summary["accuracy"] > accuracy
    final, start = weights(tmp_path / "run" / "final"), weights(Path(trained.sft))
    moved = {name for name in final if name not in start or not final[name].equal(start[name])}
    assert "score.weight" in moved and not any("lora" in name for name in final)
    assert all(".layers." in name and compute is LORA for name in moved - {"score.weight"})


def test_ppo_by_adapters_resumes_bit_for_bit_and_exports_the_merged_average(
    tmp_path: Path, toys: Toys, trained: Trained
) -> None:
    settings: dict[str, Any] = {
        "compute": LORA, "ema": 0.5, "iterations": 4, "save": SaveConfig(every=2),
        "critic": CriticConfig(init=trained.reward, pretrain_iterations=1, optim=OptimConfig(lr=5e-3)),
    }  # fmt: skip
    whole = ppo_config(tmp_path / "whole", trained.sft, toys.prompts, **settings)
    expect_exact_resume(whole, ("final", "last", "critic"))
    start, final, last = (
        weights(path) for path in (Path(trained.sft), tmp_path / "whole/final", tmp_path / "whole/last")
    )
    assert start.keys() == final.keys() == last.keys()
    moved = {name for name in start if not start[name].equal(last[name])}
    assert moved and all(".layers." in name and "norm" not in name for name in moved)
    # Half of the way, step after step: the average is behind the last weights.
    assert any(not final[name].equal(last[name]) for name in moved)


@pytest.mark.parametrize(
    ("compute", "read"),
    [(LORA, 2), (FLOAT32.model_copy(update={"train_layers": 1}), 2), (FLOAT32, 4)],
    ids=["adapters", "upper layer", "full"],
)
def test_a_model_that_another_player_begins_as_is_not_read_twice(
    compute: Any, read: int, tmp_path: Path, toys: Toys, trained_top: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    for loader in ("load_causal_lm", "load_scalar_lm"):
        real = getattr(loading, loader)
        monkeypatch.setattr(
            loading, loader, lambda name, *a, real=real, **k: (names.append(name), real(name, *a, **k))[1]
        )  # fmt: skip
    settings: dict[str, Any] = {"compute": compute, "reward": (trained_top.reward,), "critic": CriticConfig()}
    config = ppo_config(tmp_path, trained_top.sft, toys.prompts, **settings)
    load_players(config, compute_of(compute), load_tokenizer(trained_top.sft), None)
    assert len(names) == read and set(names) == {trained_top.sft, trained_top.reward}


def test_players_with_adapters_hold_common_weights_once(tmp_path: Path, toys: Toys, trained: Trained) -> None:
    settings: dict[str, Any] = {"compute": LORA, "reward": (trained.reward,), "critic": CriticConfig()}
    config = ppo_config(tmp_path, trained.sft, toys.prompts, **settings)
    players = load_players(config, compute_of(LORA), load_tokenizer(trained.sft), None)
    assert players.critic is not None and isinstance(players.terms[0].reward, RewardModel)
    for first, other in ((players.policy, players.reference), (players.critic, players.terms[0].reward.scalar)):
        theirs = {p.data_ptr() for p in first.model.parameters() if not p.requires_grad}
        apart = [name for name, p in other.model.named_parameters() if p.data_ptr() not in theirs]
        # The critic's head is trained; all else of the frozen player is the other's.
        assert apart == (["score.weight"] if first is players.critic else [])
    batch = token_batch([[5, 6]], [[7, 8, 9]], device="cpu")
    before = players.reference(batch).logprobs_BT.clone()
    players.policy(batch).logprobs_BT.sum().backward()
    with torch.no_grad():
        for parameter in players.policy.trained_parameters().values():
            parameter.add_(parameter.grad + 0.01)
    assert torch.equal(players.reference(batch).logprobs_BT, before)
    assert not torch.allclose(players.policy(batch).logprobs_BT, before, atol=1e-4)
