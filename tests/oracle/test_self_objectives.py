"""The oracle's losses and KLs: hand-computed numbers, identities, derivatives against finite differences."""

from __future__ import annotations

import math

import pytest

from . import critic, kl, policy, preference
from .cases import cases
from .differences import batch_slopes, slopes
from .masked import flat

CASES = list(cases(100, seed=2))
LOG2 = math.log(2)
near = pytest.approx


def agree(found, expected, distances=None):
    """Analytic against numeric slopes, entry by entry, away from kinks."""
    scale = max([1.0, *map(abs, flat(expected))])
    away = flat(distances) if distances is not None else [math.inf] * len(flat(found))
    for a, b, distance in zip(flat(found), flat(expected), away, strict=True):
        if distance > 1e-3:
            assert a == near(b, rel=1e-6, abs=1e-7 * scale)


# The policy


def test_policy_gradient_loss_by_hand():
    # -(-1*2 + -3*-1 + -2*4) / 2 = -(-2 + 3 - 8) / 2 = 3.5
    assert policy.policy_gradient_loss([[-1, -3], [], [-2]], [[2, -1], [], [4]], denom=2) == 3.5
    assert policy.d_policy_gradient_loss([[-1, -3], [], [-2]], [[2, -1], [], [4]], denom=2) == [[-1, 0.5], [], [-2]]


def test_surrogate_loss_by_hand():
    # ratios 2 and 1/2: -(2*3 + 0.5*(-4)) / 4 = -1
    assert policy.surrogate_loss([[-1 + LOG2, -1 - LOG2]], [[-1, -1]], [[3, -4]], denom=4) == near(-1)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "dual_clip", "expected", "slope"),
    [
        (LOG2, 3, None, 3.6, 0),  # min(6, 1.2*3)
        (LOG2, -3, None, -6, -6),  # min(-6, -3.6): the way back stays open
        (-LOG2, 3, None, 1.5, 1.5),  # min(1.5, 2.4)
        (-LOG2, -3, None, -2.4, 0),  # min(-1.5, 0.8*-3)
        (2 * LOG2, -3, 3, -9, 0),  # max(min(-12, -3.6), 3*-3)
        (LOG2, -3, 3, -6, -6),  # max(-6, -9)
        (2 * LOG2, 3, 3, 3.6, 0),  # dual clip acts on A < 0 only
        (0, 5, None, 5, 5),
        (0, 0, 3, 0, 0),
    ],
)
def test_clipped_policy_loss_by_hand(log_ratio, advantage, dual_clip, expected, slope):
    options = {"clip_ratio": 0.2, "denom": 2, "dual_clip": dual_clip, "weights": [[0.5]]}
    batch = [[-1 + log_ratio]], [[-1]], [[advantage]]
    assert policy.clipped_policy_loss(*batch, **options) == near(-0.5 * expected / 2)
    assert policy.d_clipped_policy_loss(*batch, **options) == [[near(-0.5 * slope / 2)]]


def test_policy_slopes():
    for case in CASES:
        batch = case.logprobs, case.old_logprobs, case.advantages
        clips = {"clip_ratio": case.clip_ratio, "dual_clip": case.dual_clip}
        clipped = {**clips, "denom": case.denom, "weights": case.entropies}
        agree(
            policy.d_clipped_policy_loss(*batch, **clipped),
            batch_slopes(lambda x, b=batch, o=clipped: policy.clipped_policy_loss(x, *b[1:], **o), batch[0]),
            policy.policy_kink_distance(*batch[:2], **clips),
        )
        agree(
            policy.d_surrogate_loss(*batch, denom=case.denom),
            batch_slopes(lambda x, b=batch, d=case.denom: policy.surrogate_loss(x, *b[1:], denom=d), batch[0]),
        )
        agree(
            policy.d_policy_gradient_loss(batch[0], batch[2], denom=case.denom),
            batch_slopes(lambda x, b=batch, d=case.denom: policy.policy_gradient_loss(x, b[2], denom=d), batch[0]),
        )
        agree(
            policy.d_nll_loss(batch[0], denom=case.denom),
            batch_slopes(lambda x, d=case.denom: policy.nll_loss(x, denom=d), batch[0]),
        )


