"""The oracle's returns, baselines, masked statistics and shaping: hand-computed numbers, identities, closed forms."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from . import baselines, masked, returns, shaping
from .cases import cases

CASES = list(cases(150, seed=1))
near = pytest.approx


def close(found, expected, scale=1.0):
    assert found == near(expected, rel=1e-10, abs=1e-11 * max(scale, 1.0))


def responses():
    """(case, rewards, values, bootstrap, size of the numbers) of every response."""
    for case in CASES:
        for r, v, b in zip(case.rewards, case.values, case.bootstrap, strict=True):
            yield case, r, v, b, max(map(abs, [*r, *v, b]))


# Returns


def test_td_residuals_by_hand():
    # 1 + 0.5*20 - 10 = 1;  2 + 0.5*30 - 20 = -3;  4 + 0.5*8 - 30 = -22
    assert returns.td_residuals([1, 2, 4], [10, 20, 30], gamma=0.5, bootstrap=8) == [1, -3, -22]
    assert returns.td_residuals([], [], gamma=0.5, bootstrap=8) == []


def test_gae_by_hand():
    # delta = (1, -3, -22), gamma lambda = 0.25: 1 - 0.75 - 22/16 = -1.125;  -3 - 5.5 = -8.5;  -22
    found = returns.gae([1, 2, 4], [10, 20, 30], gamma=0.5, gae_lambda=0.5, bootstrap=8)
    assert found == [-1.125, -8.5, -22]


def test_k_step_by_hand():
    # returns: 1 + 0.5*2 + 0.25*30 = 9.5;  2 + 0.5*4 + 0.25*8 = 6;  4 + 0.5*8 = 8 (one step left)
    arguments = {"k": 2, "gamma": 0.5, "bootstrap": 8}
    assert returns.k_step_returns([1, 2, 4], [10, 20, 30], **arguments) == [9.5, 6, 8]
    # advantages: 1 + 0.5*(-3) = -0.5;  -3 + 0.5*(-22) = -14;  -22
    assert returns.k_step_advantages([1, 2, 4], [10, 20, 30], **arguments) == [-0.5, -14, -22]


def test_lambda_returns_by_hand():
    # t=0: half of R^1 = 1+10 = 11, a quarter of R^2 = 9.5, a quarter of R^3 = 1+1+1+1 = 4: 5.5 + 2.375 + 1 = 8.875
    # t=1: half of R^1 = 2+15 = 17, half of R^2 = 6: 11.5;  t=2: R^1 = 8
    found = returns.lambda_returns([1, 2, 4], [10, 20, 30], gamma=0.5, gae_lambda=0.5, bootstrap=8)
    assert found == [8.875, 11.5, 8]


def test_monte_carlo_and_whole_return_by_hand():
    # 1 + 1 + 1 + 8/8 = 4;  2 + 2 + 8/4 = 6;  4 + 8/2 = 8
    assert returns.monte_carlo([1, 2, 4], gamma=0.5, bootstrap=8) == [4, 6, 8]
    assert returns.whole_return([1, 2, 4], gamma=0.5, bootstrap=8) == 4
    assert returns.whole_return([1, 2, 4], gamma=1.0) == 7
    assert returns.whole_return([], gamma=1.0, bootstrap=8) == 0


def test_without_a_bootstrap_nothing_follows_the_end():
    one = [3], [1]
    assert returns.td_residuals(*one, gamma=1.0) == returns.gae(*one, gamma=1.0, gae_lambda=1.0) == [2]
    assert returns.k_step_advantages(*one, k=2, gamma=1.0) == [2]
    assert returns.k_step_returns(*one, k=1, gamma=1.0) == [3]
    assert returns.lambda_returns(*one, gamma=1.0, gae_lambda=0.5) == [3]
    assert returns.monte_carlo([3], gamma=1.0) == [3] and returns.whole_return([3], gamma=1.0) == 3


def test_gae_limits():
    for case, r, v, b, scale in responses():
        at = {"gamma": case.gamma, "bootstrap": b}
        close(returns.gae(r, v, gae_lambda=0.0, **at), returns.td_residuals(r, v, **at), scale)
        baseline = [g - x for g, x in zip(returns.monte_carlo(r, **at), v, strict=True)]
        close(returns.gae(r, v, gae_lambda=1.0, **at), baseline, 30 * scale)


def test_gae_is_its_recursion_and_the_weighted_mean_of_k_step_advantages():
    for case, r, v, b, scale in responses():
        at = {"gamma": case.gamma, "bootstrap": b}
        lam, n = case.gae_lambda, len(r)
        found = returns.gae(r, v, gae_lambda=lam, **at)
        following = 0.0
        for t, delta in reversed(list(enumerate(returns.td_residuals(r, v, **at)))):
            following = delta + case.gamma * lam * following
            close(found[t], following, 30 * scale)
        by_k = [returns.k_step_advantages(r, v, k=k, **at) for k in range(1, n + 1)]
        for t in range(n):
            # A row of the infinite sum in which all k >= n - t give the same advantage.
            means = sum((1 - lam) * lam ** (k - 1) * by_k[k - 1][t] for k in range(1, n - t))
            close(found[t], means + lam ** (n - t - 1) * by_k[n - t - 1][t], 30 * scale)


def test_lambda_returns_are_gae_plus_values():
    for case, r, v, b, scale in responses():
        at = {"gamma": case.gamma, "gae_lambda": case.gae_lambda, "bootstrap": b}
        sums = [a + x for a, x in zip(returns.gae(r, v, **at), v, strict=True)]
        close(returns.lambda_returns(r, v, **at), sums, 30 * scale)


def test_k_step_identities():
    for case, r, v, b, scale in responses():
        at = {"gamma": case.gamma, "bootstrap": b}
        for k in (1, 2, case.k):
            found = returns.k_step_advantages(r, v, k=k, **at)
            close(found, [x - y for x, y in zip(returns.k_step_returns(r, v, k=k, **at), v, strict=True)], 30 * scale)
        assert returns.k_step_advantages(r, v, k=1, **at) == returns.td_residuals(r, v, **at)
        assert returns.k_step_returns(r, v, k=100, **at) == returns.monte_carlo(r, **at)
        assert returns.monte_carlo(r, **at)[:1] == ([returns.whole_return(r, **at)] if r else [])


# Masked statistics and baselines


def test_masked_by_hand():
    assert masked.zero_masked([[1, 2], []], width=3) == [[1, 2, 0], [0, 0, 0]]
    assert masked.masked_sum([[1, 2], [], [6]]) == 9
    assert masked.masked_mean([[1, 2], [], [6]]) == 3  # not the mean of 1.5 and 6
    assert masked.masked_mean([[], []]) == 0 and masked.variance([]) == 0
    assert masked.last_token(3) == [False, False, True]
    assert masked.place_on_last_token(5, 3) == [0, 0, 5]
    assert masked.place_on_last_token(5, 0) == []
    assert masked.spread([5, 6, 7], [2, 0, 1]) == [[5, 5], [], [7]]


def test_whiten_by_hand():
    # mean 3, deviations -2, -1, 3: variance (4 + 1 + 9) / 3 = 14/3; with eps = 1/3 the root is sqrt(5)
    root = math.sqrt(5)
    close(masked.whiten([[1, 2], [], [6]], eps=1 / 3)[2], [3 / root])
    # 3 / sqrt(5) = 1.34 is clipped to 1.2, -2 / sqrt(5) = -0.89 is not
    found = masked.normalise_advantages([[1, 2], [], [6]], eps=1 / 3, clip=1.2)
    close(found[0], [-2 / root, -1 / root])
    assert found[1:] == [[], [1.2]]


def test_whitened_advantages_have_mean_0_and_variance_1():
    for case in CASES:
        values = masked.flat(masked.whiten(case.advantages, eps=1e-12))
        if masked.std(masked.flat(case.advantages)) > 1e-5:
            assert masked.mean(values) == near(0, abs=1e-10)
            assert masked.variance(values) == near(1, rel=0.02)
        else:
            assert values == [0.0] * case.tokens


def test_std_is_zero_for_equal_numbers_only():
    assert masked.std([0.1] * 7) == 0 and masked.std([1 / 3] * 10) == 0
    assert masked.std([0.1, 0.1 + 2**-56]) > 0


def test_baselines_by_hand():
    scores, groups = [1.0, 5.0, 2.0, 4.0, 9.0], [7, 7, 3, 3, 7]
    assert baselines.batch_mean(scores) == [4.2] * 5  # 21/5
    # group 7: (5+9)/2, (1+9)/2, (1+5)/2; group 3: the other one
    assert baselines.leave_one_out(scores, groups) == [7, 5, 4, 2, 3]
    assert baselines.group_mean(scores, groups) == [5, 5, 3, 3, 5]
    # group 7: sqrt((16 + 0 + 16)/3); group 3: 1
    wide = math.sqrt(32 / 3)
    close(baselines.group_std(scores, groups), [wide, wide, 1, 1, wide])
    close(baselines.group_normalise(scores, groups), [-4 / wide, 0, -1, 1, 4 / wide])
    assert baselines.group_normalise([0.1] * 3, [1, 1, 1]) == [0, 0, 0]
    with pytest.raises(ValueError, match="group 3"):
        baselines.leave_one_out([1, 2, 3], [7, 7, 3])


def test_leave_one_out_is_the_group_mean_stretched():
    # R_i - b_i = n/(n-1) (R_i - group mean)
    for case in CASES:
        scores, groups = case.scores, [5] * len(case.scores)
        if len(scores) < 2:
            continue
        factor = len(scores) / (len(scores) - 1)
        left = [x - b for x, b in zip(scores, baselines.leave_one_out(scores, groups), strict=True)]
        right = [factor * (x - b) for x, b in zip(scores, baselines.batch_mean(scores), strict=True)]
        close(left, right, max(map(abs, scores)))
        assert baselines.group_mean(scores, groups) == baselines.batch_mean(scores)


# Shaping


def test_moments_by_hand():
    # mean 3, m2 = 4 + 1 + 9 = 14, std = sqrt(14/3)
    found = shaping.moments([1, 2, 6])
    assert found == (3, 3, 14) and found.std == math.sqrt(14 / 3)
    assert shaping.moments([]) == (0, 0, 0) and shaping.moments([]).std == 0


def test_moments_are_those_of_chan_merged_batches():
    for case in CASES:
        parts = [*case.history.values(), case.scores]
        n, centre, m2 = 0, Fraction(0), Fraction(0)
        for part in parts:
            for x in map(Fraction, part):  # Welford, exactly
                n, before = n + 1, x - centre
                centre += before / n
                m2 += before * (x - centre)
        found = shaping.moments([x for part in parts for x in part])
        assert found == (n, near(float(centre), rel=1e-15), near(float(m2), rel=1e-15))


def test_normalise_and_clip_by_hand():
    # history 0, 2, 4: mean 2, std sqrt(8/3) = 1.633; (6-2)/1.633 = 2.449 -> 0.8; (2-2) = 0; (1-2)/1.633 = -0.612
    found = shaping.normalise_and_clip([6, 2, 1, -9], [0, 2, 4], clip=0.8)
    close(found, [0.8, 0, -1 / math.sqrt(8 / 3), -0.8])
    assert shaping.normalise_and_clip([6], [6], clip=1) == [0]
    assert shaping.normalise_and_clip([6, 7], [5, 5, 5], clip=1) == [0, 0]


def test_by_source_by_hand():
    seen = shaping.update_by_source({"a": [0, 2]}, [4, 10, 30], ["a", "b", "b"])
    assert seen == {"a": [0, 2, 4], "b": [10, 30]}
    # a: (4 - 2)/sqrt(8/3); b: mean 20, std 10
    close(shaping.normalise_by_source([4, 10, 30], ["a", "b", "b"], seen, clip=5), [2 / math.sqrt(8 / 3), -1, 1])
    close(shaping.normalise_by_source([40], ["b"], seen, clip=0.3), [0.3])


def test_penalties_by_hand():
    assert shaping.missing_eos_penalty([True, False], penalty=2) == [-2, 0]
    assert shaping.length_penalty([0, 4, 5, 9], coefficient=0.5, free=4) == [0, 0, -0.5, -2.5]


def test_token_rewards_by_hand():
    # -0.5*(-1+2) = -0.5;  -0.5*(-3+1) = +1, + score 4 on the last
    assert shaping.token_rewards(4, [-1, -3], [-2, -1], kl_coefficient=0.5) == [-0.5, 5]
    assert shaping.token_rewards(4, [-1, -3], [-2, -1], kl_coefficient=0.5, dense=[10, 20]) == [9.5, 25]
    assert shaping.token_rewards(4, [], [], kl_coefficient=0.5) == []


def test_token_rewards_sum_to_score_less_sequence_kl():
    for case in CASES:
        for score, old, ref in zip(case.scores, case.old_logprobs, case.reference_logprobs, strict=True):
            if old:
                found = shaping.token_rewards(score, old, ref, kl_coefficient=case.kl_coefficient)
                close(sum(found), score - case.kl_coefficient * (sum(old) - sum(ref)), abs(score))


def test_rolling_returns_by_hand_and_by_recursion():
    # 1;  0.5 + 2 = 2.5;  1.25 + 4 = 5.25
    assert shaping.rolling_returns([1, 2, 4], gamma=0.5) == [1, 2.5, 5.25]
    for case, r, _, _, scale in responses():
        running = 0.0
        for x, found in zip(r, shaping.rolling_returns(r, gamma=case.gamma), strict=True):
            running = case.gamma * running + x
            close(found, running, scale)


def test_rolling_returns_mirror_monte_carlo():
    for case, r, _, _, _ in responses():
        forward = shaping.rolling_returns(r[::-1], gamma=case.gamma)[::-1]
        assert forward == near(returns.monte_carlo(r, gamma=case.gamma))


def test_scale_rewards_by_hand():
    assert shaping.scale_rewards([3, -6], [1, 5, 3, 3]) == near([3 / math.sqrt(2), -6 / math.sqrt(2)])  # var 8/4
    assert shaping.scale_rewards([3, -6], [5, 5]) == [3, -6]
    assert shaping.scale_rewards([3], []) == [3]
