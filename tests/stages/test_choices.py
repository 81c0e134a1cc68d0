"""The paper's choices beside PPO-max, each in a real run on the tiny model: that it acts, and that it acts as it says."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ppomax.config import (
    CriticConfig,
    KLConfig,
    ObjectiveConfig,
    OptimConfig,
    SamplingConfig,
    ScoreConfig,
)
from ppomax.config.recipes import PPO_RECIPES
from ppomax.data.chat import render_response
from ppomax.models.players import Policy, at_responses
from ppomax.stages.estimate import estimate
from ppomax.stages.players import load_reward_model
from ppomax.stages.ppo import ppo
from ppomax.stages.update import update
from stages.conftest import Toys, Trained
from stages.toy import (
    CALM,
    LONGER,
    column,
    expect_exact_resume,
    first_iteration,
    metrics,
    ppo_config,
    prepared,
    recipe_settings,
    same_bits,
    weights,
)

NO_CRITIC = CriticConfig(init=None, pretrain_iterations=0)
CALM_CRITIC = CriticConfig(init="policy", pretrain_iterations=0, optim=CALM)
ONE_MINIBATCH: dict[str, Any] = {"rollout_batch": 16, "minibatch": 16}


@pytest.mark.parametrize("name", [name for name in PPO_RECIPES if not name.startswith("paper")])
def test_every_recipe_trains_and_improves(name: str, trained: Trained, toys: Toys, tmp_path: Path) -> None:
    recipe, settings = PPO_RECIPES[name](), recipe_settings(name, OptimConfig(lr=1e-2))
    settings["kl"] = recipe.kl.model_copy(update={"coefficient": 0.01 if recipe.kl.coefficient else None})
    if recipe.ptx_weight is not None:
        settings |= {"ptx_data": (toys.dialogues,), "ptx_weight": 0.1}
    if name == "trpo":
        settings["objective"] = recipe.objective.model_copy(update={"max_kl": 0.1})
    minibatch = 32 if recipe.minibatch == 128 else 16
    config = ppo_config(tmp_path / "run", trained.sft, toys.prompts, **{**LONGER, **settings, "minibatch": minibatch})
    ppo(config)
    scores = column(config, "score_mean")
    assert sum(scores[-3:]) / 3 > 2 * scores[0] + 0.03
    assert (config.run_dir / "critic").exists() == (recipe.critic.init is not None)


def test_without_a_critic_nothing_of_it_is_loaded_saved_or_logged(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"critic": NO_CRITIC, "advantage": "whole_return", "baseline": "batch_mean"}
    config = ppo_config(tmp_path / "run", trained.sft, toys.prompts, **settings)
    job = prepared(config)
    assert job.players.critic is None and job.optimisers.critic is None
    ppo(config.model_copy(update={"run_dir": tmp_path / "whole"}))
    rows = metrics(tmp_path / "whole")
    assert all("value_loss" not in row and row["phase"] == "policy" for row in rows)
    assert not (tmp_path / "whole" / "critic").exists()


def test_trap_29_a_run_without_a_critic_and_with_an_average_resumes_bit_for_bit(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    from ppomax.config import SaveConfig

    settings: dict[str, Any] = {
        "critic": NO_CRITIC, "advantage": "rewards_to_go", "baseline": 0.1, "ema": 0.5, "iterations": 4,
        "kl": KLConfig(target=1.0, horizon=100.0), "score": ScoreConfig(normalise=False, clip=None, scale=True),
        "save": SaveConfig(every=2),
    }  # fmt: skip
    expect_exact_resume(ppo_config(tmp_path / "whole", trained.sft, toys.prompts, **settings), ("final", "last"))


def test_the_average_is_final_and_the_last_policy_stands_beside_it(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    plain = ppo_config(tmp_path / "plain", trained.sft, toys.prompts)
    averaged = plain.model_copy(update={"run_dir": tmp_path / "averaged", "ema": 0.5})
    ppo(plain)
    ppo(averaged)
    assert metrics(plain.run_dir) == metrics(averaged.run_dir)
    assert same_bits(weights(plain.run_dir / "final"), weights(averaged.run_dir / "last"))
    start, last, mean = (
        weights(folder) for folder in (Path(trained.sft), averaged.run_dir / "last", averaged.run_dir / "final")
    )
    moved = [name for name in start if not torch.equal(start[name], last[name])]
    assert moved
    for name in moved:
        assert not torch.equal(mean[name], last[name])
        assert float((mean[name] - start[name]).norm()) < float((last[name] - start[name]).norm())


def test_the_exact_kl_is_the_enumerated_one_and_can_stand_in_the_reward(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    job = prepared(ppo_config(tmp_path / "run", trained.sft, toys.prompts, kl=KLConfig(estimator="full")))
    with torch.no_grad():
        for parameter in job.players.policy.trained_parameters().values():
            parameter.mul_(1.05)
    it = first_iteration(job)
    from ppomax.stages.scoring import score

    scored, _ = score(
        job.players, it.scored.rollout, it.plan, it.texts, temperature=1.0, bootstrap=False, full_kl=True
    )  # fmt: skip
    assert scored.full_kl_BR is not None
    rollout = scored.rollout
    for b in range(3):
        prompt, response = list(rollout.prompt_ids[b]), rollout.responses()[b]
        ids = torch.tensor([prompt + response])
        log_p, log_q = (
            torch.log_softmax(player.model(ids).logits[0, len(prompt) - 1 : -1].float(), -1)
            for player in (job.players.policy, job.players.reference)
        )
        expected = (log_p.exp() * (log_p - log_q)).sum(-1).detach()
        torch.testing.assert_close(scored.full_kl_BR[b, : len(response)], expected, atol=2e-5, rtol=1e-4)
    _, rewards_BR = estimate(scored, job.seen, job.config)
    _, without_BR = estimate(scored, job.seen, job.config, kl_coefficient=0.0)
    torch.testing.assert_close(without_BR - rewards_BR, 0.05 * scored.full_kl_BR * rollout.mask_BR, atol=1e-6, rtol=0)


def policy_step(job: Any, it: Any) -> dict[str, torch.Tensor]:
    """The parameters after one update of the first iteration's batch as if pre-training were over."""
    update(job.players, job.optimisers, it.experience, it.plan, job.config, iteration=1, ptx=[])
    return {name: p.detach().clone() for name, p in job.players.policy.trained_parameters().items()}


