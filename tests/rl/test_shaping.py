from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from ppomax.rl.masked import masked_sum, whiten, zero_masked
from ppomax.rl.shaping import (
    Moments,
    length_penalty,
    missing_eos_penalty,
    normalise_advantages,
    normalise_and_clip,
    normalise_by_source,
    place_on_last_token,
    rolling_returns,
    scale_rewards,
    token_rewards,
    update_by_source,
)

from . import oracle
from .batches import (
    NAN,
    assert_close,
    assert_only_counted_tokens_matter,
    assert_refused,
    assert_rows_are_independent,
    mask_of,
    pad,
    ragged,
    unit,
)

MASK = torch.tensor([[True, True, True], [True, False, False]])
OLD = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, NAN, NAN]])
REFERENCE = torch.tensor([[-1.5, -1.0, -3.0], [-2.5, NAN, NAN]])
SCORES = torch.tensor([4.0, -1.0])

scores = st.lists(st.floats(-100, 100, width=32), max_size=8)


def test_trap_16_moments_by_hand():
    moments = Moments().update([1.0, 2.0]).update([6.0])
    assert moments == Moments(count=3.0, mean=3.0, m2=4.0 + 1.0 + 9.0)
    assert moments.std == math.sqrt(14 / 3), "biased: divided by 3, not 2"
    assert Moments().std == 0.0
    assert Moments().update([]) == Moments()


@given(st.lists(scores, min_size=1, max_size=5))
def test_moments_of_batches_are_those_of_the_whole_history(batches):
    history = [score for batch in batches for score in batch]
    assume(history)
    moments = Moments()
    for batch in batches:
        moments = moments.update(batch)
    assert moments.count == len(history)
    assert moments.mean == pytest.approx(statistics.fmean(history), rel=1e-12, abs=1e-12)
    assert moments.std == pytest.approx(statistics.pstdev(history), rel=1e-9, abs=1e-9)


@given(scores, scores, scores)
def test_merge_is_associative_and_commutative(a, b, c):
    x, y, z = (Moments().update(values) for values in (a, b, c))
    for one, other in ((x.merge(y).merge(z), x.merge(y.merge(z))), (x.merge(y), y.merge(x))):
        assert one.count == other.count
        assert one.mean == pytest.approx(other.mean, rel=1e-12, abs=1e-12)
        assert one.m2 == pytest.approx(other.m2, rel=1e-9, abs=1e-9)


def test_moments_survive_a_large_mean():
    """The textbook E[x^2] - E[x]^2 loses every digit here."""
    moments = Moments()
    for _ in range(1000):
        moments = moments.update([1e8 - 1.0, 1e8 + 1.0])
    assert moments.std == pytest.approx(1.0, rel=1e-9)


@given(scores)
def test_trap_29_moments_come_back_from_json_bit_for_bit(values):
    moments = Moments().update(values)
    assert Moments.from_dict(json.loads(json.dumps(moments.to_dict()))) == moments


def test_moments_refuse_what_would_poison_them():
    for bad in (NAN, math.inf):
        assert_refused(r"values\[1\]", Moments().update, [0.0, bad])
    assert_refused("m2", Moments, 1.0, 0.0, -1.0)
    assert_refused("count", Moments, -1.0, 0.0, 0.0)
    assert_refused("mean", Moments, 1.0, NAN, 0.0)
    assert_refused("saved", Moments.from_dict, {"count": 1.0, "mean": 0.0})


def test_trap_16_normalise_and_clip_by_hand():
    # History 1, 3 with mean 2 and std 1, then clipped at 1.5.
    moments = Moments().update([1.0, 3.0])
    assert_close(normalise_and_clip(torch.tensor([2.5, 9.0, -9.0]), moments, clip=1.5), [0.5, 1.5, -1.5])
    assert_close(normalise_and_clip(torch.tensor([2.5, 9.0, -9.0]), moments, clip=None), [0.5, 7.0, -11.0])


