"""PPO against a known answer: responses of one token, and of two, for which the best policy has a closed form.

With η times the KL to the reference subtracted from the reward, the optimum at a prompt is, to the last digit,

    pi*(a) = pi_ref(a) · exp(r(a) / η) / Z,   V* = η · log Z

and there r(a) − η·log(pi*(a) / pi_ref(a)) = V* for every a: the advantages vanish, so that a run can come to rest, and
only there. A score in a wrong place or of another prompt, a KL of a wrong weight, sign or direction, a wrong
temperature, discount or normalisation come to rest somewhere else. What only shapes the way there (the clip, the
penalty, the baseline, λ) does not move the optimum: these tests show that it is reached with them, not that they are
right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models.architectures import enliven
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from ppomax.config import CriticConfig, KLConfig, OptimConfig, PPOConfig, SamplingConfig, SaveConfig, ScoreConfig
from ppomax.config.ppo import ObjectiveConfig
from ppomax.config.recipes import PPO_RECIPES
from ppomax.models.load import load_tokenizer
from ppomax.rl.shaping import Moments
from ppomax.rollout.collect import response_texts
from ppomax.stages.estimate import History, estimate
from ppomax.stages.ppo import ppo
from ppomax.stages.ppo_setup import Job
from ppomax.stages.scoring import plan_minibatches, score
from ppomax.stages.update import update
from stages.toy import ppo_config, prepared, recipe_settings, write_rows

# Other last tokens, so that the prompts' states differ; other lengths, so that there is padding.
PROMPTS = ("a", "one Z", "and then 5")
CONTENT = "{% for m in messages %}{{ m['content'] + (eos_token if m['role'] == 'assistant' else '') }}{% endfor %}"
VOCABULARY, EOS = 259, 2
# The tokens that a reference says; it gives all others together about one in a thousand.
SAID = range(40, 56)
ETA = 0.3
# Nats. The runs start at 0.3 to 1, and the optimum of twice the η is about 0.1 from theirs.
BOUND = 0.02


def wage_of(turn: int, token: int) -> float:
    """One of eleven grades from 0 to 1: another order of the tokens for every prompt."""
    return (7 * token + 5 * turn) % 11 / 10


def wage(prompts: Sequence[Any], responses: Sequence[str], **columns: Any) -> list[float]:
    """A reward: the wages of a response's tokens; the second is paid as if on the next prompt."""
    rows = zip(columns["turn"], columns["response_ids"], strict=True)
    return [sum(wage_of(turn + t, token) for t, token in enumerate(ids)) for turn, ids in rows]


WAGES = torch.tensor([[wage_of(turn, a) for a in range(VOCABULARY)] for turn in range(4)], dtype=torch.float64)


@dataclass(frozen=True)
class Bandit:
    """A reference, another policy to start from, and the prompts."""

    reference: str
    elsewhere: str
    prompts: str


@pytest.fixture(scope="module")
def bandit(model_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Bandit:
    folder = tmp_path_factory.mktemp("bandit")
    rows = [{"prompt": text, "turn": turn} for turn, text in enumerate(PROMPTS)]
    states = [prompt_ids(turn) for turn in range(len(PROMPTS))]
    return Bandit(
        speaker(folder / "reference", states, SAID, seed=1), speaker(folder / "elsewhere", states, SAID, seed=2),
        write_rows(folder / "prompts.jsonl", rows),
    )  # fmt: skip


def prompt_ids(turn: int) -> list[int]:
    return load_tokenizer("tiny")(PROMPTS[turn])["input_ids"]


@torch.no_grad()
def speaker(folder: Path, states: list[list[int]], said: Sequence[int], seed: int) -> str:
    """The directory of a one-layer model which after each of `states` says one of `said`, some more often than others.

    Logits after n states are any that one likes where n is at most the model's width: the least unembedding does it.
    """
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=EOS, pad_token_id=EOS,
            tie_word_embeddings=False,
        )
    )  # fmt: skip
    enliven(model)
    logits = torch.full((len(states), VOCABULARY), -10.0)
    logits[:, list(said)] = torch.randn(len(states), len(said), generator=torch.Generator().manual_seed(seed))
    hidden = torch.stack([model.model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in states])
    model.lm_head.weight.copy_((torch.linalg.pinv(hidden) @ logits).T)
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = CONTENT  # a prompt is its text and nothing else
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def next_token(model: Any, states: Sequence[Sequence[int]], temperature: float = 1.0) -> Tensor:
    """Exact log-probs [states, V] of what a model says next: `transformers` and a softmax, nothing of ours."""
    logits = [model(torch.tensor([list(ids)])).logits[0, -1] for ids in states]
    return (torch.stack(logits).double() / temperature).log_softmax(-1)