def test_penalised_slopes():
    for case in CASES:
        batch = case.logprobs, case.old_logprobs, case.advantages
        for exact in (None, case.kl):
            options = {"kl_coefficient": case.kl_coefficient, "denom": case.denom, "kl": exact}
            agree(
                policy.d_penalised_policy_loss(*batch, **options),
                batch_slopes(lambda x, b=batch, o=options: policy.penalised_policy_loss(x, *b[1:], **o), batch[0]),
            )
        agree(
            policy.d_penalised_policy_loss_by_kl(case.kl, kl_coefficient=case.kl_coefficient, denom=case.denom),
            batch_slopes(lambda x, b=batch, o=options: policy.penalised_policy_loss(*b, **{**o, "kl": x}), case.kl),
        )


def test_policy_kink_distance_by_hand():
    # ratios 2, 1/2, 1, 3.5 and edges 0.8, 1.2, 3
    logprobs, old = [[LOG2, -LOG2, 0], [math.log(3.5)]], [[0, 0, 0], [0]]
    found = policy.policy_kink_distance(logprobs, old, clip_ratio=0.2, dual_clip=3)
    assert [near(row) for row in found] == [[0.8, 0.3, 0.2], [0.5]]
    assert policy.policy_kink_distance([[LOG2]], [[0]], clip_ratio=0.2) == [[near(0.8)]]


def test_slopes_at_an_edge_are_those_of_the_side_that_moves():
    assert math.exp(LOG2) == 2 and math.exp(-LOG2) == 0.5  # else no ratio would be exactly at an edge
    upper = policy.d_clipped_policy_loss([[LOG2]], [[0]], [[3]], clip_ratio=1.0, denom=1)
    lower = policy.d_clipped_policy_loss([[-LOG2]], [[0]], [[-3]], clip_ratio=0.5, denom=1)
    dual = policy.d_clipped_policy_loss([[LOG2]], [[0]], [[-3]], clip_ratio=0.5, dual_clip=2, denom=1)
    assert (upper, lower, dual) == ([[-6]], [[1.5]], [[6]])


def test_clipped_policy_loss_identities():
    for case in CASES:
        batch = case.logprobs, case.old_logprobs, case.advantages
        plain = policy.surrogate_loss(*batch, denom=case.denom)
        assert policy.clipped_policy_loss(*batch, clip_ratio=1e9, denom=case.denom) == near(plain, abs=1e-12)
        assert policy.clipped_policy_loss(*batch, clip_ratio=case.clip_ratio, denom=case.denom) >= plain - 1e-12
        assert policy.penalised_policy_loss(*batch, kl_coefficient=0.0, denom=case.denom) == plain
        same = batch[1], batch[1], batch[2]
        slope = policy.d_policy_gradient_loss(batch[0], batch[2], denom=case.denom)
        assert policy.d_clipped_policy_loss(*same, clip_ratio=case.clip_ratio, denom=case.denom) == slope


def test_penalised_policy_loss_by_hand():
    # ratio 2: -2*3 + 0.5*(2 - 1 - log 2), over 4; with the exact KL 0.25: -6 + 0.125
    batch = [[-1 + LOG2]], [[-1]], [[3]]
    assert policy.penalised_policy_loss(*batch, kl_coefficient=0.5, denom=4) == near((-6 + 0.5 * (1 - LOG2)) / 4)
    assert policy.penalised_policy_loss(*batch, kl_coefficient=0.5, denom=4, kl=[[0.25]]) == near(-5.875 / 4)


