"""From sampled ids to advantages: what every player reads, where a score lands, and in which order it is shaped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ppomax.config import CriticConfig, KLConfig, OptimConfig, PPOConfig, SamplingConfig, ScoreConfig
from ppomax.data.chat import render_prompt, render_response
from ppomax.rewards.model import RewardModel
from ppomax.stages.estimate import estimate, seen
from ppomax.stages.ppo_fit import expect_known
from ppomax.stages.reward import reward
from ppomax.stages.update import update
from ppomax.types import SetupError
from stages import toy
from stages.conftest import Toys, Trained
from stages.toy import FirstIteration, first_iteration, length_reward, ppo_config, prepared


def rows_of(it: FirstIteration) -> list[tuple[tuple[int, ...], list[int]]]:
    rollout = it.scored.rollout
    return list(zip(rollout.prompt_ids, rollout.responses(), strict=True))


def plain_logprobs(model: Any, prompt: tuple[int, ...], response: list[int], temperature: float) -> list[float]:
    """Log-probs of the response's tokens, one unpadded row, by plain transformers."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0] / temperature
    chosen = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return chosen.gather(1, torch.tensor(response)[:, None])[:, 0].tolist()


def test_equal_responses_have_equal_scores_whatever_rounding_makes_of_them(
    trained: Trained, toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = RewardModel.score_ids
    monkeypatch.setattr(RewardModel, "score_ids", lambda self, batch: read(self, batch) + 1e-6 * torch.rand(1))
    config = ppo_config(
        tmp_path / "run", trained.sft, toys.prompts, reward=(trained.reward,), samples_per_prompt=8,
        sampling=SamplingConfig(max_new_tokens=1, temperature=0.1),
        compute=toy.FLOAT32.model_copy(update={"tokens_per_microbatch": 64}),
    )  # fmt: skip
    scored = first_iteration(prepared(config)).scored
    of: dict[Any, set[float]] = {}
    for pair, score in zip(scored.rollout.pairs(), scored.score_B.tolist(), strict=True):
        of.setdefault(pair, set()).add(score)
    assert len(of) < len(scored.rollout) and all(len(scores) == 1 for scores in of.values())


def test_trap_08_and_11_every_reading_is_that_of_plain_transformers(
    lively: str, lively_reward: str, toys: Toys, tmp_path: Path
) -> None:
    config = ppo_config(
        tmp_path / "run", lively, toys.prompts, reward=(lively_reward,), critic=CriticConfig(pretrain_iterations=1),
        sampling=SamplingConfig(max_new_tokens=10, temperature=0.7), score=ScoreConfig(normalise=False, clip=None),
    )  # fmt: skip
    it = first_iteration(prepared(config))
    scored, rollout = it.scored, it.scored.rollout
    policy = AutoModelForCausalLM.from_pretrained(lively)
    scalar = AutoModelForSequenceClassification.from_pretrained(lively_reward)
    assert len(set(map(len, rollout.prompt_ids))) > 3
    for b, (prompt, response) in enumerate(rows_of(it)):
        n = len(response)
        expected = plain_logprobs(policy, prompt, response, 0.7)
        for name in ("old_logprobs_BR", "reference_logprobs_BR"):
            assert getattr(scored, name)[b, :n].tolist() == pytest.approx(expected, abs=1e-4)
        assert rollout.behaviour_logprobs_BR[b, :n].tolist() == pytest.approx(expected, abs=1e-4)
        plain = plain_logprobs(policy, prompt, response, 1.0)
        assert it.statistics.plain_logprobs_BR[b, :n].tolist() == pytest.approx(plain, abs=1e-4)
        with torch.no_grad():
            states = scalar.model(torch.tensor([[*prompt, *response]])).last_hidden_state[0]
        values = (states @ scalar.score.weight[0]).tolist()
        # V(s_r) is read before response token r, the score at the last token.
        assert scored.values_BR[b, :n].tolist() == pytest.approx(values[len(prompt) - 1 : -1], abs=1e-4)
        assert float(scored.score_B[b]) == pytest.approx(values[-1], abs=1e-4)


def test_trap_09_the_ids_that_are_scored_and_trained_on_are_those_sampled(toys: Toys, tmp_path: Path) -> None:
    job = prepared(ppo_config(tmp_path / "run", "tiny", toys.prompts))
    it = first_iteration(job)
    sampled = sorted((*prompt, *response) for prompt, response in rows_of(it))
    # Random bytes are rarely UTF-8: decoding and encoding again would change these.
    again = [render_response(job.players.tokenizer, text) for text in it.texts]
    assert sum(a != r for a, (_, r) in zip(again, rows_of(it), strict=True)) > 10
    planned = [m.batch for group in it.plan for m in group.micros]
    assert (
        sorted(tuple(row[:n].tolist()) for m in planned for row, n in zip(m.ids_BT, m.length_B, strict=True)) == sampled
    )
    read: list[tuple[int, ...]] = []

    def watch(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        batch = next(m for m in planned if m.packing is named["packing"])
        rows = named["input_ids"][0][batch.packing.place_BT]
        read.extend(tuple(row[:n].tolist()) for row, n in zip(rows, batch.length_B, strict=True))

    job.players.policy.base.register_forward_pre_hook(watch, with_kwargs=True)
    update(job.players, job.optimisers, it.experience, it.plan, job.config, iteration=1, ptx=[])
    assert sorted(read) == sampled


def test_trap_09_no_eos_is_added_and_the_template_comes_once(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    job = prepared(ppo_config(tmp_path / "run", trained.sft, toys.prompts, rollout_batch=32))
    rollout = first_iteration(job).scored.rollout
    assert 0 < int(rollout.truncated_B.sum()) < 32
    for prompt, ids, response, cut in zip(
        rollout.prompts, rollout.prompt_ids, rollout.responses(), rollout.truncated_B.tolist(), strict=True
    ):
        assert list(ids) == render_prompt(job.players.tokenizer, prompt.messages)
        assert ids.count(1) == 2  # <|im_start|> of the user's and of the assistant's turn
        assert (response[-1] == 2) == (not cut)
        assert 2 not in response[:-1]
        assert (len(response) == 10) >= cut


def test_trap_13_returns_are_advantages_plus_the_unnormalised_old_values(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    config = ppo_config(tmp_path / "run", trained.sft, toys.prompts, whiten_advantages=True)
    it = first_iteration(prepared(config))
    mask = it.scored.rollout.mask_BR
    e = it.experience
    assert torch.equal(e.returns_BR, torch.where(mask, e.advantages_BR + it.scored.values_BR, 0.0))
    assert torch.equal(e.old_values_BR, it.scored.values_BR)
    assert abs(float(e.advantages_BR[mask].std()) - 1) > 0.1  # not whitened yet


def shaped_by_hand(it: FirstIteration, config: PPOConfig) -> tuple[list[list[float]], list[list[float]]]:
    """Rewards and advantages, in pure Python: normalise by the history → clip → penalty → last token − η·KL → GAE."""
    scored, rollout = it.scored, it.scored.rollout
    scores, cut = scored.score_B.tolist(), rollout.truncated_B.tolist()
    bootstrapped = [config.score.truncated == "bootstrap" and c for c in cut]
    known = [s for s, b in zip(scores, bootstrapped, strict=True) if not b]
    mean = sum(known) / len(known)
    std = math.sqrt(sum((s - mean) ** 2 for s in known) / len(known))
    rewards, advantages = [], []
    for b, n in enumerate(rollout.length_B.tolist()):
        value = min(max((scores[b] - mean) / std, -0.8), 0.8)  # the test's clip
        value = 0.0 if bootstrapped[b] else value
        value -= (
            (config.score.missing_eos_penalty or 0.0) if cut[b] else 0.0
        )  # the test's penalty, which leaves the range of the clip before it
        kl = (scored.old_logprobs_BR[b] - scored.reference_logprobs_BR[b]).tolist()
        row = [-0.05 * kl[r] for r in range(n)]
        row[-1] += value
        v = scored.values_BR[b].tolist()
        after, following, estimates = float(scored.bootstrap_B[b]), 0.0, [0.0] * n
        for r in reversed(range(n)):
            delta = row[r] + 0.99 * (v[r + 1] if r + 1 < n else after) - v[r]
            following = delta + 0.99 * 0.9 * following
            estimates[r] = following
        rewards.append(row)
        advantages.append(estimates)
    return rewards, advantages


@pytest.mark.parametrize("truncated", ["score", "bootstrap"])
def test_trap_11_15_16_the_order_of_shaping(truncated: Any, trained: Trained, toys: Toys, tmp_path: Path) -> None:
    config = ppo_config(
        tmp_path / "run", trained.sft, toys.prompts, reward=("stages.toy:length_reward",), rollout_batch=32, gamma=0.99,
        score=ScoreConfig(clip=0.8, missing_eos_penalty=2.0 if truncated == "score" else None, truncated=truncated),
        kl=KLConfig(coefficient=0.05),
    )  # fmt: skip
    job = prepared(config)
    with torch.no_grad():  # a policy that has left its reference, so that there is a KL to subtract
        job.players.policy.base.layers[0].mlp.down_proj.weight.mul_(30)
    it = first_iteration(job)
    scored, rollout = it.scored, it.scored.rollout
    assert 3 < int(rollout.truncated_B.sum()) < 29
    assert not scored.old_logprobs_BR.requires_grad
    assert float((scored.old_logprobs_BR - scored.reference_logprobs_BR).abs().max()) > 0.01
    rewards, advantages = shaped_by_hand(it, config)
    for b, n in enumerate(rollout.length_B.tolist()):
        assert it.rewards_BR[b, :n].tolist() == pytest.approx(rewards[b], abs=1e-5)
        assert it.experience.advantages_BR[b, :n].tolist() == pytest.approx(advantages[b], abs=1e-5)
        assert not it.rewards_BR[b, n:].any()
    cut = rollout.truncated_B
    if truncated == "score":
        assert not scored.bootstrap_B.any()
        assert it.seen.scores.count == 32
    else:
        assert not scored.bootstrap_B[~cut].any()
        assert scored.bootstrap_B[cut].all()
        assert it.seen.scores.count == int((~cut).sum())


def test_trap_16_the_history_includes_every_batch_up_to_the_current_one(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    config = ppo_config(tmp_path / "run", trained.sft, toys.prompts, reward=("stages.toy:length_reward",))
    it = first_iteration(prepared(config))
    doubled = seen(it.scored, it.seen, config).scores
    assert doubled.count == 2 * it.seen.scores.count == 32
    assert (doubled.mean, doubled.std) == pytest.approx((it.seen.scores.mean, it.seen.scores.std))
    assert it.seen.scores.mean == pytest.approx(float(it.scored.score_B.mean()))
    assert it.seen.scores.std == pytest.approx(float(it.scored.score_B.std(correction=0)))


def test_monte_carlo_targets_are_the_rewards_to_go(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    critic = CriticConfig(init="policy", pretrain_iterations=1, target="monte_carlo", optim=OptimConfig())
    config = ppo_config(tmp_path / "run", trained.sft, toys.prompts, critic=critic, gamma=0.9)
    it = first_iteration(prepared(config))
    for b, n in enumerate(it.scored.rollout.length_B.tolist()):
        row = it.rewards_BR[b].tolist()
        expected = [sum(0.9 ** (i - r) * row[i] for i in range(r, n)) for r in range(n)]
        assert it.experience.returns_BR[b, :n].tolist() == pytest.approx(expected, abs=1e-5)


def test_dense_rewards_stand_at_their_own_tokens_with_their_weight(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    config = ppo_config(
        tmp_path / "run", trained.sft, toys.prompts, score=ScoreConfig(normalise=False, clip=None),
        reward=("0.5*stages.toy:dense_e", "stages.toy:length_reward"),
    )  # fmt: skip
    it = first_iteration(prepared(config))
    assert it.scored.score_B.tolist() == length_reward([], it.texts)
    responses = it.scored.rollout.responses()
    assert sum(response.count(toy.E) for response in responses) > 3
    for b, response in enumerate(responses):
        expected = [0.5 * (token == toy.E) for token in response]
        expected[-1] += len(it.texts[b])
        assert it.rewards_BR[b, : len(response)].tolist() == pytest.approx(expected, abs=1e-5)


def test_a_reward_model_of_another_vocabulary_reads_text(
    toys: Toys, trained: Trained, tmp_path: Path, model_cache: Path
) -> None:
    other = toy.other_vocabulary(tmp_path / "other")
    reward(toy.reward_config(tmp_path / "rm", other, toys.pairs, max_steps=4, heldout=0.0))
    spec = str(tmp_path / "rm" / "final")
    job = prepared(ppo_config(tmp_path / "run", trained.sft, toys.prompts, reward=(spec,)))
    (term,) = job.players.terms
    assert not term.reward.reads_ids  # type: ignore[union-attr]
    it = first_iteration(job)
    model = AutoModelForSequenceClassification.from_pretrained(spec)
    for b, prompt in enumerate(it.scored.rollout.prompts):
        ids = render_prompt(job.players.tokenizer, prompt.messages) + render_response(
            job.players.tokenizer, it.texts[b]
        )
        ids = ids[:-1] if it.scored.rollout.truncated_B[b] else ids  # what was cut has no end of turn
        with torch.no_grad():
            score = model.model(torch.tensor([ids])).last_hidden_state[0, -1] @ model.score.weight[0]
        assert float(it.scored.score_B[b]) == pytest.approx(float(score), abs=1e-4)


def test_a_fixed_clip_without_normalising_clips_the_score_itself(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    config = ppo_config(
        tmp_path / "run", trained.sft, toys.prompts, reward=("stages.toy:length_reward",), kl=KLConfig(coefficient=None),
        score=ScoreConfig(normalise=False, clip=7.5),
    )  # fmt: skip
    it = first_iteration(prepared(config))
    _, rewards_BR = estimate(it.scored, it.seen, config)
    assert rewards_BR.sum(1).tolist() == [min(len(text), 7.5) for text in it.texts]
    assert max(map(len, it.texts)) > 7.5 > min(map(len, it.texts))


def test_an_id_that_another_player_has_no_embedding_for_is_refused_by_name(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    critic = CriticConfig(init="policy", pretrain_iterations=0)
    job = prepared(ppo_config(tmp_path / "run", trained.sft, toys.prompts, reward=(trained.reward,), critic=critic))
    rollout = job.roll_out(0)
    expect_known(job.players, rollout)
    rows = job.players.reference.base.get_input_embeddings().num_embeddings
    job.players.policy.model.resize_token_embeddings(rows + 1)
    rollout.response_ids_BR[0, 0] = rows
    with pytest.raises(SetupError, match=f"reference: found {rows} embeddings, expected more than {rows}, an id that"):
        expect_known(job.players, rollout)
    for player in (job.players.reference, job.players.critic):
        player.model.resize_token_embeddings(rows + 1)
    with pytest.raises(SetupError, match="reward reward: found"):
        expect_known(job.players, rollout)