def causal(folder: Path | str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def optimum(reference: Tensor, score: Tensor, eta: float) -> Tensor:
    """Log-probs of pi*, [states, V]."""
    return (reference + score / eta).log_softmax(-1)


def divergence(policy: Tensor, other: Tensor) -> float:
    """The exact KL(policy ‖ other) over the vocabulary, nats, mean over the states."""
    return float((policy.exp() * (policy - other)).sum(-1).mean())


def arrives(start: Tensor, end: Tensor, target: Tensor, *, not_at: Tensor) -> None:
    """Whether a run that came from `start` is at `target`, within the bound, and not at an optimum that it isn't."""
    before, after = divergence(start, target), divergence(end, target)
    print(f"KL to the optimum: {before:.4f} at the start, {after:.5f} at the end")
    assert before > 10 * BOUND
    assert after < BOUND
    assert divergence(end, not_at) > 2 * BOUND


def bandit_config(run_dir: Path, bandit: Bandit, **changes: Any) -> PPOConfig:
    """One step on 96 responses of one token an iteration; the raw score, η in the reward, no ptx and no entropy."""
    settings: dict[str, Any] = {
        "reference": bandit.reference, "iterations": 50, "rollout_batch": 96, "minibatch": 96, "samples_per_prompt": 32,
        "sampling": SamplingConfig(max_new_tokens=1, max_rows=1024), "save": SaveConfig(every=1000),
        "kl": KLConfig(coefficient=ETA), "score": ScoreConfig(normalise=False, clip=None), "optim": rate(1e-2),
    }  # fmt: skip
    policy = changes.pop("policy", bandit.reference)
    return ppo_config(run_dir, policy, bandit.prompts, **{**settings, **changes})


def rate(lr: float) -> OptimConfig:
    """A rate that falls to 0: what noise is left goes with it."""
    return OptimConfig(lr=lr, warmup=0.1, schedule="cosine", floor=0.0)


CRITIC = CriticConfig(init="policy", pretrain_iterations=5, optim=rate(1e-2))
# Two epochs of two minibatches: the ratio leaves 1, so that clip and penalty have something to do.
CLIPPED: dict[str, Any] = {"critic": CRITIC, "iterations": 35, "minibatch": 48, "epochs": 2, "optim": rate(7e-3)}
ALONE = CriticConfig(init=None, pretrain_iterations=0)
GRADIENT = ObjectiveConfig(kind="policy_gradient")
REINFORCE: dict[str, Any] = {
    "critic": ALONE, "objective": GRADIENT, "advantage": "rewards_to_go", "baseline": "batch_mean",
}  # fmt: skip
RLOO: dict[str, Any] = {
    "critic": ALONE, "objective": GRADIENT, "advantage": "whole_return", "baseline": "leave_one_out",
}  # fmt: skip
TRPO: dict[str, Any] = {
    "critic": CRITIC, "objective": ObjectiveConfig(kind="trpo", max_kl=0.004, cg_iterations=5), "iterations": 40,
    "rollout_batch": 48, "minibatch": 48, "samples_per_prompt": 16,
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "clip": CLIPPED,
    "penalty": CLIPPED | {"objective": ObjectiveConfig(kind="penalty", penalty_target=0.01)},
    "trpo": TRPO,
    "reinforce": REINFORCE,
    "rloo": RLOO,
}


@pytest.mark.parametrize("arm", ARMS)
def test_a_run_ends_at_the_closed_form(arm: str, bandit: Bandit, tmp_path: Path) -> None:
    config = bandit_config(tmp_path / "run", bandit, **ARMS[arm])
    ppo(config, reward=wage)
    states = [prompt_ids(turn) for turn in range(3)]
    reference, policy = (next_token(causal(folder), states) for folder in (bandit.reference, config.run_dir / "final"))
    arrives(reference, policy, optimum(reference, WAGES[:3], ETA), not_at=optimum(reference, WAGES[:3], 2 * ETA))
    if config.critic.init is not None:
        critic = AutoModelForSequenceClassification.from_pretrained(config.run_dir / "critic")
        assert values_at(critic, states) == pytest.approx(soft_values(reference, WAGES[:3], ETA), abs=0.05)


def test_the_answer_is_that_of_the_temperature_which_is_sampled_at(bandit: Bandit, tmp_path: Path) -> None:
    sampling = SamplingConfig(max_new_tokens=1, max_rows=1024, temperature=0.7)
    job = trained(bandit_config(tmp_path / "run", bandit, **RLOO, sampling=sampling))
    reference, policy = reference_and_policy(job, temperature=0.7)
    elsewhere, _ = reference_and_policy(job)
    arrives(reference, policy, optimum(reference, WAGES[:3], ETA), not_at=optimum(elsewhere, WAGES[:3], ETA))


def test_the_reference_counts_and_not_the_start(bandit: Bandit, tmp_path: Path) -> None:
    config = bandit_config(tmp_path / "run", bandit, policy=bandit.elsewhere, **RLOO, iterations=65)
    reference, policy = reference_and_policy(trained(config))
    start = next_token(causal(bandit.elsewhere), [prompt_ids(turn) for turn in range(3)])
    arrives(start, policy, optimum(reference, WAGES[:3], ETA), not_at=optimum(start, WAGES[:3], ETA))


def test_ppo_max_ends_at_the_closed_form_of_the_normalised_and_clipped_score(bandit: Bandit, tmp_path: Path) -> None:
    """A history that stands still makes the score that RL sees a known one; its unit is the history's std."""
    history = History(scores=Moments(count=1000.0, mean=0.5, m2=1000 * 0.25**2))
    config = bandit_config(
        tmp_path / "run", bandit, **CLIPPED, score=ScoreConfig(clip=1.0), kl=KLConfig(coefficient=0.8)
    )
    reference, policy = reference_and_policy(job := trained(config, history))
    normal = (WAGES[:3] - 0.5) / 0.25
    arrives(reference, policy, optimum(reference, normal.clamp(-1, 1), 0.8), not_at=optimum(reference, normal, 0.8))
    assert job.players.critic is not None
    values = values_at(job.players.critic.model, [prompt_ids(turn) for turn in range(3)])
    assert values == pytest.approx(soft_values(reference, normal.clamp(-1, 1), 0.8), abs=0.15)


UNUSED = History()


def trained(config: PPOConfig, history: History = UNUSED) -> Job:
    """A run without its log and files. The history of scores stays what it is; a raw score does not look at it."""
    job = prepared(config, wage)
    for iteration in range(config.iterations):
        one_iteration(job, history, iteration)
    return job


def reference_and_policy(job: Job, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """What they say after the prompts."""
    states = [prompt_ids(turn) for turn in range(3)]
    models = job.players.reference.model, job.players.policy.model
    return next_token(models[0], states, temperature), next_token(models[1], states, temperature)


def one_iteration(job: Job, history: History, iteration: int) -> None:
    """The stage's own steps, but for the history, which stays what it is."""
    config, players = job.config, job.players
    rollout = job.roll_out(iteration)
    plan = plan_minibatches(
        rollout, players, minibatch=config.minibatch, budget=config.compute.tokens_per_microbatch, seed=config.seed,
        iteration=iteration,
    )  # fmt: skip
    texts = response_texts(players.tokenizer, rollout)
    scored, _ = score(players, rollout, plan, texts, temperature=config.sampling.temperature, bootstrap=False)
    experience, _ = estimate(scored, history, config)
    update(players, job.optimisers, experience, plan, config, iteration=iteration, ptx=[], steering=job.steering)


@torch.no_grad()
def values_at(critic: Any, states: Sequence[Sequence[int]]) -> list[float]:
    return [float(critic(torch.tensor([list(ids)])).logits[0, 0]) for ids in states]


def soft_values(reference: Tensor, score: Tensor, eta: float) -> list[float]:
    """V* = η · log Σ pi_ref · exp(r / η), for each state."""
    return (eta * (reference + score / eta).logsumexp(-1)).tolist()


# A KL in the loss is as it is at every policy, so the score's noise stays at the optimum: twice the responses.
IN_LOSS: dict[str, Any] = RLOO | {"rollout_batch": 192, "minibatch": 192, "samples_per_prompt": 64}


@pytest.mark.parametrize("estimator", ["k2", "full"])
def test_a_kl_in_the_loss_has_the_same_optimum(estimator: Any, bandit: Bandit, tmp_path: Path) -> None:
    kl = KLConfig(coefficient=ETA, place="loss", estimator=estimator)
    reference, policy = reference_and_policy(trained(bandit_config(tmp_path / "run", bandit, **IN_LOSS, kl=kl)))
    arrives(reference, policy, optimum(reference, WAGES[:3], ETA), not_at=optimum(reference, WAGES[:3], 2 * ETA))


def test_k3_in_the_loss_has_the_optimum_of_the_other_direction(bandit: Bandit, tmp_path: Path) -> None:
    """The best of E[r] − η·KL(pi_ref ‖ pi) is pi(a) = η·pi_ref(a) / (c − r(a)), with the c > max r that makes it 1."""
    kl = KLConfig(coefficient=ETA, place="loss", estimator="k3")
    reference, policy = reference_and_policy(trained(bandit_config(tmp_path / "run", bandit, **IN_LOSS, kl=kl)))
    rows = [other_direction(p, r, ETA) for p, r in zip(reference, WAGES[:3], strict=True)]
    arrives(reference, policy, torch.stack(rows), not_at=optimum(reference, WAGES[:3], ETA))


def test_grpo_without_the_std_has_a_closed_form(bandit: Bandit, tmp_path: Path) -> None:
    """A mean over G responses with the own one in it shrinks the score's gradient by 1 − 1/G, and a KL in the loss not.

    A group is all that a rollout has on a prompt: 64 responses.
    """
    kl = KLConfig(coefficient=ETA, place="loss", estimator="full")
    changes = IN_LOSS | {"baseline": "group_mean", "objective": ObjectiveConfig(), "minibatch": 96, "kl": kl}
    reference, policy = reference_and_policy(trained(bandit_config(tmp_path / "run", bandit, **changes)))
    eta = ETA * 64 / 63
    arrives(reference, policy, optimum(reference, WAGES[:3], eta), not_at=optimum(reference, WAGES[:3], 2 * eta))


@pytest.mark.parametrize("name", PPO_RECIPES)
def test_every_recipe_improves_on_the_bandit(name: str, bandit: Bandit, tmp_path: Path) -> None:
    """The exact expected wage, over all tokens, rises by a tenth of its range and more."""
    settings = recipe_settings(name, rate(1e-2)) | {"iterations": 14, "samples_per_prompt": 32}
    config = bandit_config(tmp_path / "run", bandit, **settings)
    ppo(config, reward=wage)
    states = [prompt_ids(turn) for turn in range(3)]
    end = config.run_dir / ("last" if config.ema else "final")  # an average of so few steps still stands at the start
    before, after = (next_token(causal(folder), states) for folder in (bandit.reference, end))
    assert expected_wage(after) > expected_wage(before) + 0.1


def expected_wage(policy: Tensor) -> float:
    return float((policy.exp() * WAGES[:3]).sum(-1).mean())


def other_direction(reference: Tensor, score: Tensor, eta: float) -> Tensor:
    """Log-probs [V] of the best policy under eta·KL(pi_ref ‖ pi), by bisection for c."""
    low, high = float(score.max()), float(score.max()) + eta  # at c = max r + η the sum is at most 1
    for _ in range(100):
        c = (low + high) / 2
        low, high = (c, high) if float((eta * reference.exp() / (c - score)).sum()) > 1 else (low, c)
    return (eta * reference.exp() / (high - score)).log()


def test_gae_ends_at_the_closed_form_of_two_tokens(tmp_path: Path) -> None:
    """The first token is worth its wage and V* of the state that it leads to; an eos leads nowhere."""
    first, said, eta = [prompt_ids(0)], SAID[:6], 0.4
    folder = speaker(tmp_path / "reference", first + [[*first[0], a] for a in said], said, seed=3)
    asked = write_rows(tmp_path / "prompts.jsonl", [{"prompt": PROMPTS[0], "turn": 0}])
    changes = CLIPPED | {"rollout_batch": 192, "samples_per_prompt": 192, "minibatch": 96, "iterations": 30}
    changes |= {"kl": KLConfig(coefficient=eta), "sampling": SamplingConfig(max_new_tokens=2, max_rows=1024)}
    config = bandit_config(tmp_path / "run", Bandit(folder, folder, asked), **changes)
    ppo(config, reward=wage)
    reference, policy = two_tokens(causal(folder), first), two_tokens(causal(config.run_dir / "final"), first)
    before, after = (pair_divergence(pair, best_pair(reference, eta)) for pair in (reference, policy))
    print(f"KL to the optimum: {before:.4f} at the start, {after:.5f} at the end")
    assert before > 10 * BOUND
    assert after < BOUND
    assert pair_divergence(policy, best_pair(reference, 2 * eta)) > 2 * BOUND


@dataclass(frozen=True)
class TwoTokens:
    """Exact log-probs of the first token [P, V] and of the second after each first [P, V, V]."""

    first: Tensor
    second: Tensor


@torch.no_grad()
def two_tokens(model: Any, firsts: Sequence[Sequence[int]]) -> TwoTokens:
    every = [torch.tensor([[*ids, a] for a in range(VOCABULARY)]) for ids in firsts]
    seconds = torch.stack([model(ids).logits[:, -1] for ids in every])
    return TwoTokens(next_token(model, firsts), seconds.double().log_softmax(-1))


def best_pair(reference: TwoTokens, eta: float) -> TwoTokens:
    """The optimum by backward induction: the second token in each state, then the first."""
    second = optimum(reference.second, WAGES[1:2, None, :], eta)
    value = eta * (reference.second + WAGES[1:2, None, :] / eta).logsumexp(-1)
    value[:, EOS] = 0.0
    return TwoTokens(optimum(reference.first, WAGES[:1] + value, eta), second)


def pair_divergence(policy: TwoTokens, other: TwoTokens) -> float:
    """The exact KL of the distributions over whole responses, nats."""
    after = (policy.second.exp() * (policy.second - other.second)).sum(-1)
    after[:, EOS] = 0.0
    return divergence(policy.first, other.first) + float((policy.first.exp() * after).sum(-1).mean())
