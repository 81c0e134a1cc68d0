"""The update: one AdamW step per minibatch for each trained player, whatever the microbatches; nothing else moves."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppomax.config import CriticConfig, OptimConfig, PPOConfig, SamplingConfig
from ppomax.models.players import Player
from ppomax.stages.ppo import ppo
from ppomax.stages.ppo_setup import Job
from ppomax.stages.update import Totals, update
from stages.conftest import Toys, Trained
from stages.toy import (
    CALM,
    FLOAT32,
    TOP_LAYER,
    FirstIteration,
    distance,
    first_iteration,
    metrics,
    ppo_config,
    prepared,
    same_bits,
    weights,
)

ONE_MINIBATCH: dict[str, Any] = {"rollout_batch": 16, "minibatch": 16}


def updated(job: Job, it: FirstIteration, iteration: int = 1) -> Totals:
    """The update of a rollout as iteration `iteration` (0 is critic pre-training in the toy configuration)."""
    return update(job.players, job.optimisers, it.experience, it.plan, job.config, iteration=iteration, ptx=job.ptx)


def parameters(player: Player) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in player.model.named_parameters()}


def fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, p in sorted(model.state_dict().items()):
        digest.update(name.encode() + p.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(
    "compute",
    [
        FLOAT32,
        TOP_LAYER,
        FLOAT32.model_copy(update={"gradient_checkpointing": True}),
        FLOAT32.model_copy(update={"tokens_per_microbatch": 64}),
    ],
    ids=["full", "shared trunk", "gradient checkpointing", "one row a microbatch"],
)
def test_trap_07_the_ratio_is_1_while_nothing_has_moved(compute: Any, lively: str, toys: Toys, tmp_path: Path) -> None:
    config = ppo_config(
        tmp_path / "run", lively, toys.prompts, compute=compute, optim=OptimConfig(lr=1e-12, warmup=0.0),
        sampling=SamplingConfig(max_new_tokens=10, temperature=0.7),
    )  # fmt: skip
    job = prepared(config)
    it = first_iteration(job)
    totals = updated(job, it).means()
    assert totals["ratio_max"] == pytest.approx(1, abs=1e-5)
    assert totals["clip_fraction"] == 0
    assert totals["approx_kl"] < 1e-9
    rollout, mask = it.scored.rollout, it.scored.rollout.mask_BR
    assert float((rollout.behaviour_logprobs_BR - it.scored.old_logprobs_BR)[mask].abs().max()) < 1e-5
    assert float((it.scored.old_logprobs_BR - it.scored.reference_logprobs_BR).abs().max()) < 1e-5


def test_trap_07_in_a_run_the_first_minibatch_of_every_iteration_has_ratio_1(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    config = ppo_config(tmp_path / "run", trained.sft, toys.prompts, iterations=5, **ONE_MINIBATCH)
    ppo(config)
    rows = metrics(config.run_dir)[1:]
    assert [row["ratio_max"] for row in rows] == pytest.approx([1] * 4, abs=1e-5)
    assert abs(rows[-1]["kl_per_sequence"]) > 1e-3  # though the policy has moved in between


@pytest.mark.parametrize("compute", [FLOAT32, TOP_LAYER], ids=["full", "shared trunk"])
def test_trap_10_the_reference_and_the_reward_model_do_not_move(
    compute: Any, trained_top: Trained, toys: Toys, tmp_path: Path
) -> None:
    config = ppo_config(
        tmp_path / "run", trained_top.sft, toys.prompts, reward=(trained_top.reward,), compute=compute, epochs=3,
        critic=CriticConfig(pretrain_iterations=1, optim=OptimConfig(lr=1e-2)), optim=OptimConfig(lr=1e-2, warmup=0.0),
    )  # fmt: skip
    job = prepared(config)
    frozen = [job.players.reference.model, job.players.terms[0].reward.scalar.model]  # type: ignore[union-attr]
    before = [fingerprint(model) for model in frozen]
    trained_before = [fingerprint(player.model) for player in (job.players.policy, job.players.critic)]
    updated(job, first_iteration(job))
    assert [fingerprint(model) for model in frozen] == before
    assert all(p.grad is None for model in frozen for p in model.parameters())
    moved = [fingerprint(player.model) for player in (job.players.policy, job.players.critic)]
    assert not set(moved) & set(trained_before)


def loss_by_hand(job: Job, it: FirstIteration, model: nn.Module) -> Tensor:
    """−Σ A·ratio / tokens at ratio 1, plus λ × mean NLL of the first ptx dialogues, row by row."""
    scored, mask = it.scored, it.scored.rollout.mask_BR
    total: Any = 0.0
    pairs = zip(scored.rollout.prompt_ids, scored.rollout.responses(), strict=True)
    for b, (prompt, response) in enumerate(pairs):
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
        n = len(response)
        ratio = (logprobs - scored.old_logprobs_BR[b, :n]).exp()
        total = total - (ratio * it.experience.advantages_BR[b, :n]).sum() / mask.sum()
    return total


def test_trap_20_one_step_per_minibatch_holds_the_policy_and_the_ptx_gradient(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {**ONE_MINIBATCH, "optim": CALM, "ptx_data": (toys.dialogues,), "ptx_weight": 0.3}
    job = prepared(ppo_config(tmp_path / "run", trained.sft, toys.prompts, **settings, ptx_batch=225))
    it = first_iteration(job)
    assert not it.scored.rollout.mask_BR.all()
    model = copy.deepcopy(job.players.policy.model)
    before = parameters(job.players.policy)
    totals = updated(job, it)
    loss, tokens, nll = loss_by_hand(job, it, model), 0, torch.zeros(())
    for row in job.ptx:  # a batch of all 225 dialogues, in whichever order
        logprobs = model(torch.tensor([row.ids])).logits[0, :-1].log_softmax(-1)  # type: ignore[operator]
        counted = torch.tensor(row.mask[1:])
        nll = nll - logprobs.gather(1, torch.tensor(row.ids[1:])[:, None])[:, 0][counted].sum()
        tokens += int(counted.sum())
    assert totals.means()["policy_loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert totals.means()["ptx_loss"] == pytest.approx(nll.item() / tokens, rel=1e-4)
    (loss + 0.3 * nll / tokens).backward()
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    assert totals.means()["grad_norm_policy"] == pytest.approx(norm, rel=1e-4)
    torch.optim.AdamW(model.parameters(), lr=1e-3, betas=CALM.betas, eps=CALM.eps, weight_decay=0.0).step()
    expected = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    moves = {name: p - before[name] for name, p in parameters(job.players.policy).items()}
    assert distance(expected, moves) < 1e-3
    assert float(expected["model.norm.weight"].norm()) > 0


@pytest.mark.parametrize("ptx_weight", [None, 0.3])
def test_trap_20_as_many_adamw_steps_as_minibatches(
    ptx_weight: float | None, trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    ptx = {"ptx_data": (toys.dialogues,), "ptx_weight": ptx_weight} if ptx_weight else {}
    config = ppo_config(
        tmp_path / "run", trained.sft, toys.prompts, epochs=3, compute=FLOAT32.model_copy(update={"tokens_per_microbatch": 64}),
        **ptx,
    )  # fmt: skip
    job = prepared(config)
    totals = updated(job, first_iteration(job))
    for optimiser in (job.optimisers.policy, job.optimisers.critic):
        counts = {int(state["step"]) for state in optimiser.adamw.state.values()}
        assert counts == {3 * 2} == {totals.steps}  # 3 epochs of 16 responses in minibatches of 8


@pytest.mark.parametrize("whiten", [False, True])
def test_trap_16_and_19_the_size_of_microbatches_changes_nothing(
    whiten: bool, trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    after = {}
    for budget in (64, 4096):
        compute = FLOAT32.model_copy(update={"tokens_per_microbatch": budget})
        config = ppo_config(
            tmp_path / str(budget), trained.sft, toys.prompts, compute=compute, optim=CALM, whiten_advantages=whiten,
            critic=CriticConfig(init="policy", pretrain_iterations=1, optim=CALM), ptx_data=(toys.dialogues,), ptx_weight=0.3,
        )  # fmt: skip
        job = prepared(config)
        it = first_iteration(job)
        assert len([m for group in it.plan for m in group.micros]) == (16 if budget == 64 else 2)
        means = updated(job, it).means()
        after[budget] = means, parameters(job.players.policy), parameters(job.players.critic)
    assert distance(after[64][1], after[4096][1]) < 1e-5
    assert distance(after[64][2], after[4096][2]) < 1e-5
    assert after[64][0] == pytest.approx(after[4096][0], rel=1e-4, abs=1e-6)


def test_trap_15_and_20_the_critic_gets_the_gradient_of_its_own_loss_alone(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    critic = CriticConfig(init="policy", pretrain_iterations=1, value_clip=0.2, optim=CALM)
    job = prepared(ppo_config(tmp_path / "run", trained.sft, toys.prompts, **ONE_MINIBATCH, critic=critic))
    it = first_iteration(job)
    model: Any = copy.deepcopy(job.players.critic.model)
    before = parameters(job.players.critic)
    totals = updated(job, it).means()
    loss = torch.zeros(())
    scored = it.scored
    for b, (prompt, response) in enumerate(zip(scored.rollout.prompt_ids, scored.rollout.responses(), strict=True)):
        states = model.model(torch.tensor([[*prompt, *response]])).last_hidden_state[0]
        values = (states @ model.score.weight[0])[len(prompt) - 1 : -1]
        loss = loss + (values - it.experience.returns_BR[b, : len(response)]).square().sum()
    loss = loss / scored.rollout.mask_BR.sum()
    assert totals["value_loss"] == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    torch.optim.AdamW(model.parameters(), lr=1e-3, betas=CALM.betas, eps=CALM.eps, weight_decay=0.0).step()
    moves = {name: p - before[name] for name, p in parameters(job.players.critic).items()}
    expected = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    assert distance(expected, moves) < 1e-3


def spoilt(job: Job, it: FirstIteration) -> FirstIteration:
    """The iteration with one advantage that is not a number, so that the policy's gradient is none."""
    advantages = it.experience.advantages_BR.clone()
    advantages[:, 0] = float("nan")
    return dataclasses.replace(it, experience=dataclasses.replace(it.experience, advantages_BR=advantages))