@given(
    st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=8),
    st.lists(st.floats(-4, 4, width=32), min_size=1),
    st.sampled_from([0.3, 0.8, 5.0, None]),
)
def test_normalise_and_clip_agrees_with_the_oracle(history, batch, clip):
    assume(statistics.pstdev(history) > 1e-3)
    ours = normalise_and_clip(torch.tensor(batch, dtype=torch.float64), Moments().update(history), clip=clip)
    assert_close(ours, oracle.normalise_and_clip(batch, history, clip))


@pytest.mark.parametrize("history", [[], [3.0], [0.1] * 3, [0.1, 0.1, math.nextafter(0.1, 1)], [0.0] * 4])
def test_trap_16_without_variance_scores_are_neutral(history):
    assert torch.equal(normalise_and_clip(SCORES, Moments().update(history), clip=5.0), torch.zeros(2))


@given(st.floats(-1e6, 1e6), st.floats(1e-9, 1e3))
def test_trap_16_signs_never_flip_and_nothing_blows_up(mean, spread):
    moments = Moments().update([mean - spread, mean + spread])
    score_B = torch.tensor([mean - 2 * spread, mean, mean + 2 * spread])
    out = normalise_and_clip(score_B, moments, clip=5.0)
    assert torch.isfinite(out).all() and out.abs().max() <= 5.0
    assert out[0] <= out[1] <= out[2]
    assert out[0] <= 0 <= out[2]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_normalised_scores_do_not_depend_on_the_scores_unit(scale):
    values = [1.0, 2.0, 6.0]
    scaled = [scale * (value - 7.0) for value in values]
    plain = normalise_and_clip(torch.tensor(values), Moments().update(values), clip=None)
    assert_close(normalise_and_clip(torch.tensor(scaled), Moments().update(scaled), clip=None), plain)


@pytest.mark.parametrize("clip", [0.0, -1.0, NAN])
def test_clip_must_be_positive(clip):
    assert_refused("clip", normalise_and_clip, SCORES, Moments(), clip=clip)


def test_trap_1_the_score_lands_on_the_last_response_token():
    assert torch.equal(place_on_last_token(SCORES, MASK), torch.tensor([[0.0, 0.0, 4.0], [-1.0, 0.0, 0.0]]))


def test_trap_6_an_empty_response_gets_no_reward():
    mask = torch.tensor([[False, False]])
    nothing = torch.full((1, 2), NAN)
    assert torch.equal(place_on_last_token(torch.ones(1), mask), torch.zeros(1, 2))
    assert torch.equal(token_rewards(torch.ones(1), nothing, nothing, mask, kl_coefficient=0.1), torch.zeros(1, 2))


def test_token_rewards_by_hand():
    # eta 0.1; log ratios: 0.5, -1, 0 and 2.
    expected = [[-0.1 * 0.5, -0.1 * -1.0, 4.0 - 0.1 * 0.0], [-1.0 - 0.1 * 2.0, 0.0, 0.0]]
    assert_close(token_rewards(SCORES, OLD, REFERENCE, MASK, kl_coefficient=0.1), expected)
    dense = torch.tensor([[1.0, 0.0, 3.0], [2.0, NAN, NAN]])
    expected = [[1.0 - 0.05, 0.1, 3.0 + 4.0], [2.0 - 1.2, 0.0, 0.0]]
    assert_close(token_rewards(SCORES, OLD, REFERENCE, MASK, kl_coefficient=0.1, dense=dense), expected)


def test_eta_0_is_the_score_at_the_last_token():
    shaped = token_rewards(SCORES, OLD, REFERENCE, MASK, kl_coefficient=0.0)
    assert torch.equal(shaped, place_on_last_token(SCORES, MASK))


def test_trap_15_the_kl_in_the_reward_is_detached():
    old, score_B = OLD.clone().requires_grad_(), SCORES.clone().requires_grad_()
    token_rewards(score_B, old, REFERENCE, MASK, kl_coefficient=0.1).sum().backward()
    assert old.grad is None
    assert torch.equal(score_B.grad, torch.ones(2))