def test_the_penalty_is_unbiased_for_kl_of_old_and_new():
    for case in CASES:
        # Over the whole vocabulary, weighted by old: the value and, through d log pi, the gradient of KL(old || new).
        old, new = kl.log_softmax(case.logits_p), kl.log_softmax(case.logits_q)
        p = [math.exp(x) for x in old]
        mean = math.fsum(w * kl.k3(a, b) for w, a, b in zip(p, old, new, strict=True))
        assert mean == near(kl.full_kl(case.logits_p, case.logits_q), rel=1e-7, abs=1e-9)
        # d penalty / d log q_j = ratio_j - 1, chained with d log q_j / d z_i = [i = j] - q_i
        row = [new], [old], [[0.0] * len(p)]
        outer = policy.d_penalised_policy_loss(*row, kl_coefficient=1.0, denom=1)[0]
        by_z = [
            math.fsum(w * slope * ((i == j) - math.exp(b)) for j, (w, slope) in enumerate(zip(p, outer, strict=True)))
            for i, b in enumerate(new)
        ]
        assert kl.d_full_kl_by_q(case.logits_p, case.logits_q) == near(by_z, abs=1e-12)


def test_nll_and_entropy_by_hand():
    assert policy.nll_loss([[-1, -2], [], [-3]], denom=3) == 2
    assert policy.entropy([0, 0, 0, 0]) == near(2 * LOG2)
    # p = (3/4, 1/4): H = log 4 - (3/4) log 3
    assert policy.entropy([math.log(3), 0]) == near(2 * LOG2 - 0.75 * math.log(3))
    assert policy.entropy([1e4, 0]) == 0
    # rows sum to 3 and 5: min(3, 4) + min(5, 4) = 7
    assert policy.entropy_bonus([[1, 2], [5], []], denom=2, clip=4) == 3.5
    assert policy.entropy_bonus([[1, 2], [5], []], denom=2) == 4
    assert policy.d_entropy_bonus([[1, 2], [5], []], denom=2, clip=4) == [[0.5, 0.5], [0], []]
    assert policy.d_entropy_bonus([[1, 3]], denom=2, clip=4) == [[0.25, 0.25]]  # a tie: half of each side


def test_entropy_slopes():
    for case in CASES:
        agree([policy.d_entropy(case.logits_p)], [slopes(policy.entropy, case.logits_p)])
        clip = {"denom": case.denom, "clip": case.entropy_clip}
        expected = batch_slopes(lambda x, c=clip: policy.entropy_bonus(x, **c), case.entropies)
        distances = [[abs(sum(row) - (case.entropy_clip or math.inf))] * len(row) for row in case.entropies]
        agree(policy.d_entropy_bonus(case.entropies, **clip), expected, distances)


def test_importance_weights_and_ratio_statistics_by_hand():
    # ratios 2, 1/2, 1
    old, new = [[-1, -1], [], [-3]], [[-1 + LOG2, -1 - LOG2], [], [-3]]
    assert policy.importance_weights(new, old, cap=1.5) == [[1.5, near(0.5)], [], [1]]
    found = policy.ratio_statistics(new, old, clip_ratio=0.6)
    # |2 - 1| > 0.6, |1/2 - 1| is not; (2 - 1 - log 2) + (1/2 - 1 + log 2) = 1/2
    assert found == (1, near(0.5), near(2))
    low = policy.ratio_statistics([[-3, -2]], [[-2, -2]], clip_ratio=0.6)
    assert low == (1, near(math.exp(-1)), 1)  # 1/e - 1 = -0.63 is clipped; 1/e - 1 + 1
    assert policy.ratio_statistics([[LOG2]], [[0]], clip_ratio=1.0).clipped == 0  # at the edge is not beyond it
    assert policy.ratio_statistics([[]], [[]], clip_ratio=0.2) == (0, 0, 0)


# The critic


