"""Sampling: a response depends on its prompt and its own random stream, and carries the log-probs it is scored with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from models.architectures import EOS, VOCABULARY, policy, ragged, reloaded
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache

from ppomax.engine.randomness import uniforms_for
from ppomax.models.players import Policy, at_responses
from ppomax.rollout import sampler
from ppomax.rollout.cache import forget_columns
from ppomax.rollout.sampler import Distribution, Sampled, sample
from ppomax.types import token_batch

TOLERANCE = 1e-5
LIMIT = 24
# A tenth of the vocabulary ends a response, so that responses end at many lengths.
STOPS = tuple(range(EOS, 28))


@pytest.fixture
def player(lively: str) -> Policy:
    """A whole, frozen policy, in float64: a draw at the edge of a token must not hang on the rounding of a batch shape."""
    return policy(lively).double()


def streams(rows: int, limit: int = LIMIT, seed: int = 1) -> Tensor:
    return uniforms_for(seed, 0, range(rows), [0] * rows, limit)


def sampled(
    player: Policy, prompts: Sequence[Sequence[int]], uniforms_BR: Tensor | None = None, *, temperature: float = 1.0,
    max_rows: int = 64, max_tokens: int | None = None, eos: Sequence[int] = STOPS,
    stop: Callable[[Sequence[int]], bool] | None = None, **warp: float,
) -> list[Sampled]:  # fmt: skip
    return sample(
        player, prompts, streams(len(prompts)) if uniforms_BR is None else uniforms_BR,
        distribution=Distribution(temperature, **warp), eos_ids=eos, max_rows=max_rows, max_tokens=max_tokens,
        stop=stop,
    )  # fmt: skip


def assert_same(found: Sequence[Sampled], expected: Sequence[Sampled]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.ids == b.ids and a.truncated == b.truncated
        assert a.logprobs == pytest.approx(b.logprobs, abs=TOLERANCE)


def many_prompts() -> list[list[int]]:
    """Twelve ragged prompts, some equal, out of order."""
    prompts, _ = ragged(rows=9, seed=6)
    return [*prompts[:5], prompts[1], *prompts[5:], prompts[1], prompts[0]]


def widths(player: Policy, do: Callable[[], object]) -> list[tuple[int, int]]:
    """(rows, tokens) of every pass through the model."""
    seen: list[tuple[int, int]] = []
    hook = player.base.register_forward_pre_hook(
        lambda module, given, named: seen.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    do()
    hook.remove()
    return seen


@pytest.mark.parametrize("max_rows", [1, 3, 64])
def test_trap_03_tokens_do_not_depend_on_the_rows_side_by_side(player: Policy, max_rows: int) -> None:
    prompts = many_prompts()
    expected = sampled(player, prompts)
    assert len({len(s.ids) for s in expected}) > 3, "rows should leave the batch at different times"
    assert_same(sampled(player, prompts, max_rows=max_rows), expected)


def test_trap_03_neighbours_and_order_change_nothing(player: Policy) -> None:
    prompts = many_prompts()
    uniforms_BR = streams(len(prompts))
    expected = sampled(player, prompts, uniforms_BR)
    assert_same(sampled(player, prompts[::-1], uniforms_BR.flip(0))[::-1], expected)
    for i in range(len(prompts)):
        assert_same(sampled(player, [prompts[i]], uniforms_BR[i : i + 1]), [expected[i]])
    long = [[9] * 70]
    assert_same(sampled(player, [*long, *prompts], torch.cat([uniforms_BR[:1], uniforms_BR]))[1:], expected)


def test_equal_prompts_are_prefilled_once_and_sampled_as_if_alone(player: Policy) -> None:
    prompt = [5, 6, 7]
    uniforms_BR = streams(4)
    together: list[Sampled] = []
    passes = widths(player, lambda: together.extend(sampled(player, [prompt] * 4, uniforms_BR)))
    assert passes[0] == (1, 3) and passes[1] == (4, 1)
    assert len({tuple(s.ids) for s in together}) > 1
    for i in range(4):
        assert_same([together[i]], sampled(player, [prompt], uniforms_BR[i : i + 1]))


@pytest.mark.parametrize("warp", [{}, {"repetition_penalty": 1.3}], ids=str)
def test_prompts_of_other_lengths_are_read_apart_where_padding_would_cost_more(
    warp: dict[str, float], player: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[5 + i] * 3 for i in range(4)] + [[9 + i] * 60 for i in range(2)]
    expected, apart = sampled(player, prompts, **warp), [(2, 60), (4, 3)]
    drawn: list[Sampled] = []
    assert widths(player, lambda: drawn.extend(sampled(player, prompts, **warp)))[:2] == apart
    assert_same(drawn, expected)
    monkeypatch.setattr(sampler, "PREFILL", 60)  # which bounds what a pass holds
    assert widths(player, lambda: drawn.extend(sampled(player, prompts, **warp)))[:3] == [(1, 60), (1, 60), (4, 3)]
    assert_same(drawn[len(prompts) :], expected)
    for i in (0, 5):
        assert_same([expected[i]], sampled(player, [prompts[i]], streams(len(prompts))[i : i + 1], **warp))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_trap_08_sampled_logprobs_are_the_scored_ones(player: Policy, temperature: float) -> None:
    prompts = many_prompts()
    responses = sampled(player, prompts, temperature=temperature)
    batch = token_batch(prompts, [s.ids for s in responses])
    scored = at_responses(player(batch, temperature=temperature).logprobs_BT, batch)
    assert batch.mask_BR.sum(1).tolist() == [len(s.ids) for s in responses]
    for row, s in zip(scored.tolist(), responses, strict=True):
        assert row[: len(s.ids)] == pytest.approx(s.logprobs, abs=TOLERANCE)


def test_a_longer_limit_begins_with_the_shorter_response(player: Policy) -> None:
    prompts = many_prompts()
    short, long = (sampled(player, prompts, streams(len(prompts), n)) for n in (5, LIMIT))
    for a, b in zip(short, long, strict=True):
        assert b.ids[: len(a.ids)] == a.ids
        assert a.truncated == (not set(STOPS) & set(a.ids))


def test_trap_09_eos_stops_and_is_kept_and_nothing_is_appended(player: Policy) -> None:
    # Rows of uniforms that steer: which token is drawn is read off the first logits.
    prompt = [5, 6, 7]
    with torch.no_grad():
        logits = player.model(torch.tensor([prompt])).logits[0, -1]
    cumulative = torch.softmax(logits, -1).cumsum(0)
    inside_eos = float((cumulative[EOS] + cumulative[EOS - 1]) / 2)
    row = torch.full((1, 6), 0.5)
    row[0, 0] = inside_eos
    ended = sampled(player, [prompt], row, eos=(EOS,))[0]
    assert ended.ids == [EOS] and not ended.truncated and len(ended.logprobs) == 1
    cut = sampled(player, [prompt], torch.full((1, 6), 0.5), eos=(VOCABULARY - 1,))[0]
    assert len(cut.ids) == 6 and cut.truncated and cut.ids[-1] != VOCABULARY - 1


def test_trap_27_an_eos_on_the_last_allowed_token_is_no_truncation(player: Policy) -> None:
    prompts = many_prompts()
    responses = sampled(player, prompts)
    ended = [i for i, s in enumerate(responses) if not s.truncated and len(s.ids) > 1]
    assert len(ended) > 3
    for i in ended:
        exact = sampled(player, [prompts[i]], streams(len(prompts))[i : i + 1, : len(responses[i].ids)])[0]
        assert exact.ids == responses[i].ids and exact.ids[-1] in STOPS and not exact.truncated
        shorter = sampled(player, [prompts[i]], streams(len(prompts))[i : i + 1, : len(responses[i].ids) - 1])[0]
        assert shorter.truncated and not set(STOPS) & set(shorter.ids)


def test_any_of_several_eos_ids_stops(player: Policy) -> None:
    prompts = many_prompts()
    free = sampled(player, prompts, eos=())
    assert all(s.truncated and len(s.ids) == LIMIT for s in free)
    other = free[0].ids[3]
    for a, b in zip(sampled(player, prompts, eos=(EOS, other)), free, strict=True):
        stops = [i for i, token in enumerate(b.ids) if token in (EOS, other)]
        assert a.ids == b.ids[: stops[0] + 1 if stops else LIMIT]


def test_trap_02_prompts_and_responses_may_contain_pad_and_eos(player: Policy) -> None:
    # eos in the prompt (an earlier turn), pad (here the same id, and 0) in prompts and responses.
    prompts = [[2, 5, 2], [0, 0, 9, 4, 2, 6], [2], [7, 0]] * 12
    uniforms_BR, eos = streams(len(prompts)), (VOCABULARY - 1,)
    responses = sampled(player, prompts, uniforms_BR, eos=eos)
    inside = [i for i, s in enumerate(responses) if {0, EOS} & set(s.ids[:-1])]
    assert inside, "2 is no eos here and should stand inside a response"
    for i in inside:
        assert_same([responses[i]], sampled(player, [prompts[i]], uniforms_BR[i : i + 1], eos=eos))
    batch = token_batch(prompts, [s.ids for s in responses])
    scored = at_responses(player(batch).logprobs_BT, batch)
    for row, s in zip(scored.tolist(), responses, strict=True):
        assert row[: len(s.ids)] == pytest.approx(s.logprobs, abs=TOLERANCE)


def test_the_greedy_limit_is_generate_token_for_token(lively: str) -> None:
    player = policy(lively)
    prompts, _ = ragged(rows=6, seed=8)
    responses = sampled(player, prompts, temperature=1e-4, eos=(EOS,))
    plain = reloaded(AutoModelForCausalLM, lively)
    for prompt, s in zip(prompts, responses, strict=True):
        ids = torch.tensor([prompt])
        expected = plain.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LIMIT, eos_token_id=EOS,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert s.ids == expected


def test_the_repetition_penalty_counts_prompt_and_response(lively: str) -> None:
    player = policy(lively)
    prompts, _ = ragged(rows=3, seed=8)
    responses = sampled(player, prompts, temperature=1e-4, repetition_penalty=1.5, eos=(EOS,))
    plain = reloaded(AutoModelForCausalLM, lively)
    for prompt, s in zip(prompts, responses, strict=True):
        ids = torch.tensor([prompt])
        expected = plain.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LIMIT, eos_token_id=EOS,
            pad_token_id=0, repetition_penalty=1.5,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert s.ids == expected
    assert [s.ids for s in responses] != [s.ids for s in sampled(player, prompts, temperature=1e-4, eos=(EOS,))]


@pytest.mark.parametrize("warp", [{"top_k": 3}, {"top_p": 0.5}, {"repetition_penalty": 3.0}])
def test_warped_samples_do_not_depend_on_neighbours(player: Policy, warp: dict[str, float]) -> None:
    prompts = many_prompts()
    expected = sampled(player, prompts, **warp)
    assert_same(sampled(player, prompts, max_rows=2, **warp), expected)


def test_trap_07_gradient_checkpointing_keeps_the_cache(lively: str) -> None:
    prompts = many_prompts()
    expected = sampled(policy(lively), prompts)
    trained = policy(lively, trained=True, checkpointing=True)
    assert_same(sampled(trained, prompts), expected)
    for split in (False, True):
        assert_same(sampled(policy(lively, train_layers=1, trained=True, checkpointing=split), prompts), expected)


def test_progress_counts_every_response_once(player: Policy) -> None:
    counts: list[int] = []
    sample(
        player, many_prompts(), streams(12), distribution=Distribution(), eos_ids=[EOS], max_rows=5,
        progress=counts.append,
    )  # fmt: skip
    assert sum(counts) == 12 and all(counts)


def test_a_row_that_has_ended_gives_its_place_to_one_that_waits(player: Policy) -> None:
    prompts = many_prompts() * 3
    free = sampled(player, prompts)
    seen = widths(player, lambda: assert_same(sampled(player, prompts, max_rows=4), free))
    steps = [rows for rows, tokens in seen if tokens == 1]
    # A batch that waits for its slowest row needs the sum of the longest of every four.
    assert len(steps) < 0.8 * sum(max(len(s.ids) for s in free[i : i + 4]) for i in range(0, len(free), 4))
    assert max(steps) == 4 and sum(steps) == sum(len(s.ids) - 1 for s in free)


def test_the_cache_is_moved_and_never_grows(player: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []

    def counted(cache: Cache, columns: int) -> None:
        moved.append(columns)
        forget_columns(cache, columns)

    monkeypatch.setattr(sampler, "forget_columns", counted)
    prompts = many_prompts() * 3
    assert_same(sampled(player, prompts, max_rows=3), sampled(player, prompts))
    assert len(moved) > 2 and min(moved) > LIMIT // sampler.SPARE
    # With the penalty, the tokens of the columns go as well.
    penalty = {"repetition_penalty": 3.0}
    assert_same(sampled(player, prompts, max_rows=3, **penalty), sampled(player, prompts, **penalty))


def test_a_token_budget_takes_rows_from_the_batch(player: Policy) -> None:
    prompts = many_prompts()
    longest = max(map(len, prompts)) + LIMIT + LIMIT // sampler.SPARE
    expected = sampled(player, prompts)
    for tokens, rows in ((1, 1), (longest - 1, 1), (2 * longest, 2), (5 * longest + 3, 5)):
        seen = widths(player, lambda t=tokens: assert_same(sampled(player, prompts, max_tokens=t), expected))
        assert max(width for width, length in seen if length == 1) == rows


def test_a_stop_ends_a_response_that_is_then_complete(player: Policy) -> None:
    prompts = many_prompts()
    free = sampled(player, prompts, eos=())
    pair = free[0].ids[4:6]
    found = sampled(player, prompts, eos=(), stop=lambda ids: list(ids[-2:]) == pair)
    assert found[0].ids == free[0].ids[:6] and not found[0].truncated
    for a, b in zip(found, free, strict=True):
        assert a.ids == b.ids[: len(a.ids)] and a.truncated == (a.ids[-2:] != pair)


def test_no_prompts_no_responses(player: Policy) -> None:
    assert sampled(player, [], torch.empty(0, 4)) == []