@pytest.mark.parametrize("estimator", ["k2", "k3", "full"])
def test_a_kl_in_the_loss_pulls_towards_the_reference(
    estimator: Any, trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        **ONE_MINIBATCH,
        "optim": OptimConfig(lr=1e-3, warmup=0.0),
        "rollout_batch": 64,
        "minibatch": 64,
    }
    kl = KLConfig(place="loss", estimator=estimator, coefficient=1e4)  # alone on the field
    job = prepared(ppo_config(tmp_path / "run", trained.sft, toys.prompts, kl=kl, **settings))
    with torch.no_grad():
        for parameter in job.players.policy.trained_parameters().values():
            parameter.mul_(1.05)
    it = first_iteration(job)
    before = exact_kl(job, it)
    policy_step(job, it)
    assert before > 0.01
    assert exact_kl(job, it) < 0.95 * before


def exact_kl(job: Any, it: Any) -> float:
    """Mean KL(policy ‖ reference) over the states of a rollout."""
    total = count = 0.0
    for micro in (m for group in it.plan for m in group.micros):
        with torch.no_grad():
            scores = job.players.policy(micro.batch, against=job.players.reference)
        total += float(at_responses(scores.kl_BT, micro.batch).sum())
        count += int(micro.batch.mask_BR.sum())
    return total / count


