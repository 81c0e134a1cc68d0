"""Scoring a rollout: every row once, the very numbers that training will see, whatever the microbatches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models.architectures import EOS, ragged
from torch import Tensor

from ppomax.config import CriticConfig, ModelConfig, PPOConfig
from ppomax.models.load import load_tokenizer
from ppomax.models.players import at_responses
from ppomax.rl.kl import k1
from ppomax.rollout.collect import Sampling, collect
from ppomax.rollout.sampler import Distribution
from ppomax.stages.inputs import compute_of
from ppomax.stages.players import Players, load_players
from ppomax.stages.scoring import Minibatch, TokenStatistics, plan_minibatches, score
from ppomax.types import Message, Prompt, Rollout, ScoredRollouts, token_batch

ROWS, LIMIT, TOLERANCE = 12, 10, 1e-5
PLAN = {"minibatch": 5, "budget": 50, "seed": 3, "iteration": 2}


@pytest.fixture(scope="session")
def directories(lively: str, lively_reward: str) -> tuple[str, str]:
    """Policy and reward model on one trunk."""
    return lively, lively_reward


def players_of(
    directories: tuple[str, str], dtype: str = "float32", *, reward: Any = None, init: str = "reward", **compute: Any
) -> Players:
    config = PPOConfig(
        policy=directories[0], reward=(f"2*{directories[1]}",), critic=CriticConfig(init=init),
        compute=ModelConfig(dtype=dtype, device="cpu", **compute),
    )  # fmt: skip
    return load_players(config, compute_of(config.compute), load_tokenizer(directories[0]), reward)


def rollout_of(players: Players, *, temperature: float = 1.0) -> Rollout:
    """Twelve sampled rows, some of them cut by the limit."""
    ids = [tuple(p) for p in ragged(rows=ROWS, seed=2)[0]]
    prompts = [Prompt((Message(role="user", content=str(i)),), key=str(i)) for i in range(ROWS)]
    return collect(
        players.policy, prompts, ids, range(ROWS), samples=1, iteration=0, seed=0,
        how=Sampling(LIMIT, Distribution(temperature), range(EOS, 28), max_rows=64),
    )  # fmt: skip


def rollout_by_hand(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Rollout:
    width = max(map(len, responses))
    return Rollout(
        tuple(Prompt((Message(role="user", content="x"),), key=str(i)) for i in range(len(prompts))),
        tuple(tuple(p) for p in prompts), torch.tensor([[*r, *[0] * (width - len(r))] for r in responses]),
        torch.tensor([len(r) for r in responses]), torch.zeros(len(responses), width),
        torch.tensor([r[-1:] != [EOS] for r in responses]), torch.zeros(len(responses), dtype=torch.long),
    )  # fmt: skip


def scored(
    players: Players, rollout: Rollout, *, temperature: float = 1.0, bootstrap: bool = False, **plan: int
) -> tuple[ScoredRollouts, TokenStatistics, list[Minibatch]]:
    chosen = plan_minibatches(rollout, players, **{**PLAN, **plan})
    texts = ["text"] * len(rollout)
    return *score(players, rollout, chosen, texts, temperature=temperature, bootstrap=bootstrap), chosen


def trained_forward(
    players: Players, plan: list[Minibatch], rollout: Rollout, temperature: float
) -> tuple[Tensor, Tensor]:
    """[B, R] log-probs and values as the update computes them, with a graph for the gradient."""
    logprobs_BR, values_BR = (torch.zeros(rollout.response_ids_BR.shape) for _ in range(2))
    for micro in (m for group in plan for m in group.micros):
        logprobs = players.policy(micro.batch, temperature=temperature).logprobs_BT
        values = players.critic(micro.batch).values_BT
        assert logprobs.requires_grad and values.requires_grad
        rows, width = list(micro.rows), micro.batch.response_width
        logprobs_BR[rows, :width] = at_responses(logprobs, micro.batch).detach()
        values_BR[rows, :width] = at_responses(values, micro.batch, before=True).detach()
    return logprobs_BR, values_BR


@pytest.mark.parametrize("minibatch", [1, 5, 12, 100])
@pytest.mark.parametrize("budget", [1, 50, 10_000])
def test_every_row_is_in_exactly_one_microbatch(directories: tuple[str, str], minibatch: int, budget: int) -> None:
    players = players_of(directories)
    rollout = rollout_of(players)
    plan = plan_minibatches(rollout, players, **{**PLAN, "minibatch": minibatch, "budget": budget})
    rows = [[i for micro in group.micros for i in micro.rows] for group in plan]
    assert sorted(i for group in rows for i in group) == list(range(ROWS))
    assert [len(group) for group in rows[:-1]] == [minibatch] * (len(rows) - 1) and len(rows[-1]) <= minibatch
    for micro in (m for group in plan for m in group.micros):
        assert len(micro.rows) == 1 or len(micro.batch.packing.source_N) <= budget
        for b, i in enumerate(micro.rows):
            whole = [*rollout.prompt_ids[i], *rollout.responses()[i]]
            assert micro.batch.ids_BT[b, : len(whole)].tolist() == whole
            assert int(micro.batch.length_B[b]) == len(whole)
            assert int(micro.batch.prompt_length_B[b]) == len(rollout.prompt_ids[i])


def test_trap_29_the_plan_is_a_function_of_seed_and_iteration(directories: tuple[str, str]) -> None:
    players = players_of(directories)
    rollout = rollout_of(players)

    def rows(**changed: int) -> list[list[tuple[int, ...]]]:
        plan = plan_minibatches(rollout, players, **{**PLAN, **changed})
        return [[micro.rows for micro in group.micros] for group in plan]

    assert rows() == rows()
    assert rows() != rows(iteration=3) and rows() != rows(seed=4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layers", [None, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trap_07_old_readings_are_bit_for_bit_those_of_training(
    directories: tuple[str, str], dtype: str, layers: int | None, temperature: float, checkpointing: bool
) -> None:
    players = players_of(directories, dtype, train_layers=layers, gradient_checkpointing=checkpointing)
    rollout = rollout_of(players, temperature=temperature)
    result, _, plan = scored(players, rollout, temperature=temperature)
    assert sum(len(group.micros) for group in plan) > len(plan), "several microbatches"
    logprobs, values = trained_forward(players, plan, rollout, temperature)
    assert torch.equal(logprobs, result.old_logprobs_BR) and torch.equal(values, result.values_BR)
    ratio = torch.exp(logprobs - result.old_logprobs_BR)[rollout.mask_BR]
    assert ratio.unique().tolist() == [1.0]
    if dtype == "float32":
        torch.testing.assert_close(result.old_logprobs_BR, rollout.behaviour_logprobs_BR, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layers", [None, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_trap_14_kl_to_an_equal_reference_is_exactly_zero(
    directories: tuple[str, str], dtype: str, layers: int | None, temperature: float
) -> None:
    players = players_of(directories, dtype, train_layers=layers)
    rollout = rollout_of(players, temperature=temperature)
    result, _, _ = scored(players, rollout, temperature=temperature)
    assert not k1(result.old_logprobs_BR, result.reference_logprobs_BR).any()
    assert bool((result.old_logprobs_BR[rollout.mask_BR] < 0).all())


@pytest.mark.parametrize("layers", [None, 1])
def test_with_the_exact_kl_the_reference_is_read_once(directories: tuple[str, str], layers: int | None) -> None:
    players = players_of(directories, train_layers=layers)
    rollout = rollout_of(players)
    with torch.no_grad():
        for parameter in players.policy.trained_parameters().values():
            parameter.mul_(1.1)
    expected, _, plan = scored(players, rollout)
    seen: list[int] = []
    hook = players.reference.base.norm.register_forward_hook(lambda *_: seen.append(1))
    found, _ = score(players, rollout, plan, ["text"] * ROWS, temperature=1.0, bootstrap=False, full_kl=True)
    hook.remove()
    assert len(seen) == sum(len(group.micros) for group in plan)
    assert torch.equal(found.reference_logprobs_BR, expected.reference_logprobs_BR)
    assert found.full_kl_BR is not None and expected.full_kl_BR is None
    assert bool((found.full_kl_BR[rollout.mask_BR] > 0).all())


@pytest.mark.parametrize("layers", [None, 1])
def test_trap_03_another_plan_gives_the_same_numbers(directories: tuple[str, str], layers: int | None) -> None:
    players = players_of(directories, train_layers=layers)
    rollout = rollout_of(players)
    expected, statistics, _ = scored(players, rollout, bootstrap=True)
    for plan in ({"budget": 1}, {"minibatch": 12, "budget": 10_000, "seed": 9}):
        found, others, _ = scored(players, rollout, bootstrap=True, **plan)
        for name in ("old_logprobs_BR", "reference_logprobs_BR", "values_BR", "score_B", "bootstrap_B"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=TOLERANCE, rtol=0, msg=name)
        torch.testing.assert_close(others.entropy_BR, statistics.entropy_BR, atol=TOLERANCE, rtol=0)
    backwards = list(range(ROWS))[::-1]
    found, _, _ = scored(players, rollout.take(backwards))
    torch.testing.assert_close(found.old_logprobs_BR.flip(0), expected.old_logprobs_BR, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found.score_B.flip(0), expected.score_B, atol=TOLERANCE, rtol=0)


def test_trap_01_and_11_scores_and_values_stand_at_their_tokens(directories: tuple[str, str]) -> None:
    players = players_of(directories)
    rollout = rollout_of(players)
    result, _, _ = scored(players, rollout)
    assert float(result.score_B.std()) > 0.01
    for i, (prompt, response) in enumerate(zip(rollout.prompt_ids, rollout.responses(), strict=True)):
        alone, n, p = token_batch([prompt], [response]), len(response), len(prompt)
        with torch.no_grad():
            values = players.critic(alone).values_BT[0]
            end = float(players.terms[0].reward.scalar(alone).values_BT[0, p + n - 1])
        # V(s_r) is read at token p + r − 1: the last prompt token for the first response token.
        torch.testing.assert_close(result.values_BR[i, :n], values[p - 1 : p + n - 1], atol=TOLERANCE, rtol=0)
        assert float(result.components[players.terms[0].name][i]) == pytest.approx(end, abs=TOLERANCE)
        assert float(result.score_B[i]) == pytest.approx(2 * end, abs=2 * TOLERANCE)
    for name in ("old_logprobs_BR", "reference_logprobs_BR", "values_BR"):
        assert not getattr(result, name)[~rollout.mask_BR].any()


def test_trap_11_only_truncated_rows_have_the_value_of_the_cut_state(directories: tuple[str, str]) -> None:
    players = players_of(directories)
    rollout = rollout_of(players)
    assert 0 < int(rollout.truncated_B.sum()) < ROWS
    result, _, _ = scored(players, rollout, bootstrap=True)
    for i, (prompt, response) in enumerate(zip(rollout.prompt_ids, rollout.responses(), strict=True)):
        with torch.no_grad():
            after = float(players.critic(token_batch([prompt], [response])).values_BT[0, -1])
        expected = after if rollout.truncated_B[i] else 0.0
        assert float(result.bootstrap_B[i]) == pytest.approx(expected, abs=TOLERANCE)
    without, _, _ = scored(players, rollout, bootstrap=False)
    assert not without.bootstrap_B.any()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_trap_18_and_25_statistics_are_exact(directories: tuple[str, str], temperature: float) -> None:
    players = players_of(directories)
    rollout = rollout_of(players)
    _, statistics, _ = scored(players, rollout, temperature=temperature)
    for i, (prompt, response) in enumerate(zip(rollout.prompt_ids, rollout.responses(), strict=True)):
        n = len(response)
        with torch.no_grad():
            logits = players.policy.model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        tempered, plain = torch.log_softmax(logits / temperature, -1), torch.log_softmax(logits, -1)
        entropy = -(tempered.exp() * tempered).sum(-1)
        torch.testing.assert_close(statistics.entropy_BR[i, :n], entropy, atol=TOLERANCE, rtol=0)
        chosen = plain[range(n), response]
        torch.testing.assert_close(statistics.plain_logprobs_BR[i, :n], chosen, atol=TOLERANCE, rtol=0)


def test_trap_06_responses_of_one_token(directories: tuple[str, str]) -> None:
    players = players_of(directories)
    rollout = rollout_by_hand([[5, 6, 7], [9]], [[EOS], [8]])
    result, _, plan = scored(players, rollout, bootstrap=True)
    assert result.values_BR.shape == (2, 1) and bool((result.old_logprobs_BR < 0).all())
    assert result.bootstrap_B[0] == 0 != result.bootstrap_B[1]
    assert torch.equal(trained_forward(players, plan, rollout, 1.0)[0], result.old_logprobs_BR)


def test_trap_06_an_empty_response_cannot_become_a_rollout() -> None:
    with pytest.raises(ValueError, match=r"length_B: found values outside 1\.\.1"):
        rollout_by_hand([[5, 6], [9]], [[7], []])


def test_trap_02_responses_with_pad_and_eos_inside_are_read_to_their_end(directories: tuple[str, str]) -> None:
    players = players_of(directories)
    prompts, responses = [[5, 2, 7], [2], [0, 4]], [[EOS, 8, EOS], [0, 0, 0, 9, 0, EOS], [0]]
    together, _, _ = scored(players, rollout_by_hand(prompts, responses))
    for i in range(3):
        alone, _, _ = scored(players, rollout_by_hand(prompts[i : i + 1], responses[i : i + 1]))
        n = len(responses[i])
        torch.testing.assert_close(together.old_logprobs_BR[i, :n], alone.old_logprobs_BR[0], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(together.values_BR[i, :n], alone.values_BR[0], atol=TOLERANCE, rtol=0)
        assert float(together.score_B[i]) == pytest.approx(float(alone.score_B[0]), abs=TOLERANCE)


@pytest.mark.parametrize("layers", [None, 1])
def test_trap_10_and_15_scoring_moves_nothing_and_leaves_no_graph(
    directories: tuple[str, str], layers: int | None
) -> None:
    players = players_of(directories, train_layers=layers)
    rollout = rollout_of(players)
    models = [players.policy, players.reference, players.critic, players.terms[0].reward.scalar]
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in models]
    result, statistics, _ = scored(players, rollout, bootstrap=True)
    for tensor in (
        result.old_logprobs_BR, result.reference_logprobs_BR, result.values_BR, result.score_B, result.bootstrap_B,
        statistics.entropy_BR,
    ):  # fmt: skip
        assert not tensor.requires_grad and tensor.dtype == torch.float32
    for model, states in zip(models, before, strict=True):
        assert all(torch.equal(v, states[k]) for k, v in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("layers", [None, 1])
def test_a_callable_reward_takes_the_place_of_the_model(directories: tuple[str, str], layers: int | None) -> None:
    def dense(prompts: Any, responses: list[str], **columns: Any) -> list[list[float]]:
        return [[float(i)] * n for i, n in enumerate(rollout.length_B.tolist())]

    players = players_of(directories, reward=dense, init="policy", train_layers=layers)
    rollout = rollout_of(players)
    result, _, _ = scored(players, rollout)
    assert [name.rpartition(".")[2] for name in result.components] == ["dense"]
    assert not result.score_B.any() and result.dense_BR is not None
    assert result.dense_BR.sum(1).tolist() == [i * n for i, n in enumerate(rollout.length_B.tolist())]


def test_one_trunk_is_computed_for_all_players(directories: tuple[str, str]) -> None:
    players = players_of(directories, train_layers=1)
    rollout = rollout_of(players)
    plan = plan_minibatches(rollout, players, **PLAN)
    assert players.shares_trunk and all(m.batch.trunk_BTH is not None for group in plan for m in group.micros)
    seen: list[int] = []
    hook = players.policy.base.layers[0].register_forward_hook(lambda *_: seen.append(1))
    score(players, rollout, plan, ["x"] * ROWS, temperature=1.0, bootstrap=False)
    trained_forward(players, plan, rollout, 1.0)
    hook.remove()
    assert not seen, "the frozen lower layers run when the plan is made and never again"
