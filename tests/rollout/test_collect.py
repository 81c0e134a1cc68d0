"""From iteration numbers to rollouts: every prompt once an epoch, streams of their own, ids as they were sampled."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.architectures import EOS, policy, ragged

from ppomax.data.chat import render_prompt
from ppomax.models.players import Policy, at_responses
from ppomax.rollout.collect import (
    Sampling,
    collect,
    eos_token_ids,
    iteration_prompts,
    repeated,
    response_texts,
    stop_check,
)
from ppomax.rollout.sampler import Distribution
from ppomax.types import Message, Prompt, Rollout, token_batch

LIMIT = 10


def prompts_of(texts: list[str]) -> list[Prompt]:
    return [Prompt((Message(role="user", content=text),), key=str(i)) for i, text in enumerate(texts)]


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 3))
def test_trap_29_every_prompt_comes_once_an_epoch(count: int, per_iteration: int, seed: int) -> None:
    iterations = -(-3 * count // per_iteration)
    stream = [i for n in range(iterations) for i in iteration_prompts(count, per_iteration, n, seed)]
    assert len(stream) == iterations * per_iteration
    for epoch in range(len(stream) // count):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(st.integers(2, 30), st.integers(1, 12), st.integers(0, 50))
def test_trap_29_an_iteration_needs_nothing_of_those_before_it(count: int, per_iteration: int, number: int) -> None:
    # The long way round: one list of all that came before, cut where this iteration begins.
    long = [i for n in range(number + 1) for i in iteration_prompts(count, per_iteration, n, 5)]
    assert iteration_prompts(count, per_iteration, number, 5) == long[number * per_iteration :]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [iteration_prompts(20, 20, n, seed) for seed in (0, 1) for n in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(1, 4))
def test_no_two_rows_share_prompt_and_sample_number(indices: list[int], samples: int) -> None:
    rows, numbers = repeated(indices, samples)
    assert len(rows) == len(indices) * samples
    assert len(set(zip(rows, numbers, strict=True))) == len(rows)
    assert Counter(rows) == {i: n * samples for i, n in Counter(indices).items()}
    for index, times in Counter(rows).items():
        own = [n for r, n in zip(rows, numbers, strict=True) if r == index]
        assert own == list(range(times))


@pytest.fixture
def player(lively: str) -> Policy:
    return policy(lively)


def rollout_of(
    player: Policy, indices: list[int], max_rows: int = 64, **options: Any
) -> tuple[Rollout, list[tuple[int, ...]]]:
    """A rollout of two samples each for some of five ragged prompts."""
    ids = [tuple(p) for p in ragged(rows=5, seed=1)[0]]
    how = Sampling(LIMIT, Distribution(0.8), [EOS], max_rows)
    settings = {"samples": 2, "iteration": 3, "seed": 7, "how": how, **options}
    return collect(player, prompts_of(list("abcde")), ids, indices, **settings), ids


def test_trap_09_a_rollout_holds_what_was_sampled(player: Policy) -> None:
    rollout, ids = rollout_of(player, [4, 0, 2])
    assert [p.key for p in rollout.prompts] == ["4", "4", "0", "0", "2", "2"]
    assert list(rollout.prompt_ids) == [ids[i] for i in (4, 4, 0, 0, 2, 2)]
    assert rollout.sample_B.tolist() == [0, 1, 0, 1, 0, 1]
    assert rollout.response_ids_BR.shape[1] == int(rollout.length_B.max())
    for response, cut in zip(rollout.responses(), rollout.truncated_B.tolist(), strict=True):
        assert cut == (response[-1] != EOS) and EOS not in response[:-1]
        assert not cut or len(response) == LIMIT
    batch = token_batch(rollout.prompt_ids, rollout.responses())
    scored = at_responses(player(batch, temperature=0.8).logprobs_BT, batch)
    torch.testing.assert_close(rollout.behaviour_logprobs_BR, scored, atol=1e-5, rtol=0)
    assert not rollout.behaviour_logprobs_BR[~rollout.mask_BR].any()


def test_trap_29_a_row_depends_on_its_prompt_sample_and_iteration_alone(player: Policy) -> None:
    def rows(*indices: int, **options: Any) -> dict[tuple[str, int], list[int]]:
        rollout, _ = rollout_of(player, list(indices), **options)
        keys = [(p.key, n) for p, n in zip(rollout.prompts, rollout.sample_B.tolist(), strict=True)]
        return dict(zip(keys, rollout.responses(), strict=True))

    expected = rows(0, 1, 2, 3, 4)
    assert rows(4, 2, 0, 1, 3, max_rows=3) == expected
    assert rows(2) == {key: value for key, value in expected.items() if key[0] == "2"}
    assert rows(0, 1, samples=1) == {key: expected[key] for key in (("0", 0), ("1", 0))}
    for other in ({"iteration": 4}, {"seed": 8}):
        assert all(a != b for a, b in zip(rows(0, 1, 2, **other).values(), rows(0, 1, 2).values(), strict=True))
    twice = rows(1, 1)
    assert len({tuple(r) for r in twice.values()}) == 4, "a prompt that comes twice has four different samples"


@pytest.mark.parametrize("string", ["ab", "é", "\n\n", "x 日本"])
def test_a_stop_string_is_seen_with_its_last_token(tiny_tokenizer: Any, string: str) -> None:
    stops = stop_check(tiny_tokenizer, ["never here", string])
    assert stops is not None and stop_check(tiny_tokenizer, []) is None
    ids = tiny_tokenizer("aba 日本 " * 20 + "e" + string + " more", add_special_tokens=False)["input_ids"]
    said = [tiny_tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]
    first = next(n for n, text in enumerate(said) if string in text)
    assert [stops(ids[:n]) for n in range(1, first + 1)] == [False] * (first - 1) + [True]


def test_texts_leave_out_special_tokens_only(tiny_tokenizer: Any) -> None:
    def text_ids(text: str) -> list[int]:
        return tiny_tokenizer(text, add_special_tokens=False)["input_ids"]

    rows = [[*text_ids(" Hi there\n"), EOS], [EOS], text_ids("cut o")]
    width = max(map(len, rows))
    padded = torch.tensor([row + [7] * (width - len(row)) for row in rows])
    rollout = Rollout(
        tuple(prompts_of(["a", "b", "c"])), ((1,),) * 3, padded, torch.tensor([len(r) for r in rows]),
        torch.zeros(3, width), torch.tensor([False, False, True]), torch.zeros(3, dtype=torch.long),
    )  # fmt: skip
    assert response_texts(tiny_tokenizer, rollout) == ["Hi there", "", "cut o"]


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_character_that_the_limit_cut_is_left_out(missing: int, tiny_tokenizer: Any) -> None:
    """The tiny tokenizer's tokens are bytes."""
    ids = torch.tensor([tiny_tokenizer("a rose 🌹", add_special_tokens=False)["input_ids"][:-missing]] * 2)
    rollout = Rollout(
        tuple(prompts_of(["a", "b"])), ((1,),) * 2, ids, torch.tensor([ids.shape[1]] * 2), torch.zeros(ids.shape),
        torch.tensor([True, False]), torch.zeros(2, dtype=torch.long),
    )  # fmt: skip
    cut, whole = response_texts(tiny_tokenizer, rollout)
    assert cut == "a rose" and whole.startswith("a rose \ufffd")  # what the policy itself wrote stays


def test_prompts_rendered_for_sampling_end_with_the_cue(tiny_tokenizer: Any) -> None:
    ids = render_prompt(tiny_tokenizer, [Message(role="user", content="x")])
    assert tiny_tokenizer.decode(ids).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("configured", "expected"), [(None, [2]), (2, [2]), (0, [0, 2]), ([5, 2, 9], [2, 5, 9]), ([], [2])]
)
def test_every_configured_eos_ends_a_response(
    tiny_tokenizer: Any, configured: int | list[int] | None, expected: list[int]
) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=configured))
    assert eos_token_ids(model, tiny_tokenizer) == expected
    assert eos_token_ids(SimpleNamespace(), tiny_tokenizer) == [2]