def test_value_loss_by_hand():
    # no clip: (3-1)^2 + (0-1)^2 = 5, over 2
    assert critic.value_loss([[3, 0]], [[1, 1]], denom=2) == 2.5
    # V=3 held to 1+0.5: max(4, 0.25) = 4.  V=0 held to 1-0.5: max(1, 0.25) = 1
    assert critic.value_loss([[3, 0]], [[1, 1]], denom=2, old_values=[[1, 1]], clip=0.5) == 2.5
    # V=3, R=3, old=1: max(0, (1.5-3)^2) = 2.25, and no slope: the value has gone far enough
    batch = [[3]], [[3]]
    assert critic.value_loss(*batch, denom=1, old_values=[[1]], clip=0.5) == 2.25
    assert critic.d_value_loss(*batch, denom=1, old_values=[[1]], clip=0.5) == [[0]]
    assert critic.d_value_loss([[3]], [[1]], denom=2, old_values=[[1]], clip=0.5) == [[2]]


def test_value_kinks_by_hand():
    # V=3, old=1, R=2.25: errors 0.75 and 1.5-2.25 = -0.75 tie: half of 2*0.75
    tie = {"old_values": [[1]], "clip": 0.5}
    assert critic.d_value_loss([[3]], [[2.25]], denom=1, **tie) == [[0.75]]
    assert critic.value_kink_distance([[3]], [[2.25]], **tie) == [[0]]
    # within the clip only its edge is a kink: 0.5 - 0.125; outside, errors 0.5 and 2, and 2.5 from the edge
    assert critic.value_kink_distance([[0.875]], [[9]], **tie) == [[0.375]]
    assert critic.value_kink_distance([[4]], [[3.5]], **tie) == [[1.5]]
    assert critic.value_kink_distance([[-2]], [[-1.5]], **tie) == [[1.5]]  # the mirror image about old = 1
    # the edge itself belongs to the inside
    assert critic.d_value_loss([[1.5]], [[9]], denom=1, **tie) == [[-15]]
    assert critic.value_kink_distance([[1.5]], [[9]], **tie) == [[0]]


def test_value_slopes_and_bounds():
    for case in CASES:
        batch = case.values, case.returns
        plain = critic.value_loss(*batch, denom=case.denom)
        agree(
            critic.d_value_loss(*batch, denom=case.denom),
            batch_slopes(lambda x, b=batch, d=case.denom: critic.value_loss(x, b[1], denom=d), case.values),
        )
        clip = case.value_clip
        if clip is None:
            continue
        options = {"old_values": case.old_values, "clip": clip}
        assert critic.value_loss(*batch, denom=case.denom, **options) >= plain - 1e-12
        agree(
            critic.d_value_loss(*batch, denom=case.denom, **options),
            batch_slopes(
                lambda x, b=batch, d=case.denom, o=options: critic.value_loss(x, b[1], denom=d, **o), case.values
            ),
            critic.value_kink_distance(*batch, **options),
        )
        far = {"old_values": case.old_values, "clip": 1e9}
        assert critic.value_loss(*batch, denom=case.denom, **far) == near(plain)


def test_explained_variance_by_hand():
    # R = 0, 2, 4: variance 8/3; R - V = 0, 1, 2: variance 2/3
    assert critic.explained_variance([[0, 1], [2]], [[0, 2], [4]]) == near(0.75)
    assert critic.explained_variance([[1, 3], [5]], [[0, 2], [4]]) == 1  # a constant offset is not seen
    assert math.isnan(critic.explained_variance([[1, 2]], [[3, 3]]))


# Divergences


def test_estimators_by_hand():
    # p = 1/2, q = 1/4: log p - log q = log 2
    p, q = -LOG2, -2 * LOG2
    assert kl.k1(p, q) == near(LOG2) and kl.k2(p, q) == near(LOG2**2 / 2) and kl.k3(p, q) == near(0.5 - 1 + LOG2)
    # k2 of both tokens (log 2 each): log(2)^2 / 2 * 2, over 4
    assert kl.kl_loss([[p], [p]], [[q], [q]], estimator="k2", denom=4) == near(LOG2**2 / 4)


def test_full_kl_by_hand():
    # p = (1/2, 1/2), q = (3/4, 1/4): log(2/3)/2 + log(2)/2 = log(4/3)/2
    assert kl.full_kl([0, 0], [math.log(3), 0]) == near(math.log(4 / 3) / 2)
    assert kl.full_kl([500, 0], [500, 0]) == 0


