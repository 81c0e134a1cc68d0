"""Other people's numbers and routines for the same formulas.

The recorded numbers are those of rlax 0.1.9 (Apache-2.0): `multistep_test.py` for truncated GAE, to its tolerance of
1e-3, and `policy_gradients_test.py` for the clipped surrogate, to 1e-4. `selective_log_softmax` of TRL 1.16.0 (Apache-2.0)
was run on the logits below. scipy computes discounted sums as a filter and log-softmax by itself.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.signal import lfilter
from scipy.special import log_softmax, rel_entr

from ppomax.models.logprobs import Unembedded, token_kl, token_logprobs
from ppomax.rl.objectives import clipped_policy_loss
from ppomax.rl.returns import gae, monte_carlo

LENGTHS = (1, 7, 40)


@pytest.mark.parametrize(
    ("gae_lambda", "expected"),
    [
        (1.0, [-1.45118, -4.4557, 2.5396, 0.5249, -0.49]),
        (0.7, [-0.676979, -5.248167, 2.4846, 0.6704, -0.49]),
        (0.4, [0.56731, -6.042, 2.3431, 0.815, -0.49]),
    ],
)
def test_gae_is_that_of_rlax_for_a_cut_episode(gae_lambda: float, expected: list[float]) -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 1.0, 0.0, -0.5]]), torch.tensor([[1.0, 4.0, -3.0, -2.0, -1.0]])
    mask, bootstrap = torch.ones(1, 5, dtype=torch.bool), torch.tensor([-1.0])
    found = gae(rewards, values, mask, gamma=0.99, gae_lambda=gae_lambda, bootstrap=bootstrap)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("gae_lambda", "expected"),
    [(1.0, [3.0, 2.0, 1.0, 0.0]), (0.7, [2.2899, 1.73, 1.0, 0.0]), (0.4, [1.725, 1.46, 1.0, 0.0])],
)
def test_gae_is_that_of_rlax_for_an_episode_that_ends(gae_lambda: float, expected: list[float]) -> None:
    # The second row of rlax's case up to where its discount is 0, and the one step after it as a row of its own.
    rewards, values = torch.tensor([[0.0] * 4, [1.0, 0, 0, 0]]), torch.tensor([[-3.0, -2.0, -1.0, 0.0], [5.0, 0, 0, 0]])
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    bootstrap = torch.tensor([0.0, -1.0])
    found = gae(rewards, values, mask, gamma=0.9, gae_lambda=gae_lambda, bootstrap=bootstrap)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-3)
    assert float(found[1, 0]) == pytest.approx(-4.9, abs=1e-3)


@pytest.mark.parametrize(("sign", "expected"), [(1.0, -0.17117467), (-1.0, 0.19333333)])
def test_the_clipped_surrogate_is_that_of_rlax(sign: float, expected: float) -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 0.0], [-1.0, -2.0, -3.0]])
    old_logits = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 0.0], [-3.0, -2.0, -1.0]])
    actions = torch.tensor([[0], [1], [2]])
    new, old = (x.log_softmax(-1).gather(1, actions)[:, 0][None] for x in (logits, old_logits))
    advantages, mask = sign * torch.tensor([[0.3, 0.2, 0.1]]), torch.ones(1, 3, dtype=torch.bool)
    loss = clipped_policy_loss(new, old, advantages, mask, clip_ratio=0.2, denom=3.0)
    assert float(loss) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("length", LENGTHS)
def test_discounted_sums_are_scipys_filter(length: int, discount: float) -> None:
    draw = np.random.default_rng(length)
    rewards, values = draw.normal(size=length), draw.normal(size=length)
    mask = torch.ones(1, length, dtype=torch.bool)

    def backwards(x: np.ndarray, factor: float) -> np.ndarray:
        return lfilter([1.0], [1.0, -factor], x[::-1])[::-1]

    found = monte_carlo(torch.from_numpy(rewards)[None], mask, gamma=discount)[0].numpy()
    np.testing.assert_allclose(found, backwards(rewards, discount), atol=1e-12)
    delta = rewards + discount * np.append(values[1:], 0.0) - values
    both = torch.from_numpy(rewards)[None], torch.from_numpy(values)[None]
    found = gae(*both, mask, gamma=discount, gae_lambda=0.95)[0].numpy()
    np.testing.assert_allclose(found, backwards(delta, discount * 0.95), atol=1e-12)


def test_logprobs_and_exact_kl_are_scipys() -> None:
    draw = np.random.default_rng(0)
    states, other, weight = (draw.normal(size=shape).astype(np.float32) for shape in ((9, 4), (9, 4), (31, 4)))
    targets = draw.integers(0, 31, size=9)
    log_p, log_q = (log_softmax((x @ weight.T).astype(np.float64), axis=-1) for x in (states, other))
    tensors = [torch.from_numpy(x) for x in (states, other, weight)]
    found = token_logprobs(tensors[0], tensors[2], None, torch.from_numpy(targets))
    np.testing.assert_allclose(found.numpy(), log_p[range(9), targets], atol=1e-5)
    kl = token_kl(Unembedded(tensors[0], tensors[2]), Unembedded(tensors[1], tensors[2]))
    np.testing.assert_allclose(kl.numpy(), rel_entr(np.exp(log_p), np.exp(log_q)).sum(-1), atol=1e-5)


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (1.0, [-4.430161, -2.2602406, -3.6512313, -0.4348555, -7.3842301]),
        (0.7, [-5.8557658, -2.7382753, -4.8706784, -0.3021894, -10.0726185]),
    ],
)
def test_the_gather_of_log_probs_is_that_of_trl(temperature: float, expected: list[float]) -> None:
    states, weight = (torch.sin(torch.arange(40.0)) * 4).view(5, 8), torch.eye(8)  # the states are the logits
    found = token_logprobs(states, weight, None, torch.tensor([0, 7, 3, 3, 5]), temperature=temperature)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
