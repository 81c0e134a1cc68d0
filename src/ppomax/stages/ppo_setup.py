"""Everything that PPO needs before its first iteration, and what it keeps between iterations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ppomax.config import PPOConfig
from ppomax.data.readers import read_dialogues
from ppomax.engine.durable import disk_errors
from ppomax.engine.optimiser import Optimiser
from ppomax.engine.rundir import save_final
from ppomax.models.load import load_tokenizer
from ppomax.monitor.log import append_samples, read_metrics
from ppomax.rewards.callables import RewardFunction, load_function
from ppomax.rewards.model import RewardModel
from ppomax.rl.shaping import Moments
from ppomax.rollout.collect import eos_token_ids
from ppomax.rollout.sampler import Distribution
from ppomax.stages.inputs import (
    Tokens,
    compute_of,
    context_limit,
    dialogue_tokens,
    fitted_prompts,
    required,
)
from ppomax.stages.players import Players, load_players
from ppomax.stages.session import Session
from ppomax.stages.sft import adamw, schedule
from ppomax.stages.update import Optimisers
from ppomax.types import Prompt, ScoredRollouts, SetupError

SAMPLES_KEPT = 8


@dataclass
class Job:
    """A PPO run's players, data and state."""

    config: PPOConfig
    players: Players
    optimisers: Optimisers
    prompts: list[Prompt]
    prompt_ids: list[tuple[int, ...]]
    ptx: list[Tokens]
    judge: RewardFunction | None
    distribution: Distribution
    eos_ids: list[int]
    moments: Moments = field(default_factory=Moments)
    history: list[dict[str, Any]] = field(default_factory=list)
    start: int = 0

    @property
    def prompts_per_iteration(self) -> int:
        """Distinct prompts of one rollout batch."""
        return self.config.rollout_batch // self.config.samples_per_prompt

    def scale_critic(self, scored: ScoredRollouts) -> ScoredRollouts:
        """Bring a critic that came from the reward model to the unit of normalised scores: head and values × 1/σ."""
        if not self.config.score.normalise or self.config.critic.init != "reward" or self.moments.std == 0:
            return scored
        factor = 1.0 / self.moments.std
        for name in self.players.critic.trained_parameters():
            if name.startswith("score."):
                self.optimisers.critic.scale(name, factor)
        return replace(scored, values_BR=scored.values_BR * factor, bootstrap_B=scored.bootstrap_B * factor)

    def keep_samples(self, run: Session, rows: list[dict[str, Any]]) -> None:
        """Write the first few responses of every iteration to samples.jsonl."""
        with disk_errors(run.run.samples):
            append_samples(run.run.samples, rows[:SAMPLES_KEPT])

    def remaining(self) -> range:
        """The iterations still to do; none if a stop alarm had ended the run before it was interrupted."""
        stopped = bool(self.history) and self.must_stop(self.history[-1])
        return range(self.start, self.start if stopped else self.config.iterations)

    def must_stop(self, row: Mapping[str, Any]) -> bool:
        """Whether an alarm of severity stop ends the run."""
        return self.config.stop_on_alarm and bool(row.get("stop"))

    def export_critic(self, run: Session, write: Any) -> None:
        """The critic, in the layout of a sequence classifier, beside final/."""
        save_final(
            run.run.path / "critic", lambda folder: write(self.players.critic.model, self.players.tokenizer, folder)
        )

    def summary(self) -> dict[str, Any]:
        """The run in a few numbers: first and last of what matters."""
        first, last = self.history[0], self.history[-1]
        keys = ("score_mean", "kl_per_sequence", "response_length", "perplexity", "entropy")
        return {
            "iterations": last["iteration"] + 1,
            "responses": self.config.rollout_batch * (last["iteration"] + 1),
            **{f"{key}_first": first[key] for key in keys},
            **{f"{key}_last": last[key] for key in keys},
            "alarms": sorted({alarm.partition(":")[0] for row in self.history for alarm in row.get("alarms", [])}),
        }


def prepare(run: Session, config: PPOConfig, reward: RewardFunction | None) -> Job:
    """Read data, load players, print the plan, rehearse the save, and pick up a checkpoint if there is one."""
    _expect_possible(config)
    compute = compute_of(config.compute)
    judge = load_function(config.judge) if config.judge else None
    specs = required(config.prompts, "prompts", "prompts to answer")
    tokenizer = load_tokenizer(config.policy, config.compute.chat_template)
    prompts, prompt_ids, report = fitted_prompts(tokenizer, specs, config.max_prompt_tokens)
    ptx, ptx_report = _read_ptx(tokenizer, config)
    players = load_players(config, compute, tokenizer, reward)
    longest = max(map(len, prompt_ids)) + config.sampling.max_new_tokens
    for role, player in (("policy", players.policy), ("critic", players.critic)):
        context_limit(player.model, longest, f"{role}: longest prompt + response")
    optimisers = Optimisers(
        Optimiser(players.policy.trained_parameters(), **adamw(config.optim)),
        Optimiser(players.critic.trained_parameters(), **adamw(config.critic.optim)),
    )
    job = Job(
        config, players, optimisers, prompts, prompt_ids, ptx, judge,
        distribution=Distribution(config.sampling.temperature),
        eos_ids=eos_token_ids(players.policy.model, tokenizer),
    )  # fmt: skip
    _print_plan(run, job, report, ptx_report)
    run.rehearse(optimisers.policy.bytes() + optimisers.critic.bytes())
    models = [term.reward.name for term in players.terms if isinstance(term.reward, RewardModel)]
    restored = run.restore(frozen=[config.policy, *models])
    if restored is not None:
        _restore(job, *restored)
        job.history = [row for row in read_metrics(run.run.metrics) if row["iteration"] < job.start]
    return job


