"""What a PPO configuration must not ask for, found before anything is loaded."""

from __future__ import annotations

from ppomax.config import KLConfig, ObjectiveConfig, PPOConfig
from ppomax.engine import world
from ppomax.types import SetupError

# Value losses are compared in two windows of this many iterations.
PRETRAIN_WINDOW = 2
COLDEST_VLLM = 0.01


def expect_possible(config: PPOConfig) -> None:
    """Refuse sizes that do not divide, settings that contradict each other, and settings that would be ignored."""
    batch = config.rollout_batch
    for name, size in (("samples_per_prompt", config.samples_per_prompt), ("minibatch", config.minibatch)):
        if batch % size:
            fitting = max(d for d in range(1, min(size, batch) + 1) if batch % d == 0)
            raise SetupError(f"{name}: found {size}, expected a divisor of rollout_batch {batch}, such as {fitting}")
    _expect_consistent(config)
    if config.critic.pretrain_iterations >= config.iterations:
        raise SetupError(
            f"critic.pretrain_iterations: found {config.critic.pretrain_iterations}, expected less than iterations "
            f"({config.iterations}): the policy would never move"
        )
    if warped := config.sampling.warped:
        raise SetupError(
            f"sampling.{warped[0]}: found {getattr(config.sampling, warped[0])}, expected None: the KL to the "
            "reference and the ratio are undefined off the sampled support. Use it in `ppomax evaluate`"
        )
    if config.ptx_weight is not None and not config.ptx_data:
        raise SetupError("ptx_weight: found a weight but no ptx_data; give --ptx-data FILE or --ptx-weight None")
    if config.ptx_data and config.ptx_weight is None:
        raise SetupError("ptx_data: found data but no weight; give --ptx-weight, e.g. 0.1, or leave the data out")


def _expect_consistent(config: PPOConfig) -> None:
    """Refuse settings that contradict each other, or that would be ignored."""
    for wrong, name, found in (
        *_advantage_conflicts(config),
        *_reward_conflicts(config),
        *_objective_conflicts(config),
        *_process_conflicts(config),
        *_sampling_conflicts(config),
    ):
        if wrong:
            raise SetupError(f"{name}: found {found}")


Conflict = tuple[bool, str, str]


def _advantage_conflicts(config: PPOConfig) -> list[Conflict]:
    critic, by_critic = config.critic, config.advantage in ("gae", "k_step")
    tolerance, least = critic.pretrain_tolerance, 2 * PRETRAIN_WINDOW
    return [
        (critic.init is None and config.needs_critic, "critic.init",
         "None, but the advantage or the baseline needs a critic; expected 'reward', 'policy' or a directory"),
        (critic.init is None and critic.pretrain_iterations > 0, "critic.pretrain_iterations",
         f"{critic.pretrain_iterations} without a critic; expected 0"),
        (tolerance is not None and critic.pretrain_iterations < least, "critic.pretrain_tolerance",
         f"a tolerance, but pretrain_iterations {critic.pretrain_iterations}; expected {least} or more of them"),
        (by_critic and config.baseline != "critic", "baseline",
         f"{config.baseline} with advantage {config.advantage}, which has the critic's V; expected critic"),
        (config.k != 1 and config.advantage != "k_step", "k",
         f"{config.k} with advantage {config.advantage}; expected advantage k_step"),
        (config.samples_per_prompt == 1 and config.baseline in ("leave_one_out", "group_mean", "group_normalise"),
         "samples_per_prompt", f"1 with baseline {config.baseline}; expected at least 2"),
        (config.rollout_batch == 1 and config.baseline == "batch_mean", "rollout_batch",
         "1 with baseline batch_mean, which takes a response's own return from it; expected at least 2"),
        (config.whiten_advantages and config.minibatch == 1 and config.advantage == "whole_return",
         "whiten_advantages", "True with minibatch 1 and advantage whole_return, one number for all tokens, of which "
         "whitening leaves 0; expected minibatch 2 or more, or False"),
        (config.advantage == "rewards_to_go" and config.baseline == "group_normalise", "baseline",
         "group_normalise with advantage rewards_to_go; expected advantage whole_return"),
        (critic.init is not None and not config.needs_critic and config.score.truncated != "bootstrap", "critic.init",
         f"{critic.init}, but with advantage {config.advantage} and baseline {config.baseline} nothing reads a critic; "
         "expected None, and critic.pretrain_iterations 0"),
    ]  # fmt: skip


def _process_conflicts(config: PPOConfig) -> list[Conflict]:
    processes, prompts = world.size(), config.rollout_batch // config.samples_per_prompt
    return [
        (processes > prompts, "rollout_batch",
         f"{prompts} prompts an iteration for {processes} processes; expected at least one for each"),
        (processes > 1 and config.objective.kind == "trpo", "objective.kind",
         f"trpo with {processes} processes, whose step looks at whole parameters; expected one process"),
    ]  # fmt: skip


