"""A row of metrics.jsonl against the same quantities in plain Python, over the counted tokens of one iteration."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ppomax.config import CriticConfig, OptimConfig, PPOConfig, SamplingConfig
from ppomax.config.ppo import ObjectiveConfig
from ppomax.stages.buffer import joined
from ppomax.stages.ppo import ppo
from ppomax.stages.ppo_log import importance, sampler_gap
from ppomax.stages.ppo_setup import Job
from ppomax.stages.update import update
from stages.conftest import Toys, Trained
from stages.toy import FirstIteration, first_iteration, metrics, ppo_config, prepared

CONSTANT = OptimConfig(lr=2e-2, warmup=0.0, schedule="constant")


@pytest.fixture
def logged(trained: Trained, toys: Toys, tmp_path: Path) -> tuple[dict[str, Any], FirstIteration, Job]:
    """Row 0 of a run, the same iteration made again, and its job before the update."""
    config = ppo_config(
        tmp_path / "run", trained.sft, toys.prompts, iterations=1, optim=CONSTANT, epochs=2, rollout_batch=8,
        critic=CriticConfig(init="policy", pretrain_iterations=0), sampling=SamplingConfig(max_new_tokens=12, temperature=0.8),
    )  # fmt: skip
    ppo(config)
    job = prepared(config.model_copy(update={"run_dir": tmp_path / "again"}))
    return metrics(config.run_dir)[0], first_iteration(job), job


def counted(it: FirstIteration, tensor_BR: torch.Tensor) -> list[float]:
    """The entries of response tokens, by length and not by mask."""
    lengths = it.scored.rollout.length_B.tolist()
    return [x for row, n in zip(tensor_BR.tolist(), lengths, strict=True) for x in row[:n]]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def variance(values: list[float]) -> float:
    return mean([(x - mean(values)) ** 2 for x in values])


def test_trap_25_perplexity_is_the_exponential_of_the_mean_nll_at_temperature_1(
    logged: tuple[dict[str, Any], FirstIteration, Job], trained: Trained
) -> None:
    row, it, job = logged
    model = AutoModelForCausalLM.from_pretrained(trained.sft)
    nll, entropies = [], []
    for prompt, response in zip(it.scored.rollout.prompt_ids, it.scored.rollout.responses(), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        nll += (-logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]).tolist()
        p = (logits / job.config.sampling.temperature).softmax(-1)
        entropies += (-(p * p.log()).sum(-1)).tolist()
    assert row["perplexity"] == pytest.approx(math.exp(mean(nll)), rel=1e-4)
    # Entropy, unlike perplexity, is that of the distribution sampled from.
    assert row["entropy"] == pytest.approx(mean(entropies), rel=1e-4)


def test_trap_26_kl_per_token_and_per_sequence(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    config = ppo_config(tmp_path / "run", trained.sft, toys.prompts, iterations=4, optim=CONSTANT)
    ppo(config)
    for row in metrics(config.run_dir)[2:]:
        assert abs(row["kl_per_sequence"]) > 0.1
        assert row["kl_per_token"] * row["response_length"] == pytest.approx(row["kl_per_sequence"], rel=1e-4)
    job = prepared(config.model_copy(update={"run_dir": tmp_path / "again"}))
    with torch.no_grad():
        job.players.policy.base.layers[1].mlp.down_proj.weight.mul_(100)
    it = first_iteration(job)
    difference = [
        a - b
        for a, b in zip(
            counted(it, it.scored.old_logprobs_BR), counted(it, it.scored.reference_logprobs_BR), strict=True
        )
    ]
    row = row_of(job, it)
    assert row["kl_per_token"] == pytest.approx(mean(difference), rel=1e-4)
    assert row["kl_per_sequence"] == pytest.approx(sum(difference) / 16, rel=1e-4)
    assert row["kl_k3_per_sequence"] == pytest.approx(sum(math.exp(-d) - 1 + d for d in difference) / 16, rel=1e-4)
    assert abs(row["kl_per_sequence"]) > 0.05


def row_of(job: Job, it: FirstIteration) -> dict[str, Any]:
    from ppomax.stages.ppo_log import metrics_row
    from ppomax.stages.update import Totals

    return metrics_row(0, job.config, it.scored, it.statistics, it.experience, it.rewards_BR, Totals(), it.texts, job)


def test_trap_27_length_with_and_without_truncated_responses(
    logged: tuple[dict[str, Any], FirstIteration, Job],
) -> None:
    row, it, _ = logged
    rollout = it.scored.rollout
    lengths, cut = rollout.length_B.tolist(), rollout.truncated_B.tolist()
    assert 0 < sum(cut) < 8
    finished = [n for n, c in zip(lengths, cut, strict=True) if not c]
    assert row["response_length"] == pytest.approx(mean(lengths))
    assert row["response_length_finished"] == pytest.approx(mean(finished)) != row["response_length"]
    assert row["truncated_share"] == sum(cut) / 8
    assert all(n == 12 for n, c in zip(lengths, cut, strict=True) if c)
    assert row["tokens/generated"] == sum(lengths)
    assert row["tokens/read"] == sum(lengths) + sum(map(len, rollout.prompt_ids))


def test_trap_28_statistics_of_the_batch_count_response_tokens_alone(
    logged: tuple[dict[str, Any], FirstIteration, Job],
) -> None:
    row, it, _ = logged
    returns, values = counted(it, it.experience.returns_BR), counted(it, it.scored.values_BR)
    left = variance([g - v for g, v in zip(returns, values, strict=True)])
    assert row["explained_variance"] == pytest.approx(1 - left / variance(returns), abs=1e-4)
    advantages = counted(it, it.experience.advantages_BR)
    assert row["advantage_std"] == pytest.approx(math.sqrt(mean([a * a for a in advantages])), rel=1e-4)
    assert row["reward_sum"] == pytest.approx(sum(counted(it, it.rewards_BR)) / 8, abs=1e-5)
    scores = it.scored.score_B.tolist()
    assert row["score_mean"] == pytest.approx(mean(scores), abs=1e-6)
    assert row["score_std"] == pytest.approx(math.sqrt(variance(scores)), abs=1e-6)
    assert (row["history_mean"], row["history_std"]) == pytest.approx((row["score_mean"], row["score_std"]), abs=1e-6)
    assert sum(row["score_histogram"]["counts"]) == 8
    gaps = zip(
        counted(it, it.scored.rollout.behaviour_logprobs_BR), counted(it, it.scored.old_logprobs_BR), strict=True
    )
    assert row["behaviour_gap"] == pytest.approx(mean([abs(a - b) for a, b in gaps]), abs=1e-7)


def test_trap_28_clip_fraction_ratio_and_approx_kl_of_two_passes(
    logged: tuple[dict[str, Any], FirstIteration, Job],
) -> None:
    """The first of two passes has ratio 1 throughout; the second one's ratios are those of the policy in between."""
    row, it, job = logged
    once: PPOConfig = job.config.model_copy(update={"epochs": 1})
    update(job.players, job.optimisers, it.experience, it.plan, once, iteration=0, ptx=[])
    model: Any = copy.deepcopy(job.players.policy.model)
    ratios: list[float] = []
    for b, (prompt, response) in enumerate(
        zip(it.scored.rollout.prompt_ids, it.scored.rollout.responses(), strict=True)
    ):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1] / 0.8
        new = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
        ratios += (new - it.scored.old_logprobs_BR[b, : len(response)]).exp().tolist()
    clipped = sum(abs(r - 1) > 0.2 for r in ratios)
    assert 0 < clipped < len(ratios)
    assert row["clip_fraction"] == pytest.approx(clipped / (2 * len(ratios)), abs=1e-6)
    assert row["ratio_max"] == pytest.approx(max(ratios), rel=1e-3)
    # k3 of KL(old || new) with tokens from old: (ratio − 1) − log ratio.
    assert row["approx_kl"] == pytest.approx(sum(r - 1 - math.log(r) for r in ratios) / (2 * len(ratios)), rel=1e-2)


