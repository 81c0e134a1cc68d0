"""What is steered from one iteration to the next reaches the update, and a bound that ends one leaves nothing behind."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ppomax.config import CriticConfig, KLConfig, ObjectiveConfig, OptimConfig, ScoreConfig
from ppomax.stages.ppo import ppo
from ppomax.stages.update import Steering, update
from stages.conftest import Toys, Trained
from stages.toy import CALM, LONGER, column, distance, first_iteration, metrics, ppo_config, prepared, same_bits

ONE_MINIBATCH: dict[str, Any] = {"rollout_batch": 16, "minibatch": 16, "optim": CALM}
PENALTY = ObjectiveConfig(kind="penalty", penalty=0.5)


@pytest.mark.parametrize(
    ("configured", "steered", "other"),
    [
        ({"kl": KLConfig(place="loss", estimator="k3")}, Steering(kl=3.0, penalty=1.0), {"kl": {"coefficient": 3.0}}),
        ({"objective": PENALTY}, Steering(kl=0.05, penalty=20.0), {"objective": {"penalty": 20.0}}),
    ],
    ids=["KL in the loss", "penalty"],
)
def test_trap_15_the_update_takes_the_coefficients_that_were_steered(
    configured: dict[str, Any], steered: Steering, other: dict[str, Any], trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    after = {}
    for name, change, steering in (("steered", {}, steered), ("set", other, None), ("neither", {}, None)):
        settings = {**ONE_MINIBATCH, "epochs": 3, **configured}
        for field, values in change.items():
            default = ppo_config(tmp_path, trained.sft, toys.prompts, **settings)
            settings[field] = getattr(default, field).model_copy(update=values)
        job = prepared(ppo_config(tmp_path / name, trained.sft, toys.prompts, **settings))
        with torch.no_grad():
            for parameter in job.players.policy.trained_parameters().values():
                parameter.mul_(1.02)
        it = first_iteration(job)
        update(
            job.players, job.optimisers, it.experience, it.plan, job.config, iteration=1, ptx=[], steering=steering
        )  # fmt: skip
        after[name] = {key: p.detach().clone() for key, p in job.players.policy.trained_parameters().items()}
    assert same_bits(after["steered"], after["set"])
    assert distance(after["neither"], after["steered"]) > 1e-5


def test_a_policy_that_makes_no_numbers_steers_nothing(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    settings = {"kl": KLConfig(target=1.0), "objective": ObjectiveConfig(kind="penalty", penalty_target=0.01)}
    job = prepared(ppo_config(tmp_path / "run", trained.sft, toys.prompts, **settings))
    before = dataclasses.replace(job.steering)
    job.steer({"iteration": 1, "kl_per_sequence": math.nan, "distance_moved": math.inf})
    assert job.steering == before
    job.steer({"iteration": 1, "kl_per_sequence": 9.0, "distance_moved": 9.0})
    assert job.steering.kl > before.kl and job.steering.penalty > before.penalty


def test_trap_22_the_policy_begins_where_the_critics_training_ended(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    optim = OptimConfig(lr=1e-3, warmup=0.0, schedule="linear", floor=0.0)
    config = ppo_config(tmp_path / "run", trained.sft, toys.prompts, optim=optim, iterations=9)
    config = config.model_copy(update={"critic": config.critic.model_copy(update={"pretrain_iterations": 5})})
    job = prepared(config)
    it = first_iteration(job)
    totals = update(
        job.players, job.optimisers, it.experience, it.plan, job.config, iteration=3, ptx=[],
        steering=Steering(kl=0.05, penalty=1.0, pretrained=2),
    )  # fmt: skip
    # Four iterations of two steps each are the policy's, from iteration 2 on; the last of the eight has the rate 0.
    assert totals.means()["lr_policy"] == pytest.approx(1e-3 * (1 - 2.5 / 7))


def test_trap_20_a_distance_that_ends_an_iteration_leaves_no_gradient_behind(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"epochs": 8, "objective": ObjectiveConfig(target_kl=1e-3)}
    job = prepared(ppo_config(tmp_path / "run", trained.sft, toys.prompts, **settings))
    it = first_iteration(job)
    totals = update(job.players, job.optimisers, it.experience, it.plan, job.config, iteration=1, ptx=[])
    assert totals.stopped_early
    assert totals.passes == totals.steps + 1, "the minibatch that was too far away is read, and no step is made of it"
    assert job.optimisers.critic is not None
    for optimiser in (job.optimisers.policy, job.optimisers.critic):
        assert all(master.grad is None for master in optimiser.masters.values())


@pytest.mark.parametrize("whiten", [False, True])
def test_advantages_are_clipped_with_and_without_whitening(
    whiten: bool, trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    after = {}
    for name, clip in (("clipped", 0.3), ("by hand", None), ("neither", None)):
        settings = {**ONE_MINIBATCH, "advantage_clip": clip, "whiten_advantages": whiten and name != "by hand"}
        job = prepared(ppo_config(tmp_path / name, trained.sft, toys.prompts, **settings))
        it = first_iteration(job)
        experience, mask = it.experience, it.scored.rollout.mask_BR
        if name == "by hand":
            advantages = experience.advantages_BR
            if whiten:
                counted = advantages[mask]
                advantages = (advantages - counted.mean()) / (counted.var(correction=0) + 1e-8).sqrt()
            advantages = torch.where(mask, advantages.clamp(-0.3, 0.3), 0.0)
            experience = dataclasses.replace(experience, advantages_BR=advantages)
        update(job.players, job.optimisers, experience, it.plan, job.config, iteration=1, ptx=[])
        after[name] = {key: p.detach().clone() for key, p in job.players.policy.trained_parameters().items()}
    assert distance(after["by hand"], after["clipped"]) < 1e-6
    assert distance(after["neither"], after["clipped"]) > 1e-5


def test_trap_15_the_kl_coefficient_follows_its_target_once_an_iteration(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        **LONGER, "iterations": 6, "kl": KLConfig(target=1e-3, horizon=320.0),
        "score": ScoreConfig(normalise=False, clip=None),
    }  # fmt: skip
    config = ppo_config(tmp_path / "run", trained.sft, toys.prompts, **settings)
    ppo(config)
    found, expected = column(config, "kl_coefficient"), [0.05]
    for row in metrics(config.run_dir)[:-1]:
        e = min(max(row["kl_per_sequence"] / 1e-3 - 1, -0.2), 0.2)
        expected.append(expected[-1] * (1 + e * 32 / 320) if row["phase"] == "policy" else expected[-1])
    assert found == pytest.approx(expected)
    assert found[-1] != found[0]
    assert abs((found[-1] - found[0]) * row["kl_per_sequence"]) > 1e-5, "enough to show in the reward"
    for row in metrics(config.run_dir):  # what was steered is what the reward lost
        lost = row["kl_coefficient"] * row["kl_per_sequence"]
        assert row["reward_sum"] == pytest.approx(row["score_mean"] - lost, abs=1e-7)


def test_trap_15_the_penalty_moves_by_halves_and_doubles(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    objective = ObjectiveConfig(kind="penalty", penalty_target=0.02)
    config = ppo_config(tmp_path / "run", trained.sft, toys.prompts, **LONGER, objective=objective)
    ppo(config)
    rows, beta = metrics(config.run_dir), 1.0
    for row in rows:
        assert row["penalty"] == beta
        if row["phase"] == "policy":
            beta = (
                beta / 2 if row["distance_moved"] < 0.02 / 1.5 else 2 * beta if row["distance_moved"] > 0.03 else beta
            )
    assert len({row["penalty"] for row in rows}) > 1


def test_the_target_kl_ends_an_iteration_before_the_step_that_would_leave_it(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {**LONGER, "epochs": 6, "iterations": 3}
    free = ppo_config(tmp_path / "free", trained.sft, toys.prompts, **settings)
    bound = free.model_copy(update={"run_dir": tmp_path / "bound", "objective": ObjectiveConfig(target_kl=0.02)})
    ppo(free)
    ppo(bound)
    assert any(row["stopped_early"] for row in metrics(bound.run_dir))
    assert column(bound, "kl_per_sequence")[-1] < column(free, "kl_per_sequence")[-1]


def test_trap_22_pre_training_ends_when_the_value_loss_has_converged(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    critic = CriticConfig(
        init="policy", pretrain_iterations=12, pretrain_tolerance=0.9, optim=OptimConfig(lr=5e-3)
    )  # fmt: skip
    optim = OptimConfig(lr=5e-3, warmup=0.0, schedule="linear", floor=0.0)
    config = ppo_config(tmp_path / "run", trained.sft, toys.prompts, critic=critic, iterations=15, optim=optim)
    ppo(config)
    rows = metrics(config.run_dir)
    phases = [row["phase"] for row in rows]
    ended = phases.index("policy")
    assert 4 <= ended < 12, "four losses are needed, and a fall by less than 90 % is enough here"
    assert phases == ["critic"] * ended + ["policy"] * 3, "the policy has its three iterations all the same"
    assert rows[ended - 1]["explained_variance"] > 0
    # Two steps an iteration, six in all; the rate falls from where the policy begins to 0 at the last one.
    rates = [5e-3 * (1 - step / 5) for step in range(6)]
    expected = [sum(rates[i : i + 2]) / 2 for i in (0, 2, 4)]
    assert [row.get("lr_policy", 0.0) for row in rows[ended:]] == pytest.approx(expected)
    assert all(row["grad_norm_policy"] > 0 for row in rows[ended:])
