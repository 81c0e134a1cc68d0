from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from ppomax.rl.shaping import Moments, missing_eos_penalty, normalise_and_clip, place_on_last_token, token_rewards

from . import oracle
from .batches import NAN, assert_close, assert_refused, assert_rows_are_independent, mask_of, pad, ragged

MASK = torch.tensor([[True, True, True], [True, False, False]])
OLD = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, NAN, NAN]])
REFERENCE = torch.tensor([[-1.5, -1.0, -3.0], [-2.5, NAN, NAN]])
SCORES = torch.tensor([4.0, -1.0])

scores = st.lists(st.floats(-100, 100, width=32), max_size=8)


def test_moments_by_hand():
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


def test_normalise_and_clip_by_hand():
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


def test_missing_eos_penalty_falls_on_truncated_responses_only():
    penalty_B = missing_eos_penalty(torch.tensor([True, False]), penalty=2)
    assert torch.equal(penalty_B, torch.tensor([-2.0, 0.0]))
    assert penalty_B.dtype == torch.float32


def test_wrong_arguments():
    assert_refused("penalty", missing_eos_penalty, torch.tensor([True]), penalty=-1.0)
    assert_refused("truncated_B", missing_eos_penalty, torch.tensor([1]), penalty=1.0)
    assert_refused("score_B", place_on_last_token, SCORES[:1], MASK)
    assert_refused("mask", place_on_last_token, SCORES, MASK.int())
    assert_refused("old_logprobs", token_rewards, SCORES, OLD[:, :2], REFERENCE, MASK, kl_coefficient=0.1)
    assert_refused("reference_logprobs", token_rewards, SCORES, OLD, REFERENCE[:1], MASK, kl_coefficient=0.1)
    assert_refused("dense", token_rewards, SCORES, OLD, REFERENCE, MASK, kl_coefficient=0.1, dense=SCORES)
    assert_refused("kl_coefficient", token_rewards, SCORES, OLD, REFERENCE, MASK, kl_coefficient=-0.1)
