"""What the settings of rewards, advantages and baselines make of one small rollout, against loops over its rows."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from rl import oracle

from ppomax.config import CriticConfig, KLConfig, PPOConfig, ScoreConfig
from ppomax.stages.estimate import History, estimate, seen
from ppomax.types import Message, Prompt, Rollout, ScoredRollouts

LENGTHS = (3, 5, 1, 4)
OF_PROMPT = (0, 0, 1, 1)
SCORES = (0.7, -1.1, 2.3, 0.4)
BOOTSTRAP = (0.0, 0.6, 0.0, 0.0)  # the second response was cut
GAMMA = 0.9
Rows = list[list[float]]


def scored() -> ScoredRollouts:
    """Two prompts of two responses, of different lengths; one of them cut."""
    draw = torch.Generator().manual_seed(3)
    B, R = len(LENGTHS), max(LENGTHS)
    old, reference, values = (torch.randn(B, R, generator=draw) for _ in range(3))
    length_B = torch.tensor(LENGTHS)
    inside = torch.arange(R)[None, :] < length_B[:, None]
    texts = ("one", "two")
    prompts = tuple(
        Prompt((Message(role="user", content=texts[p]),), key=texts[p], source="odd" if p else "even")
        for p in OF_PROMPT
    )
    truncated = torch.tensor([b != 0 for b in BOOTSTRAP])
    rollout = Rollout(
        prompts, tuple((p + 1,) for p in OF_PROMPT), torch.ones(B, R, dtype=torch.long), length_B,
        torch.where(inside, old, 0.0), truncated, torch.tensor([0, 1, 0, 1]),
    )  # fmt: skip
    score_B = torch.tensor(SCORES)
    return ScoredRollouts(
        rollout, *(torch.where(inside, x, 0.0) for x in (old, reference, values)), score_B, {"reward": score_B},
        torch.tensor(BOOTSTRAP),
    )  # fmt: skip


def config_of(**changes: Any) -> PPOConfig:
    given = {"score": ScoreConfig(normalise=False, clip=None), "kl": KLConfig(coefficient=0.3), "gamma": GAMMA}
    return PPOConfig(**{**given, **changes})


def unpadded(x_BR: torch.Tensor) -> Rows:
    return [row[:n].tolist() for row, n in zip(x_BR, LENGTHS, strict=True)]


def expected_rewards() -> Rows:
    found = scored()
    return [
        oracle.token_rewards(s, old, reference, 0.3)
        for s, old, reference in zip(
            SCORES, unpadded(found.old_logprobs_BR), unpadded(found.reference_logprobs_BR), strict=True
        )
    ]


def to_go() -> Rows:
    return [oracle.monte_carlo(row, GAMMA, after) for row, after in zip(expected_rewards(), BOOTSTRAP, strict=True)]


def whole() -> list[float]:
    return [row[0] for row in to_go()]


def same_everywhere(numbers: list[float]) -> Rows:
    return [[number] * n for number, n in zip(numbers, LENGTHS, strict=True)]


def of_group(b: int) -> list[float]:
    return [whole()[i] for i, prompt in enumerate(OF_PROMPT) if prompt == OF_PROMPT[b]]


def of_others(b: int) -> list[float]:
    return [whole()[i] for i, prompt in enumerate(OF_PROMPT) if prompt == OF_PROMPT[b] and i != b]


def minus(rows: Rows, baseline: Rows) -> Rows:
    return [[x - y for x, y in zip(*pair, strict=True)] for pair in zip(rows, baseline, strict=True)]


def values() -> Rows:
    return unpadded(scored().values_BR)


def k_step(k: int) -> Rows:
    rewards, found = expected_rewards(), []
    for b, n in enumerate(LENGTHS):
        returns = [
            oracle.k_step_return(rewards[b], values()[b], GAMMA, t, min(k, n - t), BOOTSTRAP[b]) for t in range(n)
        ]
        found.append([x - v for x, v in zip(returns, values()[b], strict=True)])
    return found


B = range(len(LENGTHS))
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "gae": (
        {"gae_lambda": 0.7},
        lambda: [oracle.gae(r, v, GAMMA, 0.7, b) for r, v, b in zip(expected_rewards(), values(), BOOTSTRAP, strict=True)],
    ),
    "one step": ({"advantage": "k_step"}, lambda: k_step(1)),
    "three steps": ({"advantage": "k_step", "k": 3}, lambda: k_step(3)),
    "to go, critic": ({"advantage": "rewards_to_go"}, lambda: minus(to_go(), values())),
    "to go, batch": (
        {"advantage": "rewards_to_go", "baseline": "batch_mean"},
        lambda: minus(to_go(), same_everywhere([statistics.fmean(whole())] * 4)),
    ),
    "to go, number": (
        {"advantage": "rewards_to_go", "baseline": 0.25},
        lambda: minus(to_go(), same_everywhere([0.25] * 4)),
    ),
    "to go, nothing": ({"advantage": "rewards_to_go", "baseline": None}, to_go),
    "whole, critic": (
        {"advantage": "whole_return"},
        lambda: same_everywhere([w - v[0] for w, v in zip(whole(), values(), strict=True)]),
    ),
    "whole, batch": (
        {"advantage": "whole_return", "baseline": "batch_mean"},
        lambda: same_everywhere([w - statistics.fmean(whole()) for w in whole()]),
    ),
    "whole, leave one out": (
        {"advantage": "whole_return", "baseline": "leave_one_out", "samples_per_prompt": 2},
        lambda: same_everywhere([whole()[b] - statistics.fmean(of_others(b)) for b in B]),
    ),
    "whole, group": (
        {"advantage": "whole_return", "baseline": "group_mean", "samples_per_prompt": 2},
        lambda: same_everywhere([whole()[b] - statistics.fmean(of_group(b)) for b in B]),
    ),
    "whole, group in deviations": (
        {"advantage": "whole_return", "baseline": "group_normalise", "samples_per_prompt": 2},
        lambda: same_everywhere(
            [(whole()[b] - statistics.fmean(of_group(b))) / statistics.pstdev(of_group(b)) for b in B]
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_advantages_are_what_their_settings_say(name: str) -> None:
    changes, expected = CASES[name]
    found, rewards_BR = estimate(scored(), History(), config_of(**changes))
    for row, wanted in zip(unpadded(rewards_BR), expected_rewards(), strict=True):
        assert row == pytest.approx(wanted, abs=1e-5)
    for row, wanted in zip(unpadded(found.advantages_BR), expected(), strict=True):
        assert row == pytest.approx(wanted, abs=1e-4)
    assert not found.advantages_BR[~found.rollout.mask_BR].any()


@pytest.mark.parametrize(("estimator", "of"), [("k1", oracle.k1), ("k2", oracle.k2), ("k3", oracle.k3)])
def test_the_kl_in_the_reward_is_by_its_estimator(estimator: str, of: Any) -> None:
    given = scored()
    _, rewards_BR = estimate(given, History(), config_of(kl=KLConfig(coefficient=0.3, estimator=estimator)))
    old, reference = unpadded(given.old_logprobs_BR), unpadded(given.reference_logprobs_BR)
    for b, row in enumerate(unpadded(rewards_BR)):
        wanted = [-0.3 * of(o, r) for o, r in zip(old[b], reference[b], strict=True)]
        wanted[-1] += SCORES[b]
        assert row == pytest.approx(wanted, abs=1e-5)


def test_the_exact_kl_in_the_reward_is_the_one_that_was_asked_for() -> None:
    given = scored()
    exact_BR = torch.where(given.rollout.mask_BR, torch.rand(given.values_BR.shape), 0.0)
    given = replace(given, full_kl_BR=exact_BR)
    _, rewards_BR = estimate(given, History(), config_of(kl=KLConfig(coefficient=0.3, estimator="full")))
    for b, row in enumerate(unpadded(rewards_BR)):
        wanted = [-0.3 * kl for kl in unpadded(exact_BR)[b]]
        wanted[-1] += SCORES[b]
        assert row == pytest.approx(wanted, abs=1e-5)


def test_returns_of_the_critic_are_monte_carlo_where_that_is_its_target() -> None:
    found, _ = estimate(scored(), History(), config_of(critic=CriticConfig(target="monte_carlo")))
    for row, wanted in zip(unpadded(found.returns_BR), to_go(), strict=True):
        assert row == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("advantage", ["gae", "k_step", "rewards_to_go"])
def test_returns_of_the_critic_are_lambda_returns_whatever_the_policy_gets(advantage: str) -> None:
    found, _ = estimate(scored(), History(), config_of(advantage=advantage, gae_lambda=0.7))
    for b, row in enumerate(unpadded(found.returns_BR)):
        wanted = oracle.lambda_returns(expected_rewards()[b], values()[b], GAMMA, 0.7, BOOTSTRAP[b])
        assert row == pytest.approx(wanted, abs=1e-5)


def test_trap_16_sources_and_rolling_returns_are_measured_over_all_batches() -> None:
    """The second batch is shifted by 10: its own moments and those of all history are far apart."""
    config = config_of(score=ScoreConfig(by_source=True, clip=None), kl=KLConfig(coefficient=None))
    first = scored()
    later = replace(first, score_B=first.score_B + 10)
    history = seen(later, seen(first, History(), config), config)
    _, rewards_BR = estimate(later, history, config)
    for b, row in enumerate(unpadded(rewards_BR)):
        own = [SCORES[i] + shift for i, p in enumerate(OF_PROMPT) if p == OF_PROMPT[b] for shift in (0.0, 10.0)]
        assert row[-1] == pytest.approx((SCORES[b] + 10 - statistics.fmean(own)) / statistics.pstdev(own), abs=1e-4)


def test_trap_16_reward_scaling_remembers_earlier_batches() -> None:
    config = config_of(
        score=ScoreConfig(normalise=False, clip=None, scale=True), kl=KLConfig(coefficient=None), gamma=1.0
    )  # fmt: skip
    first = scored()
    later = replace(first, score_B=first.score_B + 10)
    history = seen(later, seen(first, History(), config), config)
    _, rewards_BR = estimate(later, history, config)
    # With γ = 1 the rolling return is 0 up to the last token, where the score stands.
    rolling = [
        x for shift in (0, 10) for n, s in zip(LENGTHS, SCORES, strict=True) for x in [*[0.0] * (n - 1), s + shift]
    ]
    spread = math.sqrt(statistics.pvariance(rolling))
    for b, row in enumerate(unpadded(rewards_BR)):
        assert row[-1] == pytest.approx((SCORES[b] + 10) / spread, rel=1e-4)
