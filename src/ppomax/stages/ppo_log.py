"""What PPO writes down about an iteration: one row of metrics, a few samples, alarms."""

from __future__ import annotations

import math
import resource
import sys
from typing import Any

import torch
from torch import Tensor

from ppomax.config import PPOConfig
from ppomax.monitor.alarms import check
from ppomax.monitor.statistics import histogram
from ppomax.monitor.text import text_health
from ppomax.rewards.callables import judged
from ppomax.rl.kl import k1, k3
from ppomax.rl.masked import masked_mean, masked_sum, zero_masked
from ppomax.rl.objectives import explained_variance
from ppomax.stages.ppo_setup import Job
from ppomax.stages.scoring import TokenStatistics
from ppomax.stages.update import Totals
from ppomax.types import Experience, ScoredRollouts

# Probability ratios of whole responses, trainer to sampler, beyond which they are counted as far.
FAR = (0.5, 2.0)


def metrics_row(
    iteration: int, config: PPOConfig, scored: ScoredRollouts, statistics: TokenStatistics, experience: Experience,
    rewards_BR: Tensor, totals: Totals, texts: list[str], job: Job,
) -> dict[str, Any]:  # fmt: skip
    """One row of metrics.jsonl. All token statistics are over counted tokens."""
    rollout, mask = scored.rollout, scored.rollout.mask_BR
    B, length_B = len(rollout), rollout.length_B.float()
    kl_BR = k1(scored.old_logprobs_BR, scored.reference_logprobs_BR)
    finished = ~rollout.truncated_B
    row: dict[str, Any] = {
        "iteration": iteration,
        "phase": "critic" if job.steering.pretraining(iteration, config) else "policy",
        "score_mean": float(scored.score_B.mean()),
        "score_std": float(scored.score_B.std(correction=0)),
        **{f"score/{name}": float(value.mean()) for name, value in scored.components.items()},
        "score_histogram": histogram(scored.score_B.tolist()),
        "history_mean": job.moments.mean,
        "history_std": job.moments.std,
        "reward_sum": float(masked_sum(rewards_BR, mask) / B),
        "kl_per_token": float(masked_mean(kl_BR, mask)),
        "kl_per_sequence": float(masked_sum(kl_BR, mask) / B),
        "kl_k3_per_sequence": float(masked_sum(k3(scored.old_logprobs_BR, scored.reference_logprobs_BR), mask) / B),
        "kl_coefficient": job.steering.kl,
        "response_length": float(length_B.mean()),
        "response_length_finished": float(length_B[finished].mean()) if bool(finished.any()) else math.nan,
        "truncated_share": float(rollout.truncated_B.float().mean()),
        "perplexity": math.exp(-float(masked_mean(statistics.plain_logprobs_BR, mask))),
        "entropy": float(masked_mean(statistics.entropy_BR, mask)),
        **sampler_gap(rollout.behaviour_logprobs_BR, scored.old_logprobs_BR, mask),
        "explained_variance": float(explained_variance(scored.values_BR, experience.returns_BR, mask))
        if job.players.critic is not None
        else math.nan,
        "advantage_std": float(torch.sqrt(masked_mean(experience.advantages_BR.square(), mask))),
        **totals.means(),
        **text_health([p.messages[-1]["content"] for p in rollout.prompts], texts),
        "tokens/generated": int(rollout.length_B.sum()),
        "tokens/read": int(rollout.length_B.sum()) + sum(map(len, rollout.prompt_ids)),
        "peak_memory_gib": _peak_memory_gib(job.players.compute.device),
    }
    if scored.full_kl_BR is not None:
        row["kl_full_per_sequence"] = float(masked_sum(scored.full_kl_BR, mask) / B)
    if config.objective.kind == "penalty":
        row["penalty"] = job.steering.penalty
    if config.objective.target_kl is not None:
        row["stopped_early"] = totals.stopped_early
    if job.judge is not None:
        row["gold_mean"] = sum(judged(job.judge, rollout.prompts, texts, name="judge", ids=rollout.responses())) / B
    row |= job.players.clock.row()
    return {**row, "tokens_per_second": row["tokens/generated"] / row["seconds/total"]}


def importance(learnt: Experience, config: PPOConfig) -> dict[str, float]:
    """Mean importance weight of a token, and the share of tokens at the cap, over all that was learnt from: with a
    buffer the older rollouts too, whose weights they are for."""
    weights_BR, cap, mask = learnt.weights_BR, config.objective.importance_cap, learnt.rollout.mask_BR
    if weights_BR is None or cap is None:
        return {}
    return {
        "importance_weight": float(masked_mean(weights_BR, mask)),
        "importance_capped_share": float(masked_mean((weights_BR >= cap).float(), mask)),
    }


def sampler_gap(behaviour_BR: Tensor, old_BR: Tensor, mask: Tensor) -> dict[str, float]:
    """How far what the sampler says it sampled with is from what the trainer reads, log-probs [B, R] of the same ids.

    Mean and largest distance per token, an estimate of KL(sampler ‖ old) per token, and the share of responses that old
    gives less than half or more than twice the sampler's probability.
    """
    difference_BR = zero_masked(old_BR - behaviour_BR, mask)
    ratio_B = difference_BR.sum(1).exp()
    return {
        "behaviour_gap": float(masked_mean(difference_BR.abs(), mask)),
        "behaviour_gap_max": float(difference_BR.abs().max()),
        "behaviour_kl": float(masked_mean(k3(behaviour_BR, old_BR), mask)),
        "behaviour_far_share": float(((ratio_B < FAR[0]) | (ratio_B > FAR[1])).float().mean()),
    }


def raise_alarms(history: list[dict[str, Any]], row: dict[str, Any]) -> list[str]:
    """Add the row to the history; the messages of the alarms that hold, and whether one of them says stop."""
    history.append(row)
    alarms = check(history)
    row["stop"] = any(alarm.severity == "stop" for alarm in alarms)
    return [alarm.message for alarm in alarms]


def sample_rows(iteration: int, scored: ScoredRollouts, texts: list[str]) -> list[dict[str, Any]]:
    """Responses of the iteration with their scores, in rollout order."""
    prompts = [prompt.messages[-1]["content"] for prompt in scored.rollout.prompts]
    return [
        {"iteration": iteration, "prompt": p, "response": t, "score": s}
        for p, t, s in zip(prompts, texts, scored.score_B.tolist(), strict=True)
    ]


def note(row: dict[str, Any]) -> str:
    """The few numbers beside the progress bar."""
    gold = f", judge {row['gold_mean']:.2f}" if "gold_mean" in row else ""
    count = len(row.get("alarms", []))
    warning = f", {count} alarm{'s' if count > 1 else ''}" if count else ""
    reached = f"KL {row['kl_per_sequence']:.1f}, length {row['response_length']:.0f}"
    return f"score {row['score_mean']:.2f}{gold}, {reached}{warning}"


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