@given(ragged(3), st.floats(0, 1))
def test_token_rewards_agree_with_the_oracle(columns, eta):
    old, reference, dense = columns
    score_B = torch.linspace(-3, 3, len(old), dtype=torch.float64)
    ours = token_rewards(score_B, pad(old), pad(reference), mask_of(old), kl_coefficient=eta, dense=pad(dense))
    rows = zip(score_B.tolist(), old, reference, dense, strict=True)
    assert_close(ours, pad([oracle.token_rewards(s, o, r, eta, d) for s, o, r, d in rows], fill=0.0))


@given(ragged(3))
def test_trap_3_padding_order_and_neighbours_change_nothing(columns):
    def shaped(t, mask):
        # The score of a row is its own first entry, so that it moves with the row.
        return token_rewards(t[2][:, 0], t[0], t[1], mask, kl_coefficient=0.05, dense=t[2])

    assert_rows_are_independent(shaped, columns)
    moments = Moments().update([1.0, 4.0])
    assert_rows_are_independent(lambda t, mask: rolling_returns(t[0], mask, gamma=0.7), columns)
    assert_rows_are_independent(lambda t, mask: scale_rewards(t[0], mask, moments), columns)


def test_missing_eos_penalty_falls_on_truncated_responses_only():
    penalty_B = missing_eos_penalty(torch.tensor([True, False]), penalty=2)
    assert torch.equal(penalty_B, torch.tensor([-2.0, 0.0]))
    assert penalty_B.dtype == torch.float32


def test_length_penalty_by_hand():
    # Three tokens are free: 0, 0 and 2 above, at 0.5 each.
    penalty_B = length_penalty(torch.tensor([0, 3, 5]), coefficient=0.5, free=3)
    assert torch.equal(penalty_B, torch.tensor([0.0, 0.0, -1.0]))
    assert penalty_B.dtype == torch.float32
    assert torch.equal(length_penalty(torch.tensor([0, 3, 5]), coefficient=0.0, free=0), torch.zeros(3))


@given(st.lists(st.integers(0, 4096), min_size=1), st.integers(0, 4096), st.sampled_from([0.0, 0.25, 2.0]))
def test_length_penalty_agrees_with_a_scalar_loop(lengths, free, coefficient):
    expected = [-coefficient * max(0, length - free) for length in lengths]
    assert torch.equal(
        length_penalty(torch.tensor(lengths), coefficient=coefficient, free=free), torch.tensor(expected)
    )


def test_rolling_returns_by_hand():
    # gamma 0.5; the second row starts again from 0.
    rewards = torch.tensor([[1.0, 2.0, -4.0], [8.0, NAN, NAN]])
    expected = [[1.0, 0.5 * 1.0 + 2.0, 0.5 * 2.5 - 4.0], [8.0, 0.0, 0.0]]
    assert_close(rolling_returns(rewards, MASK, gamma=0.5), expected)


@given(ragged(1), unit)
def test_rolling_returns_agree_with_a_scalar_loop(columns, gamma):
    (rows,) = columns
    expected = []
    for row in rows:
        rolling, sums = 0.0, []
        for reward in row:
            rolling = gamma * rolling + reward
            sums.append(rolling)
        expected.append(sums)
    assert_close(rolling_returns(pad(rows), mask_of(rows), gamma=gamma), pad(expected, fill=0.0))


@given(ragged(1))
def test_rolling_returns_at_gamma_0_are_the_rewards_and_at_gamma_1_their_running_sum(columns):
    rewards, mask = pad(columns[0]), mask_of(columns[0])
    assert torch.equal(rolling_returns(rewards, mask, gamma=0.0), zero_masked(rewards, mask))
    running = zero_masked(zero_masked(rewards, mask).cumsum(dim=1), mask)
    assert_close(rolling_returns(rewards, mask, gamma=1.0), running)


def test_scale_rewards_by_hand_subtracts_no_mean():
    # History 1, 5: mean 3, std 2.
    rewards = torch.tensor([[1.0, 0.0, -4.0], [3.0, NAN, NAN]])
    assert_close(scale_rewards(rewards, MASK, Moments().update([1.0, 5.0])), [[0.5, 0.0, -2.0], [1.5, 0.0, 0.0]])