def test_where_every_response_is_cut_there_is_no_finished_length(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    config = ppo_config(tmp_path / "run", "tiny", toys.prompts, iterations=2, sampling=SamplingConfig(max_new_tokens=1))
    ppo(config)
    for row in metrics(config.run_dir):
        assert row["truncated_share"] == 1
        assert row["response_length_finished"] is None
        assert "response_length_finished" in row["nonfinite"]
    (config.run_dir / "metrics.jsonl").read_text().encode("ascii")
    json.loads((config.run_dir / "summary.json").read_text())


def test_what_the_sampler_says_against_what_the_trainer_reads() -> None:
    """Three responses of 2, 1 and 2 tokens. Log-ratios, trainer to sampler: (0.1, -0.3), (0.8), (-0.5, -0.4)."""
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    behaviour = torch.tensor([[-1.0, -2.0], [-3.0, 99.0], [-1.0, -1.0]])
    old = torch.tensor([[-0.9, -2.3], [-2.2, -7.0], [-1.5, -1.4]])
    found = sampler_gap(behaviour, old, mask)
    ratios = [0.1, -0.3, 0.8, -0.5, -0.4]
    assert found["behaviour_gap"] == pytest.approx((0.1 + 0.3 + 0.8 + 0.5 + 0.4) / 5)
    assert found["behaviour_gap_max"] == pytest.approx(0.8)
    # KL(sampler || old) on tokens of the sampler: r - 1 - log r with r = old / sampler.
    assert found["behaviour_kl"] == pytest.approx(sum(math.exp(d) - 1 - d for d in ratios) / 5, rel=1e-5)
    # exp(-0.2) = 0.82 is near; exp(0.8) = 2.2 and exp(-0.9) = 0.41 are far.
    assert found["behaviour_far_share"] == pytest.approx(2 / 3)


def test_importance_weights_are_logged_where_they_are_used(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    capped = ObjectiveConfig(importance_cap=1.5)
    job = prepared(ppo_config(tmp_path / "run", trained.sft, toys.prompts, objective=capped))
    it = first_iteration(job)
    fresh = importance(it.experience, job.config)
    assert fresh == {"importance_weight": pytest.approx(1.0, abs=1e-4), "importance_capped_share": 0}
    stale_BR = torch.where(it.scored.rollout.mask_BR, 1.5, 0.0)
    learnt, _ = joined([(it.experience, []), (replace(it.experience, weights_BR=stale_BR), [])])
    row = importance(learnt, job.config)
    assert row["importance_capped_share"] == pytest.approx(0.5)
    assert row["importance_weight"] == pytest.approx(1.25, abs=1e-4)
    assert importance(it.experience, job.config.model_copy(update={"objective": ObjectiveConfig()})) == {}