@pytest.mark.parametrize(("clip", "rises"), [(None, True), (1e-3, False)])
def test_trap_18_the_entropy_bonus_raises_entropy_and_its_clip_can_bind(
    clip: float | None, rises: bool, trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    objective = ObjectiveConfig(entropy_weight=1e4, entropy_clip=clip)
    settings: dict[str, Any] = {**ONE_MINIBATCH, "optim": CALM, "objective": objective}
    job = prepared(ppo_config(tmp_path / "run", trained.sft, toys.prompts, **settings))
    it = first_iteration(job)
    it.experience.advantages_BR.zero_()
    before = {name: p.detach().clone() for name, p in job.players.policy.trained_parameters().items()}
    entropy = entropy_of(job, it)
    after = policy_step(job, it)
    if rises:
        assert entropy_of(job, it) > entropy + 1e-3
    else:  # every response's summed entropy is above the bound, so nothing has a gradient
        assert all(torch.equal(before[name], after[name]) for name in before)


def entropy_of(job: Any, it: Any) -> float:
    with torch.no_grad():
        batches = [m.batch for group in it.plan for m in group.micros]
        return sum(float(at_responses(job.players.policy(b, entropy=True).entropy_BT, b).sum()) for b in batches)


def test_importance_sampling_off_divides_by_the_reference(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**ONE_MINIBATCH, "optim": CALM}
    moved = []
    for name, denominator in (("old", "old"), ("reference", "reference")):
        objective = ObjectiveConfig(kind="surrogate", denominator=denominator)  # type: ignore[arg-type]
        job = prepared(ppo_config(tmp_path / name, trained.sft, toys.prompts, objective=objective, **settings))
        with torch.no_grad():
            for parameter in job.players.policy.trained_parameters().values():
                parameter.mul_(1.02)
        it = first_iteration(job)
        before = {key: p.detach().clone() for key, p in job.players.policy.trained_parameters().items()}
        gradient = surrogate_gradient(job.players.policy, it, denominator)
        after = policy_step(job, it)
        # One Adam step from zero moments: −lr · g / (|g| + eps).
        for key, g in gradient.items():
            expected = -CALM.lr * g / (g.abs() + CALM.eps)
            torch.testing.assert_close(after[key] - before[key], expected, atol=2e-6, rtol=1e-3)
        moved.append(after)
    assert any(not torch.equal(moved[0][key], moved[1][key]) for key in moved[0])


def surrogate_gradient(policy: Policy, it: Any, denominator: str) -> dict[str, torch.Tensor]:
    model, scored, experience = copy.deepcopy(policy.model), it.scored, it.experience
    rollout, total = scored.rollout, 0.0
    divide_by = scored.old_logprobs_BR if denominator == "old" else scored.reference_logprobs_BR
    for b, response in enumerate(rollout.responses()):
        prompt = list(rollout.prompt_ids[b])
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logprobs = torch.log_softmax(logits, -1)[range(len(response)), response]
        ratio = (logprobs - divide_by[b, : len(response)]).exp()
        total = total - (ratio * experience.advantages_BR[b, : len(response)]).sum()
    (total / int(rollout.mask_BR.sum())).backward()  # type: ignore[union-attr]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_what_a_stop_string_ends_is_scored_with_the_eos_that_the_reward_model_learned_with(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    sampling = SamplingConfig(max_new_tokens=24, stop=("e", "a"))
    config = ppo_config(tmp_path / "run", trained.sft, toys.prompts, sampling=sampling, reward=(trained.reward,))
    job = prepared(config)
    it, tokenizer = first_iteration(job), job.players.tokenizer
    model = load_reward_model(trained.reward, tokenizer, job.players.compute, config.compute)
    assert model.reads_ids
    scores = it.scored.components[job.players.terms[0].name].tolist()
    compared = 0
    for prompt, ids, text, score in zip(
        it.scored.rollout.prompt_ids, it.scored.rollout.responses(), it.texts, scores, strict=True
    ):
        spelled = [*ids, tokenizer.eos_token_id]
        if text[-1:] in sampling.stop and render_response(tokenizer, text) == spelled:  # not every byte is a letter
            assert score == pytest.approx(model.score_rows([(prompt, spelled)])[0], abs=1e-5)
            assert score != pytest.approx(model.score_rows([(prompt, ids)])[0], abs=1e-3)
            compared += 1
    assert compared >= 3


def test_reward_scaling_divides_by_the_rolling_std_and_subtracts_no_mean(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "score": ScoreConfig(normalise=False, clip=None, scale=True), "kl": KLConfig(coefficient=None),
        "reward": ("stages.toy:length_reward",), "gamma": 0.9,
    }  # fmt: skip
    it = first_iteration(prepared(ppo_config(tmp_path / "run", trained.sft, toys.prompts, **settings)))
    lengths = it.scored.rollout.length_B.tolist()
    # The score stands at the last token, so a rolling return is 0 before it and the score there.
    rolling = [x for n, s in zip(lengths, it.scored.score_B.tolist(), strict=True) for x in [*[0.0] * (n - 1), s]]
    mean = sum(rolling) / len(rolling)
    std = math.sqrt(sum((x - mean) ** 2 for x in rolling) / len(rolling))
    for b, n in enumerate(lengths):
        assert float(it.rewards_BR[b, n - 1]) == pytest.approx(float(it.scored.score_B[b]) / std, rel=1e-5)
        assert not it.rewards_BR[b, : n - 1].any()


def test_each_source_is_normalised_by_its_own_history(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "score": ScoreConfig(by_source=True, clip=None), "kl": KLConfig(coefficient=None),
        "reward": ("stages.toy:length_reward",),
    }  # fmt: skip
    it = first_iteration(prepared(ppo_config(tmp_path / "run", trained.sft, toys.prompts, **settings)))
    sums_B = it.rewards_BR.sum(1)
    sources = [prompt.source for prompt in it.scored.rollout.prompts]
    assert set(sources) == {"odd", "even"} == set(it.seen.by_source)
    for source in ("odd", "even"):
        own = sums_B[[i for i, s in enumerate(sources) if s == source]]
        assert float(own.mean()) == pytest.approx(0, abs=1e-5)
        assert float(own.std(correction=0)) == pytest.approx(1, abs=1e-5)


def test_a_source_of_which_every_response_was_cut_has_no_history_yet(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "score": ScoreConfig(by_source=True, truncated="bootstrap"), "sampling": SamplingConfig(max_new_tokens=1),
        "rollout_batch": 8, "minibatch": 4,
        "critic": CriticConfig(init="policy", pretrain_iterations=0), "kl": KLConfig(coefficient=None),
    }  # fmt: skip
    it = first_iteration(prepared(ppo_config(tmp_path / "run", trained.sft, toys.prompts, **settings)))
    assert it.scored.rollout.truncated_B.all() and not it.seen.by_source
    assert not it.rewards_BR.any()


def test_trpo_beside_fused_attention_which_cannot_be_differentiated_twice(
    trained: Trained, toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts beyond 1,024 tokens and other devices than processors are read by torch's attention."""
    settings: dict[str, Any] = {"objective": ObjectiveConfig(kind="trpo"), "iterations": 1, "critic": CALM_CRITIC}
    moves = []
    for name, longest in (("folded", 1024), ("fused", 0)):
        monkeypatch.setattr("ppomax.models.attention.LONGEST_FOLDED", longest)
        config = ppo_config(tmp_path / name, trained.sft, toys.prompts, **settings)
        ppo(config)
        moves.append(column(config, "trpo_kl")[0])
    assert moves[0] > 1e-6 and moves[1] == pytest.approx(moves[0], rel=1e-2)


def test_length_penalty_is_a_term_of_its_own(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "score": ScoreConfig(normalise=False, clip=None, length_penalty=0.25, length_free=4), "kl": KLConfig(coefficient=None)
    }  # fmt: skip
    it = first_iteration(prepared(ppo_config(tmp_path / "run", trained.sft, toys.prompts, **settings)))
    penalty_B = 0.25 * (it.scored.rollout.length_B - 4).clamp(min=0)
    torch.testing.assert_close(it.rewards_BR.sum(1), it.scored.score_B - penalty_B)


def test_a_policy_without_sft_can_be_held_to_the_sft_model(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    config = ppo_config(tmp_path / "run", "tiny", toys.prompts, reference=str(trained.sft))
    ppo(config)
    rows = metrics(config.run_dir)
    assert rows[0]["kl_per_sequence"] > 1  # from the first batch on: the policy does not start at the reference
