"""PPO on a language model, line by line as in Algorithm 1 of "Secrets of RLHF in Large Language Models, Part I"."""

from __future__ import annotations

from typing import Any

import torch

from ppomax.config import PPOConfig
from ppomax.models.load import export, export_scalar
from ppomax.monitor.progress import progress
from ppomax.rewards.callables import RewardFunction, function_name
from ppomax.rl.returns import gae, lambda_returns, monte_carlo
from ppomax.rl.shaping import Moments, missing_eos_penalty, normalise_and_clip, token_rewards
from ppomax.rollout.collect import collect, iteration_prompts, response_texts
from ppomax.stages.ppo_log import Clock, metrics_row, note, raise_alarms, sample_rows
from ppomax.stages.ppo_setup import prepare, state_of
from ppomax.stages.scoring import plan_minibatches, score
from ppomax.stages.session import Session, session
from ppomax.stages.update import update
from ppomax.types import Experience, ScoredRollouts


def ppo(
    config: PPOConfig, *, reward: RewardFunction | None = None, resume: bool = False, fresh: bool = False
) -> dict[str, Any]:
    """Train a policy against a reward; it is in `run_dir/final`, the critic in `run_dir/critic`.

    reward: any callable (prompts, responses, **columns) → scores, instead of `config.reward`.
    Returns summary.json's content.
    """
    if reward is not None:  # config.yaml records what the run was trained for
        config = config.model_copy(update={"reward": (function_name(reward),)})
    with session(
        "ppo", config, run_dir=config.run_dir, save=config.save, unit="iteration", resume=resume, fresh=fresh
    ) as run:
        return run.finished() or train(run, config, reward)


def train(run: Session, config: PPOConfig, reward: RewardFunction | None) -> dict[str, Any]:
    """The loop: sample, score, shape, estimate, update, log, save."""
    job = prepare(run, config, reward)
    with progress("ppo", config.iterations, done=job.start, unit="iterations") as advance:
        for iteration in job.remaining():
            clock = Clock()
            with clock("generate"):
                indices = iteration_prompts(len(job.prompts), job.prompts_per_iteration, iteration, config.seed)
                rollout = collect(
                    job.players.policy, job.prompts, job.prompt_ids, indices, samples=config.samples_per_prompt,
                    iteration=iteration, seed=config.seed, limit=config.sampling.max_new_tokens,
                    distribution=job.distribution, eos_ids=job.eos_ids, max_rows=config.sampling.max_rows,
                )  # fmt: skip
                texts = response_texts(job.players.tokenizer, rollout)
            with clock("score"):
                plan = plan_minibatches(
                    rollout, job.players, minibatch=config.minibatch, budget=config.compute.tokens_per_microbatch,
                    seed=config.seed, iteration=iteration,
                )  # fmt: skip
                scored, statistics = score(
                    job.players, rollout, plan, texts, temperature=config.sampling.temperature,
                    bootstrap=config.score.truncated == "bootstrap",
                )  # fmt: skip
            job.moments = seen(scored, job.moments, config)
            if iteration == 0:
                scored = job.scale_critic(scored)
            with clock("train"):
                experience, rewards_BR = estimate(scored, job.moments, config)
                totals = update(
                    job.players, job.optimisers, experience, plan, config, iteration=iteration, ptx=job.ptx
                )  # fmt: skip
            row = metrics_row(iteration, config, scored, statistics, experience, rewards_BR, totals, texts, job, clock)
            row["alarms"] = raise_alarms(job.history, row)
            run.append(row)
            job.keep_samples(run, sample_rows(iteration, scored, texts))
            advance(note=note(row))
            last = iteration == config.iterations - 1 or job.must_stop(row)
            run.checkpoint(iteration, last, lambda: state_of(job))
            if last:
                break
    job.export_critic(run, export_scalar)
    return run.finish(lambda folder: export(job.players.policy.model, job.players.tokenizer, folder), job.summary())


def seen(scored: ScoredRollouts, moments: Moments, config: PPOConfig) -> Moments:
    """The score history with this batch included; bootstrapped rows carry no score and stay out."""
    counted = (
        ~scored.rollout.truncated_B if config.score.truncated == "bootstrap" else torch.ones_like(scored.score_B) > 0
    )
    return moments.update(scored.score_B[counted].tolist())


def estimate(scored: ScoredRollouts, moments: Moments, config: PPOConfig) -> tuple[Experience, torch.Tensor]:
    """Scores → rewards per token [B, R] → advantages and returns, in the order that CORRECTNESS demands."""
    rollout, mask = scored.rollout, scored.rollout.mask_BR
    score_B = scored.score_B
    if config.score.normalise:
        score_B = normalise_and_clip(score_B, moments, clip=config.score.clip)
    elif config.score.clip is not None:
        score_B = score_B.clamp(-config.score.clip, config.score.clip)
    if config.score.truncated == "bootstrap":
        score_B = torch.where(rollout.truncated_B, 0.0, score_B)
    if config.score.missing_eos_penalty is not None:
        score_B = score_B + missing_eos_penalty(rollout.truncated_B, penalty=config.score.missing_eos_penalty)
    rewards_BR = token_rewards(
        score_B, scored.old_logprobs_BR, scored.reference_logprobs_BR, mask,
        kl_coefficient=config.kl.coefficient or 0.0, dense=scored.dense_BR,
    )  # fmt: skip
    advantages_BR = gae(
        rewards_BR, scored.values_BR, mask, gamma=config.gamma, gae_lambda=config.gae_lambda,
        bootstrap=scored.bootstrap_B,
    )  # fmt: skip
    if config.critic.target == "monte_carlo":
        returns_BR = monte_carlo(rewards_BR, mask, gamma=config.gamma, bootstrap=scored.bootstrap_B)
    else:
        returns_BR = lambda_returns(advantages_BR, scored.values_BR, mask)
    experience = Experience(rollout, scored.old_logprobs_BR, scored.values_BR, advantages_BR, returns_BR)
    return experience, rewards_BR