def _sampling_conflicts(config: PPOConfig) -> list[Conflict]:
    sampling, engine, temperature = config.sampling, config.sampling.engine, config.sampling.temperature
    return [
        (engine == "vllm" and bool(sampling.stop), "sampling.stop",
         f"{list(sampling.stop)} with sampling.engine vllm, which is given ids and no text; expected none"),
        (engine == "vllm" and sampling.max_cache_tokens is not None, "sampling.max_cache_tokens",
         f"{sampling.max_cache_tokens} with sampling.engine vllm, whose cache is made for max_rows; expected None"),
        (engine == "vllm" and temperature < COLDEST_VLLM, "sampling.temperature",
         f"{temperature:g} with sampling.engine vllm, which takes it for {COLDEST_VLLM:g}; expected that or more"),
    ]  # fmt: skip


def _reward_conflicts(config: PPOConfig) -> list[Conflict]:
    score, kl = config.score, config.kl
    return [
        (score.length_free > 0 and score.length_penalty is None, "score.length_free",
         f"{score.length_free} without score.length_penalty"),
        (kl.horizon != KLConfig().horizon and kl.target is None, "kl.horizon", f"{kl.horizon:g} without kl.target"),
        (config.critic.init is None and score.truncated == "bootstrap", "score.truncated",
         "bootstrap without a critic, whose value it takes; expected score"),
        (score.missing_eos_penalty is not None and score.truncated == "bootstrap", "score.missing_eos_penalty",
         f"{score.missing_eos_penalty} with score.truncated bootstrap, whose cut responses go on; "
         "expected None, or score.truncated score"),
        (score.scale and score.normalise, "score.scale",
         "True beside score.normalise; expected one of the two (--score.no-normalise)"),
        (score.scale and score.clip is not None, "score.clip",
         f"{score.clip} beside score.scale, which clips nothing; expected None"),
        (score.by_source and not score.normalise, "score.by_source", "True without score.normalise"),
        (kl.target is not None and kl.coefficient is None, "kl.target",
         "a target without a coefficient to start from; give kl.coefficient"),
        (kl.target is not None and config.rollout_batch >= 5 * kl.horizon, "kl.horizon",
         f"{kl.horizon:g} with rollout_batch {config.rollout_batch}; expected more than a fifth of it"),
        (kl.place == "loss" and kl.estimator == "k1", "kl.estimator",
         "k1 in the loss, where its gradient is 0 in expectation; expected k2, k3 or full"),
    ]  # fmt: skip


def _objective_conflicts(config: PPOConfig) -> list[Conflict]:
    objective, trpo = config.objective, config.objective.kind == "trpo"
    steps = config.rollout_batch // config.minibatch * config.epochs * config.buffer
    only = {"penalty_target": ("penalty",), "dual_clip": ("clip",)}
    ignored = [
        (getattr(objective, name) is not None and objective.kind not in kinds, f"objective.{name}",
         f"{getattr(objective, name)} with objective {objective.kind}; expected objective.kind {kinds[0]}")
        for name, kinds in only.items()
    ]  # fmt: skip
    of_trpo = [
        (trpo and getattr(objective, name) is not None, f"objective.{name}",
         f"{getattr(objective, name)} with objective trpo, whose step has no room for it; expected None")
        for name in ("entropy_weight", "importance_cap", "target_kl")
    ]  # fmt: skip
    default = ObjectiveConfig()
    others = [
        (objective.kind != kind and getattr(objective, name) != getattr(default, name), f"objective.{name}",
         f"{getattr(objective, name):g} with objective {objective.kind}, which has none; only {kind} reads it"
         + (" (objective.target_kl ends an iteration early)" if name == "max_kl" else ""))
        for name, kind in (("penalty", "penalty"), ("max_kl", "trpo"), ("cg_iterations", "trpo"), ("damping", "trpo"),
                           ("backtracks", "trpo"))
    ]  # fmt: skip
    return [
        *ignored,
        *of_trpo,
        *others,
        (objective.denominator == "reference" and objective.penalty_target is not None, "objective.penalty_target",
         f"{objective.penalty_target} with objective.denominator reference: the penalty is on the distance from the "
         "reference, the target for the distance from the policy that sampled; expected None"),
        (config.buffer > 1 and objective.importance_cap is None, "buffer",
         f"{config.buffer} without objective.importance_cap, whose weights make up for the age of what is learnt again;"
         " give one, e.g. 2"),
        (objective.kind == "policy_gradient" and (config.minibatch < config.rollout_batch or config.epochs > 1
                                                  or config.buffer > 1),
         "objective.kind", f"policy_gradient with {steps} steps an iteration, and no ratio to make up for the earlier "
         "ones; expected minibatch = rollout_batch, epochs 1 and buffer 1"),
        (trpo and config.compute.compiled, "compute.compiled",
         "True with objective trpo, which differentiates twice; expected False"),
        (trpo and config.kl.place == "loss", "kl.place", "loss with objective trpo; expected reward"),
        (trpo and config.ptx_weight is not None, "ptx_weight",
         f"{config.ptx_weight} with objective trpo, whose step has no room for it; expected None"),
        (objective.denominator == "reference" and objective.kind in ("trpo", "policy_gradient"),
         "objective.denominator", f"reference with objective {objective.kind}; expected old"),
        (objective.entropy_clip is not None and objective.entropy_weight is None, "objective.entropy_clip",
         f"{objective.entropy_clip} without objective.entropy_weight"),
    ]  # fmt: skip
