"""Everything that PPO needs before its first iteration, and what it keeps between iterations."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from ppomax.config import PPOConfig
from ppomax.data.card import Part, data_card
from ppomax.data.readers import read_dialogues
from ppomax.data.split import by_weight, weighted_order
from ppomax.engine import world
from ppomax.engine.averaging import MovingAverage
from ppomax.engine.durable import disk_errors
from ppomax.engine.optimiser import Optimiser, local
from ppomax.engine.speed import model_shapes, peak_rate
from ppomax.models.load import load_tokenizer
from ppomax.monitor.log import append_samples, read_metrics, without_nan
from ppomax.rewards.callables import RewardFunction, expect_takes, limited, load_function, shared_columns
from ppomax.rewards.model import RewardModel
from ppomax.rl.convergence import has_converged
from ppomax.rl.kl import adaptive_coefficient, penalty_coefficient
from ppomax.rl.shaping import Moments
from ppomax.rollout.collect import Sampling, collect, iteration_prompts, repeated
from ppomax.rollout.vllm import VLLM, vllm_for
from ppomax.stages.buffer import from_tensors, tensors_of, whole_rollout
from ppomax.stages.estimate import History
from ppomax.stages.inputs import (
    Tokens,
    compute_of,
    dialogue_tokens,
    fingerprint,
    fitted_prompts,
    memory_of,
    of_dialogues,
    required,
    sampling_of,
    trained_of,
)
from ppomax.stages.players import Players, load_players
from ppomax.stages.ppo_checks import PRETRAIN_WINDOW, expect_possible
from ppomax.stages.ppo_fit import expect_fitting, expect_readable
from ppomax.stages.session import Session
from ppomax.stages.sft import adamw, schedule
from ppomax.stages.update import Optimisers, Steering, schedule_position
from ppomax.types import Prompt, Rollout, ScoredRollouts, SetupError

SAMPLES_KEPT = 8
START_WORDS = ("reward", "policy")


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
    how: Sampling
    steering: Steering
    kept: deque[ScoredRollouts]
    engine: VLLM | None = None
    seen: History = field(default_factory=History)
    history: list[dict[str, Any]] = field(default_factory=list)
    start: int = 0

    @property
    def prompts_per_iteration(self) -> int:
        """Distinct prompts of one rollout batch."""
        return self.config.rollout_batch // self.config.samples_per_prompt

    def prompts_of(self, iteration: int) -> list[int]:
        """Indices of an iteration's prompts: a function of the iteration's number."""
        return iteration_prompts(len(self.prompts), self.prompts_per_iteration, iteration, self.config.seed)

    def roll_out(self, iteration: int) -> Rollout:
        """An iteration's responses, sampled from the policy as it is now; of several processes, each its prompts."""
        config, prompts = self.config, self.prompts_per_iteration
        bounds = [config.samples_per_prompt * (prompts * r // world.size()) for r in range(world.size() + 1)]
        return whole_rollout(collect(
            self.players.policy, self.prompts, self.prompt_ids, self.prompts_of(iteration),
            samples=config.samples_per_prompt, iteration=iteration, seed=config.seed,
            how=self.how, clock=self.players.clock, part=slice(*bounds[world.rank() : world.rank() + 2]),
            engine=self.engine,
        ))  # fmt: skip

    @property
    def moments(self) -> Moments:
        """The history of all scores."""
        return self.seen.scores

    @property
    def last_iteration(self) -> int:
        """The policy's iterations are a fixed number; pre-training that ends early ends the run earlier."""
        cap = self.config.critic.pretrain_iterations
        return self.config.iterations - 1 - (0 if self.steering.pretrained is None else cap - self.steering.pretrained)

    def steer(self, row: Mapping[str, Any]) -> None:
        """What moves between iterations, at most once each: η, β, and the end of the critic's pre-training."""
        config, iteration = self.config, int(row["iteration"])
        pretraining = self.steering.pretraining(iteration, config)
        if config.critic.pretrain_tolerance is not None and pretraining:
            losses = [past["value_loss"] for past in self.history if past["phase"] == "critic"]
            flat = has_converged(losses, window=PRETRAIN_WINDOW, tolerance=config.critic.pretrain_tolerance)
            if flat and row["explained_variance"] > 0:
                self.steering.pretrained = iteration + 1
        # A policy that makes no numbers steers nothing: its steps are skipped and counted (stages/nonfinite.py).
        if config.kl.target is not None and not pretraining and math.isfinite(row["kl_per_sequence"]):
            self.steering.kl = adaptive_coefficient(
                self.steering.kl, row["kl_per_sequence"], target=config.kl.target, horizon=config.kl.horizon,
                samples=config.rollout_batch,
            )  # fmt: skip
        if config.objective.penalty_target is not None and not pretraining and math.isfinite(row["distance_moved"]):
            self.steering.penalty = penalty_coefficient(
                self.steering.penalty, row["distance_moved"], target=config.objective.penalty_target
            )

    def scale_critic(self, scored: ScoredRollouts) -> ScoredRollouts:
        """Bring a critic that came from the reward model to the unit of the rewards: head and values × weight/σ.

        weight: the model's in the sum of rewards. σ: what scores or returns are divided by; 1 where nothing is.
        """
        critic, optimiser, settings = self.players.critic, self.optimisers.critic, self.config.score
        if critic is None or optimiser is None or self.config.critic.init != "reward":
            return scored
        divided = self.seen.scores if settings.normalise else self.seen.returns if settings.scale else None
        weight = next(term.weight for term in self.players.terms if isinstance(term.reward, RewardModel))
        factor = weight / divided.std if divided is not None and divided.varies else weight
        for name in critic.trained_parameters():
            if name.startswith("score."):
                optimiser.scale(name, factor)
        return replace(scored, values_BR=scored.values_BR * factor, bootstrap_B=scored.bootstrap_B * factor)

    def keep_samples(self, run: Session, rows: list[dict[str, Any]]) -> None:
        """Write a few responses of every iteration, of as many prompts as there are, to samples.jsonl."""
        if world.is_first():
            with disk_errors(run.run.samples):
                append_samples(run.run.samples, rows[:: max(1, len(rows) // SAMPLES_KEPT)][:SAMPLES_KEPT])

    def remaining(self) -> range:
        """The iterations still to do; none if a stop alarm had ended the run before it was interrupted."""
        stopped = bool(self.history) and self.must_stop(self.history[-1])
        return range(self.start, self.start if stopped else self.last_iteration + 1)

    def must_stop(self, row: Mapping[str, Any]) -> bool:
        """Whether an alarm of severity stop ends the run."""
        return self.config.stop_on_alarm and bool(row.get("stop"))

    def export_critic(self, run: Session, write: Any) -> None:
        """The critic, in the layout of a sequence classifier, beside final/."""
        critic = self.players.critic
        if critic is not None:
            run.save_model(run.run.path / "critic", lambda folder: write(critic.model, self.players.tokenizer, folder))

    @contextmanager
    def averaged(self, run: Session, write: Any) -> Iterator[None]:
        """With a moving average: the policy as it was trained goes to last/, the average into the model for final/."""
        average, policy = self.optimisers.average, self.players.policy
        if average is None:
            yield
            return
        run.save_model(run.run.path / "last", lambda folder: write(policy.model, self.players.tokenizer, folder))
        with average.inside(policy.trained_parameters()):
            yield

    def summary(self) -> dict[str, Any]:
        """The run in a few numbers: first and last of what matters."""
        first, last = self.history[0], self.history[-1]
        keys = ("score_mean", "kl_per_sequence", "response_length", "perplexity", "entropy")
        return without_nan({
            "iterations": last["iteration"] + 1,
            "responses": self.config.rollout_batch * (last["iteration"] + 1),
            **{f"{key}_first": first[key] for key in keys},
            **{f"{key}_last": last[key] for key in keys},
            "alarms": sorted({alarm.partition(":")[0] for row in self.history for alarm in row.get("alarms", [])}),
        })  # fmt: skip


def prepare(run: Session, config: PPOConfig, reward: RewardFunction | None) -> Job:
    """Read data, load players, print the plan, rehearse the save, and pick up a checkpoint if there is one."""
    expect_possible(config)
    compute = compute_of(config.compute)
    if config.sampling.engine == "vllm":  # whether it is there, before anything is read
        vllm_for(compute)
    judge = load_function(config.judge) if config.judge else None
    specs = required(config.prompts, "prompts", "prompts to answer")
    tokenizer = load_tokenizer(config.policy, config.compute.chat_template)
    read = fitted_prompts(tokenizer, specs, config.max_prompt_tokens)
    order = weighted_order(read.prompts, config.seed)
    prompts, prompt_ids = [read.prompts[i] for i in order], [read.ids[i] for i in order]
    columns = shared_columns([prompt.columns for prompt in prompts])
    if judge is not None:
        expect_takes(judge, columns, what=f"judge {config.judge}")
        judge = limited(judge, config.reward_timeout, name="judge")
    ptx, ptx_report = _read_ptx(tokenizer, config)
    players = load_players(config, compute, tokenizer, reward, columns)
    shapes = model_shapes(players.policy.base.config.to_dict())
    players.clock.peak = peak_rate(compute.device, compute.dtype, shapes.values())
    longest = max(map(len, prompt_ids)) + config.sampling.max_new_tokens
    expect_fitting(players, prompt_ids, ptx, longest)
    expect_readable(players, prompts)
    optimisers = _optimisers(players, config)
    job = Job(
        config, players, optimisers, prompts, prompt_ids, ptx, judge,
        how=sampling_of(config.sampling, players.policy, tokenizer), steering=Steering.start(config),
        kept=deque(maxlen=config.buffer - 1),
    )  # fmt: skip
    _print_plan(run, job, str(read), ptx_report)
    job.engine = _engine(run, job, longest)
    run.rehearse(_state_bytes(optimisers))
    models = [term.reward.name for term in players.terms if isinstance(term.reward, RewardModel)]
    starts = [config.policy, config.reference, config.critic.init if config.critic.init not in START_WORDS else None]
    asked = ((row, (p.messages, sorted(p.columns.items()))) for row, p in zip(prompt_ids, prompts, strict=True))
    restored = run.restore(
        frozen=[*filter(None, starts), *models], data=fingerprint(asked, of_dialogues(ptx)),
        empty=lambda: _empty_state(optimisers),
    )  # fmt: skip
    run.describe(data_card(read.report, {"prompts": Part(read.prompts, [*map(len, read.ids)])}, fitted=read.fitted))
    if restored is not None:
        _restore(job, *restored)
        job.history = [_measured(row) for row in read_metrics(run.run.metrics) if row["iteration"] < job.start]
    return job


def _measured(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the log with NaN for numbers that were none, which JSON has as null."""
    return row | {key: math.nan for key in row.get("nonfinite", ()) if row.get(key, 0) is None}


def state_of(job: Job) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a checkpoint holds: masters and moments of the trained players, the average, the history, the steering.

    Data position, schedules and random streams are functions of the iteration number.
    """
    tensors = {f"policy/{name}": t for name, t in job.optimisers.policy.state_tensors().items()}
    if job.optimisers.critic is not None:
        tensors |= {f"critic/{name}": t for name, t in job.optimisers.critic.state_tensors().items()}
    if job.optimisers.average is not None:
        tensors |= {f"average/{name}": t for name, t in job.optimisers.average.means.items()}
    tensors |= {f"buffer/{name}": t for name, t in tensors_of(job.kept).items()}
    return tensors, {"seen": job.seen.to_dict(), "steering": asdict(job.steering)}


def _restore(job: Job, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    def of(role: str) -> dict[str, Tensor]:
        return {k.removeprefix(role): t for k, t in tensors.items() if k.startswith(role)}

    job.optimisers.policy.load_state_tensors(of("policy/"), adopt=world.size() > 1)
    if job.optimisers.critic is not None:
        job.optimisers.critic.load_state_tensors(of("critic/"), adopt=world.size() > 1)
    if job.optimisers.average is not None:
        job.optimisers.average.load(of("average/"))
    job.seen, job.steering = History.from_dict(state["seen"]), Steering(**state["steering"])
    job.start = int(state["iteration"]) + 1
    for iteration in range(max(job.start - job.config.buffer + 1, 0), job.start):
        rows, _ = repeated(job.prompts_of(iteration), job.config.samples_per_prompt)
        prompts, ids = tuple(job.prompts[i] for i in rows), tuple(job.prompt_ids[i] for i in rows)
        job.kept.append(from_tensors(of("buffer/"), len(job.kept), prompts, ids))


def _optimisers(players: Players, config: PPOConfig) -> Optimisers:
    policy = Optimiser(players.policy.trained_parameters(), **adamw(config.optim))
    if config.objective.kind == "trpo" and any(m is not policy.parameters[n] for n, m in policy.masters.items()):
        raise SetupError(f"compute.dtype: found {players.compute.dtype} with objective trpo, expected float32")
    critic = None
    if players.critic is not None:
        critic = Optimiser(players.critic.trained_parameters(), **adamw(config.critic.optim))
    average = None if config.ema is None else MovingAverage(policy.masters, decay=config.ema)
    return Optimisers(policy, critic, average)


def _engine(run: Session, job: Job, longest: int) -> VLLM | None:
    """The engine that samples instead of the native sampler, once it has shown that it computes as the policy does."""
    sampling, policy = job.config.sampling, job.players.policy
    if sampling.engine == "native":
        return None
    engine = VLLM(job.config.policy, policy, job.players.compute, longest=longest, max_rows=sampling.max_rows)
    run.at_end.callback(engine.close)
    gap = engine.check(policy, job.prompt_ids, sampling.temperature)
    run.console.print(f"  {engine.name}: its log-probs are {gap:.2g} nats a token from the trainer's", markup=False)
    return engine


def _empty_state(optimisers: Optimisers) -> dict[str, Tensor]:
    empty = {f"policy/{name}": t for name, t in optimisers.policy.empty_state().items()}
    if optimisers.critic is not None:
        empty |= {f"critic/{name}": t for name, t in optimisers.critic.empty_state().items()}
    if optimisers.average is not None:
        empty |= {f"average/{name}": mean for name, mean in optimisers.average.means.items()}
    return empty


def _state_bytes(optimisers: Optimisers) -> int:
    sizes = [optimisers.policy.bytes(), 0 if optimisers.critic is None else optimisers.critic.bytes()]
    if optimisers.average is not None:
        sizes.append(sum(4 * mean.numel() for mean in optimisers.average.means.values()))
    return sum(sizes)


def _training_bytes(optimisers: Optimisers) -> int:
    average = () if optimisers.average is None else optimisers.average.means.values()
    both = [optimisers.policy, *([] if optimisers.critic is None else [optimisers.critic])]
    return sum(optimiser.training_bytes() for optimiser in both) + sum(4 * mean.numel() for mean in map(local, average))


def _read_ptx(tokenizer: Any, config: PPOConfig) -> tuple[list[Tokens], str]:
    if not config.ptx_data:
        return [], "off"
    dialogues, report = read_dialogues(list(config.ptx_data), tokenizer)
    longest = config.max_prompt_tokens + config.sampling.max_new_tokens
    rows, cut = dialogue_tokens(tokenizer, by_weight(dialogues, config.seed), longest, what="dialogues of ptx_data")
    return rows, f"{config.ptx_weight:g} × LM loss on {config.ptx_batch or config.minibatch} of {report}; {cut}"


def _print_plan(run: Session, job: Job, report: str, ptx_report: str) -> None:
    config, players = job.config, job.players
    steps = config.rollout_batch // config.minibatch * config.epochs
    _, policy_steps = schedule_position(config, job.steering, 0)
    passes = config.iterations * job.prompts_per_iteration / len(job.prompts)
    scorers = [t.reward.scalar for t in players.terms if isinstance(t.reward, RewardModel)]
    models = [players.policy, players.reference, *scorers, *([] if players.critic is None else [players.critic])]
    vocabulary = players.policy.model.config.vocab_size  # type: ignore[union-attr]
    longest = max(map(len, job.prompt_ids)) + config.sampling.max_new_tokens
    run.plan(
        f"ppo: {config.policy} → {run.run.final}",
        {
            "prompts": f"{report}; {passes:.2f} passes",
            "rewards": " + ".join(f"{t.weight:g} × {t.name}{_as_text(t.reward)}" for t in players.terms),
            "scores": _scores(config),
            "iterations": f"{config.iterations}, the first {config.critic.pretrain_iterations} for the critic alone",
            "rollout": f"{config.rollout_batch} responses = {job.prompts_per_iteration} prompts × "
            f"{config.samples_per_prompt}, at most {config.sampling.max_new_tokens} tokens, temperature "
            f"{config.sampling.temperature:g}, by the {config.sampling.engine} sampler{_in_turns(config)}",
            "steps": f"{steps} an iteration ({config.minibatch} responses each, {config.epochs} epochs), "
            f"{policy_steps} in all"
            + (f"; each rollout is learnt from in {config.buffer} iterations" if config.buffer > 1 else ""),
            "policy": schedule(config.optim, policy_steps),
            "critic": "none" if players.critic is None else schedule(config.critic.optim, policy_steps),
            "ptx": ptx_report,
            "trained": trained_of(players.policy),
            "compute": f"{players.compute.device}, {str(players.compute.dtype)[6:]}, vocabulary {vocabulary:,}, "
            f"sequences up to {longest} tokens; checkpoints of {_state_bytes(job.optimisers) / 2**30:.2f} GiB",
            "memory": f"{memory_of(models, _training_bytes(job.optimisers))}, activations and "
            + ("what vLLM takes" if config.sampling.engine == "vllm" else "the sampler's cache (see `ppomax plan`)"),
        },
    )


def _as_text(reward: RewardModel | RewardFunction) -> str:
    if isinstance(reward, RewardModel) and not reward.reads_ids:
        return f" (reads text, of at most {reward.max_length:,} tokens of its own)"
    return ""


def _in_turns(config: PPOConfig) -> str:
    """Said where responses wait for one another: a GPU decodes twice as many in nearly the same time."""
    rows = config.rollout_batch // world.size()
    return f", {config.sampling.max_rows} of {rows} side by side (max_rows)" if config.sampling.max_rows < rows else ""


def _scores(config: PPOConfig) -> str:
    score = config.score
    if score.scale:
        return "divided by the rolling std of the discounted return"
    how = "by source, " if score.by_source else ""
    found = f"normalised {how}by the history" if score.normalise else "as they come"
    return found if score.clip is None else f"{found}, cut to ±{score.clip:g}"