@given(ragged(1), st.sampled_from([2.0**-10, 2.0**10]))
def test_scaled_rewards_do_not_depend_on_the_rewards_unit(columns, scale):
    rewards, mask = pad(columns[0]), mask_of(columns[0])

    def scaled(r):
        return scale_rewards(r, mask, Moments().update(rolling_returns(r, mask, gamma=0.9)[mask].tolist()))

    for factor in (1.0, scale):  # beside zeros, the smallest float32 numbers have no variance
        assume(Moments().update(rolling_returns(factor * rewards, mask, gamma=0.9)[mask].tolist()).varies)
    assert_close(scaled(scale * rewards), scaled(rewards))


@pytest.mark.parametrize("history", [[], [3.0], [0.1] * 3, [0.1, 0.1, math.nextafter(0.1, 1)], [0.0] * 4])
def test_trap_16_without_variance_rewards_stay_as_they_are(history):
    rewards = torch.tensor([[1.0, 0.0, -4.0], [3.0, NAN, NAN]])
    assert torch.equal(scale_rewards(rewards, MASK, Moments().update(history)), zero_masked(rewards, MASK))


def test_sources_by_hand():
    old = {"easy": Moments().update([1.0]), "idle": Moments().update([9.0])}
    moments = update_by_source(old, [3.0, 10.0, 14.0], ["easy", "hard", "hard"])
    assert moments == {
        "easy": Moments().update([1.0, 3.0]),
        "idle": old["idle"],
        "hard": Moments().update([10.0, 14.0]),
    }
    assert set(old) == {"easy", "idle"}, "the moments that came in stay as they were"
    # easy: mean 2, std 1; hard: mean 12, std 2.
    score_B = torch.tensor([3.0, 10.0, 20.0])
    assert_close(normalise_by_source(score_B, ["easy", "hard", "hard"], moments, clip=None), [1.0, -1.0, 4.0])
    assert_close(normalise_by_source(score_B, ["easy", "hard", "hard"], moments, clip=1.5), [1.0, -1.0, 1.5])


sourced = st.lists(st.tuples(st.floats(-4, 4, width=32), st.sampled_from("abc")), min_size=1, max_size=8)


@given(sourced, st.randoms(use_true_random=False))
def test_sources_do_not_touch_each_other(batch, random):
    values, sources = map(list, zip(*batch, strict=True))
    score_B = torch.tensor(values, dtype=torch.float64)
    moments = update_by_source({}, values, sources)
    normal_B = normalise_by_source(score_B, sources, moments, clip=2.0)
    for source in set(sources):
        own = [i for i, name in enumerate(sources) if name == source]
        alone = Moments().update([values[i] for i in own])
        assert moments[source] == alone
        assert torch.equal(normal_B[own], normalise_and_clip(score_B[own], alone, clip=2.0))
    order = random.sample(range(len(values)), len(values))
    shuffled = normalise_by_source(score_B[order], [sources[i] for i in order], moments, clip=2.0)
    assert torch.equal(shuffled, normal_B[order])


def test_scores_that_differ_by_less_than_float32_can_divide_are_all_0():
    values = [0.0, 1.401298464324817e-45]
    moments = Moments().update(values)
    assert moments.std > 0 and not moments.varies
    assert normalise_and_clip(torch.tensor(values), moments, clip=3.0).tolist() == [0.0, 0.0]


@given(scores, scores)
def test_a_single_source_is_the_ordinary_history(first, second):
    moments = Moments().update(first).update(second)
    by_source = update_by_source(update_by_source({}, first, ["x"] * len(first)), second, ["x"] * len(second))
    assert by_source == ({"x": moments} if first or second else {})
    if second:
        ordinary = normalise_and_clip(torch.tensor(second), moments, clip=3.0)
        assert torch.equal(
            normalise_by_source(torch.tensor(second), ["x"] * len(second), by_source, clip=3.0), ordinary
        )


