"""One token by inversion of the cumulative distribution: its edges, its frequencies, its warpers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ppomax.engine.randomness import uniforms
from ppomax.rollout import sampler
from ppomax.rollout.sampler import Distribution

PLAIN = Distribution()
# The largest number that a stream gives: 1 − 2⁻²⁴.
HIGHEST = 0.99999994


def draw(
    logits_BV: Tensor, uniform_B: Tensor, distribution: Distribution, history_BS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The sampler's drawing, rows first, on a copy: it overwrites its logits."""
    return sampler.draw(logits_BV.T.clone(), uniform_B, distribution, history_BS)


def drawn(logits: Tensor, u: float, distribution: Distribution = PLAIN) -> int:
    return int(draw(logits[None], torch.tensor([u]), distribution)[0])


def test_the_token_is_where_the_cumulative_distribution_passes_the_uniform() -> None:
    # p = 1/8, 1/2, 1/4, 1/8: cumulative 0.125, 0.625, 0.875, 1.
    logits = torch.tensor([0.125, 0.5, 0.25, 0.125]).log()
    for u, token in [(0.0, 0), (0.12, 0), (0.13, 1), (0.62, 1), (0.63, 2), (0.87, 2), (0.88, 3), (HIGHEST, 3)]:
        assert drawn(logits, u) == token
    logprob = draw(logits[None], torch.tensor([0.5]), PLAIN)[1]
    assert float(logprob) == pytest.approx(-0.6931472, abs=1e-6)


@pytest.mark.parametrize("u", [0.0, HIGHEST])
@pytest.mark.parametrize("where", ["first", "last", "middle"])
def test_a_token_of_probability_zero_is_never_drawn(u: float, where: str) -> None:
    logits = torch.zeros(50)
    gone = {"first": slice(0, 20), "last": slice(30, 50), "middle": slice(1, 49)}[where]
    logits[gone] = float("-inf")
    token = drawn(logits, u)
    assert float(logits[token]) == 0.0
    assert token == (int((logits == 0).nonzero()[0]) if u == 0.0 else int((logits == 0).nonzero()[-1]))


@given(
    st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=40),
    st.integers(0, 2**24 - 1),
    st.sampled_from([1.0, 0.6, 0.05]),
)
@settings(max_examples=150, deadline=None)
def test_any_uniform_gives_a_token_that_can_occur(values: list[float], k: int, temperature: float) -> None:
    logits = torch.tensor([values])
    token, logprob = draw(logits, torch.tensor([k / 2**24]), Distribution(temperature))
    assert 0 <= int(token) < len(values)
    assert bool(torch.isfinite(logprob).all()) and float(logprob) <= 0
    exact = torch.log_softmax(logits / temperature, -1)[0, token]
    # softmax().log() keeps absolute 1e-5 down to where float32 probabilities lose digits.
    if float(exact) > -80:
        torch.testing.assert_close(logprob, exact, atol=1e-5, rtol=1e-5)


def test_a_large_vocabulary_has_no_hole_at_its_end() -> None:
    # 49,152 equal probabilities do not sum to 1 in float32; the last tokens are reached all the same.
    logits = torch.zeros(49_152)
    assert drawn(logits, 0.0) == 0 and drawn(logits, HIGHEST) == 49_151
    assert abs(drawn(logits, 0.5) - 24_576) <= 1


@pytest.mark.parametrize("size", [255, 256, 257, 1000, 1024])
def test_every_token_of_any_vocabulary_is_drawn_as_often_as_it_is_likely(size: int) -> None:
    # Blocks of 256 tokens, and the rest: a comb of uniforms finds every token, in order, its share of times.
    logits = torch.randn(size, generator=torch.Generator().manual_seed(size))
    n = 64 * size
    tokens, logprobs = draw(logits.expand(n, -1), (torch.arange(n) + 0.5) / n, PLAIN)
    assert bool((tokens.diff() >= 0).all())
    expected = torch.softmax(logits.double(), -1)
    torch.testing.assert_close((torch.bincount(tokens, minlength=size) / n).double(), expected, atol=2 / n, rtol=0)
    torch.testing.assert_close(logprobs.double(), expected.log()[tokens], atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_trap_08_frequencies_are_those_of_the_tempered_softmax(temperature: float) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(5)) * 1.5
    n = 40_000
    tokens, logprobs = draw(logits.expand(n, -1), uniforms(11, 3, size=n), Distribution(temperature))
    expected = torch.softmax(logits.double() / temperature, -1)
    counts = torch.bincount(tokens, minlength=12)
    assert float((n * expected).min()) > 5, "the test needs five expected draws in each cell"
    assert stats.chisquare(counts.numpy(), (n * expected).numpy()).pvalue > 1e-3
    torch.testing.assert_close(logprobs.double(), expected.log()[tokens], atol=1e-5, rtol=0)
    # The same test must notice a wrong temperature.
    wrong = torch.softmax(logits.double() / (temperature * 1.1), -1)
    assert stats.chisquare(counts.numpy(), (n * wrong).numpy()).pvalue < 1e-6


def processors(distribution: Distribution) -> LogitsProcessorList:
    """What `generate` would apply, in its order."""
    chain = LogitsProcessorList()
    if distribution.repetition_penalty is not None:
        chain.append(RepetitionPenaltyLogitsProcessor(distribution.repetition_penalty))
    chain.append(TemperatureLogitsWarper(distribution.temperature))
    if distribution.top_k is not None:
        chain.append(TopKLogitsWarper(distribution.top_k))
    if distribution.top_p is not None:
        chain.append(TopPLogitsWarper(distribution.top_p))
    return chain


@pytest.mark.parametrize(
    "distribution",
    [
        Distribution(0.7, top_p=0.8),
        Distribution(1.3, top_k=5),
        Distribution(1.0, repetition_penalty=1.4),
        Distribution(0.8, top_p=0.9, top_k=9, repetition_penalty=1.2),
        Distribution(0.8, top_k=1000),
        Distribution(0.6),
    ],
)
def test_trap_08_warped_distributions_are_those_of_generate(distribution: Distribution) -> None:
    seed = torch.Generator().manual_seed(9)
    logits = torch.randn(3, 60, generator=seed) * 2
    history = torch.randint(0, 60, (3, 10), generator=seed)
    expected = torch.softmax(processors(distribution)(history, logits.clone()), -1)
    # A fine comb of uniforms meets every token about as often as it is likely, and none that cannot occur.
    n = 4096
    comb = (torch.arange(n) + 0.5) / n
    for i in range(3):
        rows = logits[i].expand(n, -1)
        tokens, logprobs = draw(rows, comb, distribution, history[i].expand(n, -1))
        share = torch.bincount(tokens, minlength=60) / n
        torch.testing.assert_close(share, expected[i], atol=1.5 / n, rtol=0)
        torch.testing.assert_close(logprobs.exp(), expected[i][tokens], atol=1e-6, rtol=1e-5)


def test_padding_of_the_history_by_its_own_first_token_changes_no_penalty() -> None:
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(2))
    distribution = Distribution(repetition_penalty=2.0)
    comb = (torch.arange(512) + 0.5) / 512
    short, padded = torch.tensor([[4, 7, 9]]), torch.tensor([[4, 4, 4, 7, 9]])
    a, b = (draw(logits.expand(512, -1), comb, distribution, h.expand(512, -1)) for h in (short, padded))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_only_a_plain_temperature_is_not_warped() -> None:
    assert not Distribution(0.3).warped
    for warped in (Distribution(top_p=0.9), Distribution(top_k=1), Distribution(repetition_penalty=1.0)):
        assert warped.warped