def state_of(job: Job) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a checkpoint holds: masters and moments of both trained players, and the score history.

    Data position, schedules and random streams are functions of the iteration number.
    """
    tensors = {f"policy/{name}": t for name, t in job.optimisers.policy.state_tensors().items()}
    tensors |= {f"critic/{name}": t for name, t in job.optimisers.critic.state_tensors().items()}
    return tensors, {"moments": job.moments.to_dict()}


def _restore(job: Job, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    for role, optimiser in (("policy/", job.optimisers.policy), ("critic/", job.optimisers.critic)):
        optimiser.load_state_tensors({k.removeprefix(role): t for k, t in tensors.items() if k.startswith(role)})
    job.moments = Moments.from_dict(state["moments"])
    job.start = int(state["iteration"]) + 1


def _expect_possible(config: PPOConfig) -> None:
    batch = config.rollout_batch
    for name, size in (("samples_per_prompt", config.samples_per_prompt), ("minibatch", config.minibatch)):
        if batch % size:
            fitting = max(d for d in range(1, min(size, batch) + 1) if batch % d == 0)
            raise SetupError(f"{name}: found {size}, expected a divisor of rollout_batch {batch}, such as {fitting}")
    if config.critic.pretrain_iterations >= config.iterations:
        raise SetupError(
            f"critic.pretrain_iterations: found {config.critic.pretrain_iterations}, expected less than iterations "
            f"({config.iterations}): the policy would never move"
        )
    warped = [k for k in ("top_p", "top_k", "repetition_penalty") if getattr(config.sampling, k) is not None]
    if warped:
        raise SetupError(
            f"sampling.{warped[0]}: found {getattr(config.sampling, warped[0])}, expected None: the KL to the "
            "reference and the ratio are undefined off the sampled support. Use it in `ppomax evaluate`"
        )
    if config.ptx_weight is not None and not config.ptx_data:
        raise SetupError("ptx_weight: found a weight but no ptx_data; give --ptx-data FILE or --ptx-weight None")
    if config.ptx_data and config.ptx_weight is None:
        raise SetupError("ptx_data: found data but no weight; give --ptx-weight, e.g. 0.1, or leave the data out")


def _read_ptx(tokenizer: Any, config: PPOConfig) -> tuple[list[Tokens], str]:
    if not config.ptx_data:
        return [], "off"
    dialogues, report = read_dialogues(list(config.ptx_data))
    rows, cut = dialogue_tokens(tokenizer, dialogues, config.max_prompt_tokens + config.sampling.max_new_tokens)
    return rows, f"{config.ptx_weight:g} × LM loss on {config.ptx_batch or config.minibatch} of {report}; {cut}"


def _print_plan(run: Session, job: Job, report: str, ptx_report: str) -> None:
    config, players = job.config, job.players
    steps = config.rollout_batch // config.minibatch * config.epochs
    policy_steps = (config.iterations - config.critic.pretrain_iterations) * steps
    passes = config.iterations * job.prompts_per_iteration / len(job.prompts)
    weights = sum(t.numel() * t.element_size() for t in _distinct_parameters(players))
    states = job.optimisers.policy.bytes() + job.optimisers.critic.bytes()
    vocabulary = players.policy.model.config.vocab_size  # type: ignore[union-attr]
    longest = max(map(len, job.prompt_ids)) + config.sampling.max_new_tokens
    run.plan(
        f"ppo: {config.policy} → {run.run.final}",
        {
            "prompts": f"{report}; {passes:.2f} passes",
            "rewards": " + ".join(f"{t.weight:g} × {t.name}" for t in players.terms),
            "iterations": f"{config.iterations}, the first {config.critic.pretrain_iterations} for the critic alone",
            "rollout": f"{config.rollout_batch} responses = {job.prompts_per_iteration} prompts × "
            f"{config.samples_per_prompt}, at most {config.sampling.max_new_tokens} tokens, temperature "
            f"{config.sampling.temperature:g}",
            "steps": f"{steps} an iteration ({config.minibatch} responses each, {config.epochs} epochs), "
            f"{policy_steps} in all",
            "policy": schedule(config.optim, policy_steps),
            "critic": schedule(config.critic.optim, policy_steps),
            "ptx": ptx_report,
            "compute": f"{players.compute.device}, {str(players.compute.dtype)[6:]}, vocabulary {vocabulary:,}, "
            f"sequences up to {longest} tokens",
            "memory": f"weights {_gib(weights)}, masters and moments {_gib(states)}, checkpoint {_gib(states)}",
        },
    )


def _distinct_parameters(players: Players) -> list[Tensor]:
    models = [players.policy, players.reference, players.critic]
    models += [t.reward.scalar for t in players.terms if isinstance(t.reward, RewardModel)]
    return list({id(p): p for m in models for p in m.parameters()}.values())


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