def test_normalise_advantages_by_hand():
    # Counted 1, 2, 6 and 3: mean 3, variance (4 + 1 + 9 + 0) / 4.
    advantages = torch.tensor([[1.0, 2.0, 6.0], [3.0, NAN, NAN]])
    s = math.sqrt(14 / 4)
    plain = [[-2 / s, -1 / s, 3 / s], [0.0, 0.0, 0.0]]
    assert_close(normalise_advantages(advantages, MASK, eps=1e-12), plain)
    # 3 / s is 1.60, -2 / s is -1.07.
    clipped = normalise_advantages(advantages, MASK, eps=1e-12, clip=1.0)
    assert_close(clipped, [[-1.0, -1 / s, 1.0], [0.0, 0.0, 0.0]])


@given(ragged(1))
def test_without_a_clip_advantages_are_whitened(columns):
    advantages, mask = pad(columns[0]), mask_of(columns[0])
    for clip in (None, math.inf):
        normal = normalise_advantages(advantages, mask, eps=1e-8, clip=clip)
        assert torch.equal(normal, whiten(advantages, mask, eps=1e-8))


@given(ragged(2))
def test_trap_3_padding_and_order_do_not_change_normalised_advantages(columns):
    def weighted(t, mask):
        return masked_sum(normalise_advantages(t[0], mask, eps=0.1, clip=5.0) * zero_masked(t[1], mask), mask)

    assert_only_counted_tokens_matter(weighted, columns)


def test_trap_16_constant_advantages_are_neutral():
    for constant in (0.0, 0.1, -1e4):
        normal = normalise_advantages(torch.full((2, 3), constant), MASK, eps=1e-8, clip=1.0)
        assert normal.abs().max() < 1.0 if constant else torch.equal(normal, torch.zeros(2, 3))


def test_wrong_arguments_of_the_optional_tricks():
    for bad in (-0.1, 1.1, NAN):
        assert_refused("gamma", rolling_returns, OLD, MASK, gamma=bad)
    assert_refused("rewards", rolling_returns, OLD[:, :2], MASK, gamma=1.0)
    assert_refused("rewards", scale_rewards, OLD[:, :2], MASK, Moments())
    assert_refused("mask", scale_rewards, OLD, MASK.int(), Moments())
    assert_refused("coefficient", length_penalty, torch.tensor([1]), coefficient=-1.0, free=0)
    assert_refused("free", length_penalty, torch.tensor([1]), coefficient=1.0, free=-1)
    assert_refused("length_B", length_penalty, torch.tensor([[1]]), coefficient=1.0, free=1)
    assert_refused("sources", update_by_source, {}, [1.0, 2.0], ["a"])
    assert_refused(r"scores\[1\]", update_by_source, {}, [1.0, NAN], ["a", "b"])
    assert_refused("sources", normalise_by_source, SCORES, ["a"], {"a": Moments()}, clip=1.0)
    assert_refused("moments", normalise_by_source, SCORES, ["a", "b"], {"a": Moments()}, clip=1.0)
    assert_refused("clip", normalise_by_source, SCORES, ["a", "a"], {"a": Moments()}, clip=0.0)
    assert_refused("clip", normalise_advantages, OLD, MASK, eps=0.1, clip=-1.0)
    assert_refused("eps", normalise_advantages, OLD, MASK, eps=0.0)


def test_wrong_arguments():
    assert_refused("penalty", missing_eos_penalty, torch.tensor([True]), penalty=-1.0)
    assert_refused("truncated_B", missing_eos_penalty, torch.tensor([1]), penalty=1.0)
    assert_refused("score_B", place_on_last_token, SCORES[:1], MASK)
    assert_refused("mask", place_on_last_token, SCORES, MASK.int())
    assert_refused("old_logprobs", token_rewards, SCORES, OLD[:, :2], REFERENCE, MASK, kl_coefficient=0.1)
    assert_refused("reference_logprobs", token_rewards, SCORES, OLD, REFERENCE[:1], MASK, kl_coefficient=0.1)
    assert_refused("dense", token_rewards, SCORES, OLD, REFERENCE, MASK, kl_coefficient=0.1, dense=SCORES)
    assert_refused("kl_coefficient", token_rewards, SCORES, OLD, REFERENCE, MASK, kl_coefficient=-0.1)