def test_kl_slopes():
    for case in CASES:
        pair = case.logprobs, case.reference_logprobs
        for estimator in kl.ESTIMATORS:
            options = {"estimator": estimator, "denom": case.denom}
            expected = batch_slopes(lambda x, q=pair[1], o=options: kl.kl_loss(x, q, **o), pair[0])
            agree(kl.d_kl_loss(*pair, **options), expected)
        p, q = case.logits_p, case.logits_q
        agree([kl.d_full_kl(p, q)], [slopes(lambda x, q=q: kl.full_kl(x, q), p)])
        agree([kl.d_full_kl_by_q(p, q)], [slopes(lambda x, p=p: kl.full_kl(p, x), q)])


def test_estimators_agree_in_expectation():
    for case in CASES:
        p, q = kl.log_softmax(case.logits_p), kl.log_softmax(case.logits_q)
        exact = kl.full_kl(case.logits_p, case.logits_q)
        assert exact >= -1e-12
        for estimator in (kl.k1, kl.k3):
            mean = math.fsum(math.exp(a) * estimator(a, b) for a, b in zip(p, q, strict=True))
            assert mean == near(exact, rel=1e-7, abs=1e-9)
        assert all(kl.k3(a, b) >= 0 for a, b in zip(p, q, strict=True))


def test_coefficients_by_hand():
    # KL 9 of 6: +0.5, held to +0.2: 0.1 (1 + 0.2*64/1280) = 0.101;  5.4 of 6: -0.1: 0.1 (1 - 0.005)
    at = {"target": 6, "horizon": 1280, "samples": 64}
    assert kl.adaptive_coefficient(0.1, 9, **at) == near(0.101)
    assert kl.adaptive_coefficient(0.1, 5.4, **at) == near(0.0995)
    assert kl.adaptive_coefficient(0.1, 0, **at) == near(0.099)
    # target 6: below 4 halved, above 9 doubled, the edges unchanged
    found = [kl.penalty_coefficient(0.1, x, target=6) for x in (3.9, 4, 6, 9, 9.1)]
    assert found == [0.05, 0.1, 0.1, 0.1, 0.2]
    with pytest.raises(ValueError, match="nan"):
        kl.penalty_coefficient(0.1, math.nan, target=6)


# Preferences


def test_ranking_by_hand():
    # differences log 3 and -log 3 - 0: -log(3/4) - 2 log(1/4), over 2
    expected = (math.log(4 / 3) + 2 * math.log(4)) / 2
    assert preference.ranking_loss([math.log(3), 0], [0, math.log(3)], denom=2, weights=[1, 2]) == near(expected)
    assert preference.ranking_loss([1 + LOG2], [LOG2], denom=1, margin=[1]) == near(LOG2)
    assert preference.ranking_loss([0], [1000], denom=1) == 1000
    # right, tied, wrong, right: 2.5 of 4; weighted 1, 1, 2, 0: 1.5 of 4
    assert preference.ranking_accuracy([2, 1, 0, 5], [1, 1, 1, 4]) == 0.625
    assert preference.ranking_accuracy([2, 1, 0, 5], [1, 1, 1, 4], weights=[1, 1, 2, 0]) == 0.375


def test_ranking_slopes():
    for case in CASES:
        options = {"denom": case.denom, "margin": case.margins, "weights": case.pair_weights}
        pair = case.chosen, case.rejected
        by_chosen = slopes(lambda x, r=pair[1], o=options: preference.ranking_loss(x, r, **o), pair[0])
        by_rejected = slopes(lambda x, c=pair[0], o=options: preference.ranking_loss(c, x, **o), pair[1])
        agree([preference.d_ranking_loss(*pair, **options)], [by_chosen])
        agree([preference.d_ranking_loss_by_rejected(*pair, **options)], [by_rejected])
