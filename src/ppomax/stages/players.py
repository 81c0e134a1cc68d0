"""The four players of a PPO run, loaded and checked against each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from ppomax.config import ModelConfig, PPOConfig
from ppomax.models.load import (
    Compute,
    context_length,
    load_causal_lm,
    load_scalar_lm,
    load_tokenizer,
    reads_alike,
    same_vocabulary,
)
from ppomax.models.players import Policy, Scalar, expect_equal_rows
from ppomax.models.shard import shard
from ppomax.models.share import share_frozen, share_trunk, twin
from ppomax.monitor.clock import Clock
from ppomax.rewards.callables import RewardFunction, expect_takes, function_name, limited, load_function
from ppomax.rewards.mixture import Term, is_function, parse_terms
from ppomax.rewards.model import RewardModel
from ppomax.stages.inputs import training_of
from ppomax.types import SetupError, TokenBatch


@dataclass(frozen=True)
class Players:
    """Policy and critic (where there is one) are trained, reference and reward terms are frozen.

    clock: what each of them takes is written down there.
    """

    policy: Policy
    reference: Policy
    critic: Scalar | None
    terms: list[Term]
    tokenizer: Any
    compute: Compute
    clock: Clock = field(default_factory=Clock)

    @property
    def shares_trunk(self) -> bool:
        """Whether the lower layers are frozen and common, so that their states are computed once."""
        return self.policy.train_layers is not None

    def trunk(self, batch: TokenBatch) -> TokenBatch:
        """The batch with the common states filled in, where there are common layers."""
        if not self.shares_trunk:
            return batch
        with self.clock("score/trunk", self.policy.trunk_work(batch)):
            return batch.with_trunk(self.policy.trunk(batch))


def load_players(
    config: PPOConfig, compute: Compute, tokenizer: Any, reward: RewardFunction | None, columns: Iterable[str] = ()
) -> Players:
    """Load everything; `tokenizer` is the policy's, `columns` are what reward functions are given beside the texts.

    What does not fit together is a SetupError before any sampling. Frozen weights that players have in common are in
    memory once, and are so before the next player is loaded.
    """
    layers, training = config.compute.train_layers, training_of(config.compute, config.seed)
    terms = [Term(function_name(reward), 1.0, reward)] if reward is not None else load_terms(
        config.reward, tokenizer, compute, config.compute, by_text=bool(config.sampling.stop)
    )  # fmt: skip
    for term in terms:
        if not isinstance(term.reward, RewardModel):
            expect_takes(term.reward, columns, what=f"reward {term.name}")
    terms = [
        t if isinstance(t.reward, RewardModel)
        else replace(t, reward=limited(t.reward, config.reward_timeout, name=t.name))
        for t in terms
    ]  # fmt: skip
    frozen = config.reference or config.policy
    if frozen != config.policy and not same_vocabulary(load_tokenizer(frozen, config.compute.chat_template), tokenizer):
        raise SetupError(f"reference: {frozen} has another vocabulary than the policy {config.policy}")
    reference = Policy(load_causal_lm(frozen, compute), train_layers=layers, trained=False)
    start = twin(reference.model, config.compute) if frozen == config.policy else None
    whole = config.kl.estimator == "full"  # the policy's pass reads the reference's weights
    reference = reference if whole else shard(reference, compute, config.compute)
    policy = Policy(start or load_causal_lm(config.policy, compute), trained=True, **training)
    policy = shard(policy, compute, config.compute)
    if whole:
        expect_equal_rows(
            policy, reference, what=f"kl.estimator full with the reference {frozen}", instead="take k1, k2 or k3"
        )
    models = {t.name: t.reward for t in terms if isinstance(t.reward, RewardModel)}
    if layers is not None:
        share_trunk(policy, reference, roles=("policy", "reference"))
        for name, model in models.items():
            if model.reads_ids:
                share_trunk(policy, model.scalar, roles=("policy", f"reward {name}"))
    if config.compute.lora_rank is not None:
        share_frozen(policy, reference)
    critic = _load_critic(config, config.critic.init, compute, tokenizer, terms) if config.critic.init else None
    if critic is not None and layers is not None:
        share_trunk(policy, critic, roles=("policy", "critic"))
    if critic is not None and config.compute.lora_rank is not None:
        for model in models.values():
            share_frozen(critic, model.scalar)
    return Players(policy, reference, critic, terms, tokenizer, compute, Clock(compute.device))


def load_terms(
    specs: tuple[str, ...], tokenizer: Any, compute: Compute, config: ModelConfig, *, by_text: bool = False
) -> list[Term]:
    """The reward terms of a weighted sum; `tokenizer` is the policy's."""
    terms = []
    for weight, spec in parse_terms(specs):
        if is_function(spec):
            terms.append(Term(_unused([spec], terms), weight, load_function(spec)))
        else:
            model = load_reward_model(spec, tokenizer, compute, config, by_text=by_text)
            terms.append(Term(_unused([_short(spec), spec], terms), weight, model))
    return terms


def load_reward_model(
    spec: str, tokenizer: Any, compute: Compute, config: ModelConfig, *, by_text: bool = False
) -> RewardModel:
    """A frozen reward model. It reads the policy's ids if they are what its own tokenizer and template would give it,
    else text through its own template.

    by_text: text in any case; what a stop string ends has no eos, which its template puts there.
    """
    own = load_tokenizer(spec, otherwise=config.chat_template)
    model = load_scalar_lm(spec, compute)
    reads_ids = reads_alike(own, tokenizer) and not by_text
    length = context_length(model) or 4096
    scalar = Scalar(model, train_layers=config.train_layers if reads_ids else None, trained=False)
    scalar = shard(scalar, compute, config)
    return RewardModel(spec, scalar, own, reads_ids, config.tokens_per_microbatch, int(length))


def _load_critic(config: PPOConfig, init: str, compute: Compute, tokenizer: Any, terms: list[Term]) -> Scalar:
    name: str
    model, seed = None, None
    if init == "reward":
        models = [term.reward for term in terms if isinstance(term.reward, RewardModel)]
        if not models:
            raise SetupError(
                "critic.init: found 'reward', but no reward is a model; expected 'policy' or a directory, "
                "e.g. --critic.init policy"
            )
        if not same_vocabulary(models[0].tokenizer, tokenizer):
            raise SetupError(
                f"critic.init: the reward model {models[0].name} has another vocabulary than the policy, so a critic "
                "cannot start from it; use --critic.init policy"
            )
        name, model = models[0].name, twin(models[0].scalar.model, config.compute)
    elif init == "policy":
        name, seed = config.policy, config.seed
    else:
        name = init
        if not same_vocabulary(load_tokenizer(name, config.compute.chat_template), tokenizer):
            raise SetupError(f"critic.init: {name} has another vocabulary than the policy; use --critic.init policy")
    model = model or load_scalar_lm(name, compute, fresh_head_seed=seed)
    return shard(Scalar(model, trained=True, **training_of(config.compute, config.seed)), compute, config.compute)


def _short(spec: str) -> str:
    path = Path(spec)
    return path.parent.name if path.name == "final" and path.parent.name else path.name


def _unused(names: list[str], terms: list[Term]) -> str:
    """The first of the names that no term has; else the last one with a number."""
    taken = {term.name for term in terms}
    return next(name for name in chain(names, (f"{names[-1]} {n}" for n in count(2))) if name not in taken)
