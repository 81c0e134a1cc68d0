"""The critic: where it starts from, how it is scaled to normalised scores, and what its pre-training does."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from ppomax.config import CriticConfig, ModelConfig, OptimConfig, SaveConfig, ScoreConfig
from ppomax.stages.ppo import ppo
from ppomax.stages.reward import reward
from ppomax.types import SetupError
from stages import toy
from stages.conftest import Toys, Trained
from stages.toy import first_iteration, metrics, ppo_config, prepared, same_bits, weights

FROM_REWARD = CriticConfig(pretrain_iterations=1, optim=OptimConfig(lr=5e-3))


def test_pre_training_lowers_the_value_loss_and_leaves_the_policy_alone(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    critic = CriticConfig(init="policy", pretrain_iterations=6, pretrain_epochs=2, optim=OptimConfig(lr=5e-3))
    config = ppo_config(
        tmp_path / "run", trained.sft, toys.prompts, iterations=7, critic=critic, optim=OptimConfig(lr=1e-12),
        reward=("stages.toy:length_reward",),
    )  # fmt: skip
    ppo(config)
    rows = metrics(config.run_dir)
    losses = [row["value_loss"] for row in rows[:6]]
    assert sum(losses[-2:]) < 0.7 * sum(losses[:2])
    assert rows[5]["explained_variance"] > rows[0]["explained_variance"]
    # The policy that sampled all of it is, bit for bit, the reference.
    assert [row["kl_per_sequence"] for row in rows] == [0.0] * 7
    assert [row["phase"] for row in rows] == ["critic"] * 6 + ["policy"]


def test_pre_training_is_the_unclipped_squared_error(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    """A value clip would hold V near a start that means nothing yet."""
    rows = {}
    for clip in (0.001, None):
        critic = CriticConfig(init="policy", pretrain_iterations=3, value_clip=clip, optim=OptimConfig(lr=5e-3))
        config = ppo_config(tmp_path / str(clip), trained.sft, toys.prompts, iterations=4, critic=critic)
        ppo(config)
        rows[clip] = metrics(config.run_dir)
    assert rows[0.001][:3] == rows[None][:3]
    assert rows[0.001][3]["value_loss"] > rows[None][3]["value_loss"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_head_is_scaled_by_1_over_sigma_in_iteration_0(
    dtype: str, trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    compute = ModelConfig(dtype=dtype, device="cpu")  # type: ignore[arg-type]
    config = ppo_config(
        tmp_path / "run", trained.sft, toys.prompts, reward=(trained.reward,), critic=FROM_REWARD, compute=compute
    )
    job = prepared(config)
    head = job.players.critic.head.weight.detach().float().clone()
    others = {n: p.clone() for n, p in job.players.critic.model.named_parameters() if not n.startswith("score.")}
    it = first_iteration(job)
    sigma = it.seen.scores.std
    assert abs(sigma - 1) > 0.1
    master, parameter = job.optimisers.critic.masters["score.weight"], job.players.critic.head.weight
    assert torch.allclose(master, head / sigma, rtol=1e-6)
    assert torch.equal(parameter, master.to(parameter.dtype))
    assert all(torch.equal(p, others[n]) for n, p in job.players.critic.model.named_parameters() if n in others)
    # The values of the iteration itself are in the same unit: at the last token V is the score over σ.
    raw = prepared(config.model_copy(update={"run_dir": tmp_path / "raw", "score": ScoreConfig(normalise=False)}))
    plain = first_iteration(raw)
    assert torch.allclose(it.scored.values_BR, plain.scored.values_BR / sigma, rtol=1e-5, atol=1e-6)
    assert torch.equal(raw.players.critic.head.weight.detach().float(), head)


@pytest.mark.parametrize("weight", [0.25, -1.0])
@pytest.mark.parametrize(
    "score", [ScoreConfig(), ScoreConfig(normalise=False), ScoreConfig(normalise=False, scale=True, clip=None)]
)
def test_the_head_is_in_the_unit_of_the_rewards_whatever_the_models_weight(
    weight: float, score: ScoreConfig, trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    config = ppo_config(
        tmp_path / "run",
        trained.sft,
        toys.prompts,
        reward=(f"{weight}*{trained.reward}",),
        critic=FROM_REWARD,
        score=score,
    )
    job = prepared(config)
    head = job.players.critic.head.weight.detach().clone()
    it = first_iteration(job)
    unit = it.seen.scores.std if score.normalise else it.seen.returns.std if score.scale else 1.0
    assert torch.allclose(job.players.critic.head.weight, head * weight / unit, rtol=1e-5)


def test_scaling_happens_once(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    critic = FROM_REWARD.model_copy(update={"optim": OptimConfig(lr=1e-12)})
    config = ppo_config(
        tmp_path / "run", trained.sft, toys.prompts, reward=(trained.reward,), critic=critic, iterations=3
    )
    ppo(config)
    sigma = metrics(config.run_dir)[0]["history_std"]
    scaled = weights(Path(trained.reward))["score.weight"] / sigma
    assert torch.allclose(weights(config.run_dir / "critic")["score.weight"], scaled, rtol=1e-5)


def test_a_critic_from_a_reward_model_of_another_vocabulary_is_refused(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    other = toy.other_vocabulary(tmp_path / "other")
    reward(toy.reward_config(tmp_path / "rm", other, toys.pairs, max_steps=1, heldout=0.0))
    spec = str(tmp_path / "rm" / "final")
    for init in ("reward", spec):
        critic = FROM_REWARD.model_copy(update={"init": init})
        config = ppo_config(tmp_path / "run", trained.sft, toys.prompts, reward=(spec,), critic=critic)
        with pytest.raises(SetupError, match=r"another vocabulary than the policy.*use --critic.init policy"):
            ppo(config)
    config = ppo_config(tmp_path / "run", trained.sft, toys.prompts, reward=(spec,))  # its critic: from the policy
    assert ppo(config)["iterations"] == 3


def test_a_value_loss_that_was_no_number_does_not_stand_in_the_way_of_resuming(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    critic = CriticConfig(init="policy", pretrain_iterations=5, pretrain_tolerance=0.01, optim=OptimConfig(lr=5e-3))
    config = ppo_config(
        tmp_path / "run", trained.sft, toys.prompts, iterations=6, rollout_batch=8, critic=critic,
        save=SaveConfig(every=1),
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        ppo(config, reward=toy.stopping_after(2))
    log = config.run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    rows[0] |= {"entropy": None, "value_loss": None, "nonfinite": ["entropy", "value_loss"]}
    toy.write_rows(log, rows)
    job = prepared(config, resume=True)
    assert [math.isnan(row["value_loss"]) for row in job.history] == [True, False]
    assert job.summary()["entropy_first"] is None
    assert ppo(config, resume=True)["iterations"] == 6


def test_a_critic_needs_a_reward_model_to_start_from(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    config = ppo_config(tmp_path / "run", trained.sft, toys.prompts, critic=FROM_REWARD)
    with pytest.raises(SetupError, match=r"critic.init: found 'reward', but no reward is a model"):
        ppo(config)


def test_a_critic_starts_from_a_directory(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    critic = FROM_REWARD.model_copy(update={"init": trained.reward})
    job = prepared(ppo_config(tmp_path / "run", trained.sft, toys.prompts, critic=critic))
    started = {name: p.detach() for name, p in job.players.critic.model.named_parameters()}
    assert same_bits(started, weights(Path(trained.reward)))
    first_iteration(job)  # its scale is the user's: only a critic from the reward is brought to the score's unit
    assert torch.equal(job.players.critic.head.weight, weights(Path(trained.reward))["score.weight"])
    with pytest.raises(SetupError, match="found no trained score head"):
        prepared(ppo_config(tmp_path / "b", trained.sft, toys.prompts, critic=CriticConfig(init=trained.sft)))
