"""PPO on a language model, line by line as in Algorithm 1 of "Secrets of RLHF in Large Language Models, Part I"."""

from __future__ import annotations

from typing import Any

from ppomax.config import PPOConfig
from ppomax.engine import world
from ppomax.models.load import export, export_scalar
from ppomax.rewards.callables import RewardFunction, function_name
from ppomax.rollout.collect import response_texts
from ppomax.stages.buffer import joined, reread
from ppomax.stages.estimate import estimate, seen
from ppomax.stages.ppo_fit import expect_known
from ppomax.stages.ppo_log import importance, metrics_row, note, raise_alarms, sample_rows
from ppomax.stages.ppo_setup import prepare, state_of
from ppomax.stages.scoring import plan_minibatches, score
from ppomax.stages.session import Session, session
from ppomax.stages.update import distance_moved, update
from ppomax.types import SetupError


def ppo(
    config: PPOConfig, *, reward: RewardFunction | None = None, resume: bool = False, fresh: bool = False
) -> dict[str, Any]:
    """Train a policy against a reward; it is in `run_dir/final`, the critic in `run_dir/critic`.

    reward: any callable (prompts, responses, **columns) → a number per response, or per sampled token, instead of
    `config.reward`. resume, fresh, and what is raised: as for `sft`; an error of the callable passes through.
    Returns summary.json's content.
    """
    if isinstance(reward, str):
        raise SetupError(f"reward: found the text {reward!r}, expected a callable; names go into PPOConfig(reward=...)")
    if reward is not None and not callable(reward):
        raise SetupError(
            f"reward: found {type(reward).__name__}, expected one callable; several go, by name and with weights, into "
            "PPOConfig(reward=...)"
        )
    if reward is not None:  # config.yaml records what the run was trained for
        config = config.model_copy(update={"reward": (function_name(reward),)})
    with session("ppo", config, unit="iteration", resume=resume, fresh=fresh) as run:
        return run.finished() or train(run, config, reward)


def train(run: Session, config: PPOConfig, reward: RewardFunction | None) -> dict[str, Any]:
    """The loop: sample, score, shape, estimate, update, log, save."""
    job = prepare(run, config, reward)
    clock = job.players.clock
    with run.progress(config.iterations, done=job.start, unit="iterations") as advance:
        for iteration in job.remaining():
            run.meet(f"iteration {iteration}")
            clock.restart()
            with clock("generate"):
                rollout = job.roll_out(iteration)
                texts = response_texts(job.players.tokenizer, rollout)
            expect_known(job.players, rollout)
            with clock("score"):
                plan = plan_minibatches(
                    rollout, job.players, minibatch=config.minibatch, budget=config.compute.tokens_per_microbatch,
                    seed=config.seed, iteration=iteration,
                )  # fmt: skip
                scored, statistics = score(
                    job.players, rollout, plan, texts, temperature=config.sampling.temperature,
                    bootstrap=config.score.truncated == "bootstrap", full_kl=config.kl.estimator == "full",
                )  # fmt: skip
                older = reread(job.players, job.kept, config, iteration)
            job.seen = seen(scored, job.seen, config)
            if iteration == 0:
                scored = job.scale_critic(scored)
            with clock("train"):
                experience, rewards_BR = estimate(scored, job.seen, config, kl_coefficient=job.steering.kl)
                again = [(estimate(s, job.seen, config, kl_coefficient=job.steering.kl)[0], p) for s, p in older]
                learnt, whole_plan = joined([(experience, plan), *again])
                totals = update(
                    job.players, job.optimisers, learnt, whole_plan, config, iteration=iteration, ptx=job.ptx,
                    steering=job.steering,
                )  # fmt: skip
                job.kept.append(scored)
            row = metrics_row(iteration, config, scored, statistics, experience, rewards_BR, totals, texts, job)
            row |= importance(learnt, config)
            if config.objective.penalty_target is not None:
                row["distance_moved"] = distance_moved(job.players, experience, plan, config)
            row = world.of_first(row)  # what is decided from it is decided alike in all processes
            row["alarms"] = raise_alarms(job.history, row)
            job.steer(row)
            run.append(row)
            job.keep_samples(run, sample_rows(iteration, scored, texts))
            advance(note=note(row))
            last = iteration == job.last_iteration or job.must_stop(row)
            run.checkpoint(iteration, last, lambda: state_of(job))
            if last:
                break
    job.export_critic(run, export_scalar)
    with job.averaged(run, export):
        return run.finish(lambda folder: export(job.players.policy.model, job.players.tokenizer, folder), job.summary())