def test_trap_21_a_gradient_that_is_no_number_changes_nothing_and_is_counted(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    job = prepared(ppo_config(tmp_path / "run", trained.sft, toys.prompts))
    before = parameters(job.players.policy)
    totals = updated(job, spoilt(job, first_iteration(job)))
    assert totals.means()["skipped_steps"] == 2
    assert same_bits(parameters(job.players.policy), before)
    assert not job.optimisers.policy.adamw.state


def test_trap_21_five_such_steps_in_a_row_end_the_run(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    job = prepared(ppo_config(tmp_path / "run", trained.sft, toys.prompts, minibatch=2))
    it = first_iteration(job)
    with pytest.raises(FloatingPointError, match="iteration 1: the gradient was not finite in 5 steps in a row"):
        updated(job, spoilt(job, it))


def test_trap_21_policy_and_critic_are_clipped_each_by_its_own_norm(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    limits = {"policy": 1e-3, "critic": 2e-3}
    optim = {role: CALM.model_copy(update={"max_grad_norm": limit}) for role, limit in limits.items()}
    critic = CriticConfig(init="policy", pretrain_iterations=1, optim=optim["critic"])
    settings: dict[str, Any] = {**ONE_MINIBATCH, "optim": optim["policy"], "critic": critic}
    job = prepared(ppo_config(tmp_path / "run", trained.sft, toys.prompts, **settings))
    means = updated(job, first_iteration(job)).means()
    for role, limit in limits.items():
        state = getattr(job.optimisers, role).adamw.state.values()
        # The first moment after one step is (1 − β₁) times the gradient that AdamW was given.
        norm = float(torch.nn.utils.get_total_norm([moments["exp_avg"] for moments in state]))
        assert norm / (1 - CALM.betas[0]) == pytest.approx(limit, rel=1e-2)
        assert means[f"grad_norm_{role}"] > 2 * limit, "what is logged is the norm before the clip"


@pytest.mark.parametrize("warmup", [0.0, 0.1])
def test_pre_training_leaves_the_policy_untouched_without_any_warm_up(
    warmup: float, trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    """The schedule has no steps yet then: its position must not even be asked for."""
    config = ppo_config(tmp_path / "run", trained.sft, toys.prompts, optim=OptimConfig(lr=1e-2, warmup=warmup))
    job = prepared(config)
    policy, critic = parameters(job.players.policy), parameters(job.players.critic)
    means = updated(job, first_iteration(job), iteration=0).means()
    assert same_bits(parameters(job.players.policy), policy)
    assert not same_bits(parameters(job.players.critic), critic)
    assert not any("policy" in name for name in means)
    assert not job.optimisers.policy.adamw.state


def test_advantages_are_clipped_after_whitening(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    def loss(**changes: Any) -> tuple[float, FirstIteration, PPOConfig]:
        folder = tmp_path / "-".join(map(str, ("run", *changes.values())))
        config = ppo_config(folder, trained.sft, toys.prompts, **ONE_MINIBATCH, **changes)
        job = prepared(config)
        it = first_iteration(job)
        return updated(job, it).means()["policy_loss"], it, config

    clipped, it, _ = loss(whiten_advantages=True, advantage_clip=0.5)
    advantages = it.experience.advantages_BR[it.scored.rollout.mask_BR]
    white = (advantages - advantages.mean()) / advantages.std(correction=0)
    assert clipped == pytest.approx(-float(white.clamp(-0.5, 0.5).mean()), abs=1e-5)
    assert loss(whiten_advantages=True)[0] == pytest.approx(0, abs=1e-5)
    assert loss()[0] == pytest.approx(-float(advantages.mean()), abs=1e-5)


def test_the_run_itself_writes_what_the_update_made(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    config = ppo_config(tmp_path / "run", trained.sft, toys.prompts, iterations=1, critic=CriticConfig(
        init="policy", pretrain_iterations=0, optim=CALM), optim=CALM)  # fmt: skip
    ppo(config)
    job = prepared(config.model_copy(update={"run_dir": tmp_path / "again"}))
    updated(job, first_iteration(job), iteration=0)
    written = weights(config.run_dir / "final")
    assert same_bits(written, {name: p for name, p in parameters(job.players.policy).items() if name in written})
