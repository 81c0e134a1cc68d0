"""The experience buffer: older rollouts count as what today's policy and critic make of them, and resume exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ppomax.config import CriticConfig, KLConfig, ObjectiveConfig, PPOConfig, SamplingConfig, SaveConfig, ScoreConfig
from ppomax.stages.buffer import joined, reread
from ppomax.stages.estimate import estimate
from ppomax.stages.objective import policy_loss
from ppomax.stages.ppo import ppo
from ppomax.stages.ppo_setup import Job
from ppomax.stages.scoring import Microbatch, Minibatch
from ppomax.stages.update import Steering, schedule_position
from ppomax.types import Experience, Rollout, ScoredRollouts, SetupError, token_batch
from stages.conftest import Toys, Trained
from stages.toy import LONGER, expect_exact_resume, first_iteration, metrics, ppo_config, prepared

WEIGHTED = ObjectiveConfig(importance_cap=1.5)


def move(job: Job) -> None:
    """Policy and critic as if they had learnt something."""
    with torch.no_grad():
        for player in (job.players.policy, job.players.critic):
            assert player is not None
            for parameter in player.trained_parameters().values():
                parameter.mul_(1.1)


def test_an_older_rollout_is_what_policy_and_critic_of_today_make_of_it(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    config = ppo_config(tmp_path / "run", trained.sft, toys.prompts, objective=WEIGHTED, buffer=2, gamma=0.9)
    job = prepared(config)
    it = first_iteration(job)
    move(job)
    [(today, plan)] = reread(job.players, [it.scored], config, iteration=1)
    experience, _ = estimate(today, it.seen, config)
    rollout = today.rollout
    assert experience.weights_BR is not None
    for b in range(len(rollout)):
        ids = torch.tensor([[*rollout.prompt_ids[b], *rollout.responses()[b]]])
        P, n = len(rollout.prompt_ids[b]), int(rollout.length_B[b])
        said = job.players.policy.model(ids).logits[0, P - 1 : -1].log_softmax(-1)
        logprobs = said.gather(1, rollout.response_ids_BR[b, :n, None])[:, 0].detach()
        torch.testing.assert_close(experience.old_logprobs_BR[b, :n], logprobs, rtol=1e-5, atol=2e-5)
        ratio = (experience.old_logprobs_BR[b, :n] - rollout.behaviour_logprobs_BR[b, :n]).exp()
        torch.testing.assert_close(experience.weights_BR[b, :n], ratio.clamp(max=1.5), rtol=1e-6, atol=1e-7)
    assert float(experience.weights_BR[rollout.mask_BR].min()) < 0.9
    assert not torch.equal(today.values_BR, it.scored.values_BR)
    assert torch.equal(today.score_B, it.scored.score_B)
    assert torch.equal(today.reference_logprobs_BR, it.scored.reference_logprobs_BR)
    assert sorted(i for group in plan for micro in group.micros for i in micro.rows) == list(range(len(rollout)))


def test_the_weighted_gradient_is_that_of_responses_sampled_today(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    """Every token as a response of its own, paid r(a) · p_old(a): its mean is then Σ p_today(a) · r(a) over V.

    Exact for responses of one token, whose state no policy has chosen.
    """
    alone: dict[str, Any] = {
        "critic": CriticConfig(init=None, pretrain_iterations=0), "advantage": "whole_return", "baseline": None,
        "objective": ObjectiveConfig(kind="surrogate", importance_cap=1e6), "buffer": 2,
        "score": ScoreConfig(normalise=False, clip=None), "kl": KLConfig(coefficient=None),
        "sampling": SamplingConfig(max_new_tokens=1), "rollout_batch": 16, "minibatch": 16,
    }  # fmt: skip
    config = ppo_config(tmp_path / "run", trained.sft, toys.prompts, **alone)
    job = prepared(config)
    policy, prompt, prompt_ids = job.players.policy, job.prompts[0], job.prompt_ids[0]
    V = policy.model.config.vocab_size  # type: ignore[union-attr]

    def log_probs() -> Tensor:
        return policy.model(torch.tensor([prompt_ids])).logits[0, -1].log_softmax(-1)

    old_V, paid_V = log_probs().detach(), torch.randn(V, generator=torch.Generator().manual_seed(0))
    rollout = Rollout(
        (prompt,) * V, (prompt_ids,) * V, torch.arange(V)[:, None], torch.ones(V, dtype=torch.long), old_V[:, None],
        torch.zeros(V, dtype=torch.bool), torch.arange(V),
    )  # fmt: skip
    nothing, score_V = torch.zeros(V, 1), paid_V * old_V.exp()
    scored = ScoredRollouts(rollout, old_V[:, None], nothing, nothing, score_V, {"paid": score_V}, torch.zeros(V))
    with torch.no_grad():
        for parameter in policy.trained_parameters().values():
            parameter.mul_(1.1)
    [(today, _)] = reread(job.players, [scored], config, iteration=1)
    experience, _ = estimate(today, job.seen, config)
    batch = token_batch([prompt_ids] * V, [[a] for a in range(V)])
    loss = policy_loss(
        policy(batch), experience, batch, experience.advantages_BR, config, denom=float(V), kl_coefficient=0.0,
        penalty=0.0,
    )  # fmt: skip
    parameters = list(policy.trained_parameters().values())
    found = torch.autograd.grad(loss, parameters)
    expected = torch.autograd.grad(-(log_probs().exp() * paid_V).sum() / V, parameters)
    unweighted = torch.autograd.grad(-(log_probs() * score_V).sum() / V, parameters)
    assert far(found, expected) < 1e-3
    assert far(unweighted, expected) > 0.05


def far(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    a, b = (torch.cat([x.flatten() for x in parts]) for parts in (found, expected))
    return float((a - b).norm() / b.norm())


def test_joined_rollouts_keep_their_rows_and_their_minibatches(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    parts = []
    for number, limit in enumerate((10, 4)):
        sampling = SamplingConfig(max_new_tokens=limit)
        changes: dict[str, Any] = {"objective": WEIGHTED, "sampling": sampling, "seed": number}
        it = first_iteration(prepared(ppo_config(tmp_path / str(limit), trained.sft, toys.prompts, **changes)))
        parts.append((it.experience, it.plan))
    experience, plan = joined(parts)
    assert len(experience) == 32
    assert len(plan) == sum(len(minibatches) for _, minibatches in parts)
    for (part, minibatches), offset, found in zip(parts, (0, 16), (plan[:2], plan[2:]), strict=True):
        for before, after in zip(flat(minibatches), flat(found), strict=True):
            assert after.rows == tuple(offset + i for i in before.rows)
            width = before.batch.response_width
            assert equal(part.take(before.rows).cut(width, "cpu"), experience.take(after.rows).cut(width, "cpu"))


def flat(plan: list[Minibatch]) -> list[Microbatch]:
    return [micro for group in plan for micro in group.micros]


def equal(a: Experience, b: Experience) -> bool:
    assert a.weights_BR is not None and b.weights_BR is not None
    names = ("old_logprobs_BR", "old_values_BR", "advantages_BR", "returns_BR", "reference_logprobs_BR", "weights_BR")
    same = all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)
    return same and a.rollout.responses() == b.rollout.responses() and a.rollout.prompt_ids == b.rollout.prompt_ids


def test_trap_29_a_run_with_a_buffer_resumes_bit_for_bit(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"buffer": 3, "objective": WEIGHTED, "iterations": 5, "save": SaveConfig(every=2)}
    whole = ppo_config(tmp_path / "whole", trained.sft, toys.prompts, **settings)
    expect_exact_resume(whole, ("final",))
    fresh = whole.model_copy(update={"run_dir": tmp_path / "fresh", "buffer": 1})
    ppo(fresh)
    assert metrics(whole.run_dir)[0] == metrics(fresh.run_dir)[0]
    assert metrics(whole.run_dir)[2] != metrics(fresh.run_dir)[2]


def test_it_learns(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**LONGER, "buffer": 3, "objective": WEIGHTED}
    config = ppo_config(tmp_path / "run", trained.sft, toys.prompts, **settings)
    ppo(config)
    scores = [row["score_mean"] for row in metrics(config.run_dir)]
    assert sum(scores[-3:]) / 3 > 2 * scores[0] + 0.03


def test_the_schedule_counts_the_steps_on_older_rollouts() -> None:
    critic = CriticConfig(pretrain_iterations=1)
    config = PPOConfig(iterations=6, rollout_batch=8, minibatch=4, epochs=2, buffer=3, critic=critic)
    positions = [schedule_position(config, Steering.start(config), i) for i in range(1, 6)]
    assert [first for first, _ in positions] == [0, 8, 20, 32, 44]  # 2, 3, 3, 3 rollouts of 2 minibatches twice
    assert {total for _, total in positions} == {56}


def test_a_buffer_without_weights_is_refused(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"buffer: found 2 without objective\.importance_cap"):
        ppo(ppo_config(tmp_path / "run", trained.sft, toys.prompts, buffer=2))
    assert not (tmp_path / "run").exists()
