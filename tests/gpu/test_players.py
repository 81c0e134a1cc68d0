"""The same numbers and gradients on the GPU as on the processor, whole, by adapters and above a shared trunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models.architectures import CONFIGS, FLOAT32, policy, ragged, saved_once, scalar
from torch import Tensor
from torch._dynamo.utils import counters

from ppomax.config import ModelConfig
from ppomax.engine.randomness import uniforms_for
from ppomax.models.load import Compute
from ppomax.models.lora import Lora
from ppomax.models.players import Policy
from ppomax.models.shard import shard
from ppomax.rollout.sampler import Distribution, sample
from ppomax.types import token_batch

GPU = Compute(torch.device("cuda"), torch.float32)
HALF = Compute(torch.device("cuda"), torch.bfloat16)
WHERE = (GPU, FLOAT32)
LAYOUTS: dict[str, dict[str, Any]] = {
    "full": {}, "checkpointing": {"checkpointing": True}, "lora": {"lora": Lora(2, 4.0)}, "upper layer": {"train_layers": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The directory of a family's model, made once."""
    return saved_once(tmp_path_factory.mktemp)


def readings(player: Policy, rows: int = 5) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs and entropies of a ragged batch, and the gradients of their sum."""
    batch = token_batch(*ragged(rows), device=str(player.device))
    scores = player(batch, temperature=0.7, entropy=True)
    (scores.logprobs_BT.sum() + scores.entropy_BT.sum()).backward()
    slopes = {name: p.grad.cpu() for name, p in player.trained_parameters().items() if p.grad is not None}
    return torch.stack([scores.logprobs_BT, scores.entropy_BT]).detach().cpu(), slopes


def expect_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and expected
    for name, slope in expected.items():
        assert (found[name] - slope).norm() <= 1e-4 * slope.norm().clamp(min=1e-3), name


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_reads_and_learns_as_on_the_processor(family: str, directory: Callable[[str], str]) -> None:
    if family.startswith("gemma2"):
        pytest.skip("changes its logits after the unembedding, which is refused")
    (here, slopes), (there, expected) = (readings(policy(directory(family), c, trained=True)) for c in WHERE)
    torch.testing.assert_close(here, there, atol=2e-4, rtol=1e-4)
    expect_close(slopes, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_and_learns_as_on_the_processor(layout: str, lively: str) -> None:
    options = {"trained": True, **LAYOUTS[layout]}
    (here, slopes), (there, expected) = (readings(policy(lively, c, **options)) for c in WHERE)
    torch.testing.assert_close(here, there, atol=2e-4, rtol=1e-4)
    expect_close(slopes, expected)


def test_the_compiler_changes_nothing_but_rounding(lively: str) -> None:
    torch.compiler.reset()
    counters.clear()
    compiled = shard(policy(lively, GPU, trained=True), GPU, ModelConfig(compiled=True))
    for rows in (5, 3, 7):
        (found, slopes), (expected, plain) = readings(compiled, rows), readings(policy(lively, GPU, trained=True), rows)
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
        expect_close(slopes, plain)
        compiled.zero_grad()
    assert counters["stats"]["unique_graphs"] >= 1


def test_scores_are_those_of_the_processor_and_do_not_depend_on_the_batch(lively_reward: str) -> None:
    here, there = (scalar(lively_reward, c) for c in WHERE)
    prompts, responses = ragged(9)
    with torch.no_grad():
        together = here(token_batch(prompts, responses, device="cuda")).values_BT.cpu()
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            length = len(prompt) + len(response)
            alone = here(token_batch([prompt], [response], device="cuda")).values_BT.cpu()[0, :length]
            expected = there(token_batch([prompt], [response])).values_BT[0, :length]
            torch.testing.assert_close(alone, expected, atol=1e-4, rtol=1e-4)
            assert (together[i, :length] - alone).abs().max() < 1e-4


def test_bfloat16_stays_near_float32(lively: str) -> None:
    (half, _), (whole, _) = (readings(policy(lively, c, trained=True)) for c in (HALF, GPU))
    assert half.dtype == torch.float32
    assert (half - whole).abs().mean() < 0.05 * whole.abs().mean()


def drawn(player: Policy, max_rows: int, distribution: Distribution) -> list[Any]:
    prompts, _ = ragged(12, seed=4)
    uniforms_BR = uniforms_for(3, 0, range(12), [0] * 12, 16)
    return sample(player, prompts, uniforms_BR, distribution=distribution, eos_ids=[2], max_rows=max_rows)


WARPED = Distribution(0.8, top_p=0.9, top_k=40, repetition_penalty=1.2)


@pytest.mark.parametrize("distribution", [Distribution(0.7), WARPED])
def test_the_sampler_draws_what_it_draws_on_the_processor_whatever_stands_beside(
    lively: str, distribution: Distribution
) -> None:
    expected = drawn(policy(lively), 12, distribution)
    for rows in (12, 5, 1):
        found = drawn(policy(lively, GPU), rows, distribution)
        assert [one.ids for one in found] == [one.ids for one in expected]
        for one, other in zip(found, expected, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=2e-4)


def test_what_was_sampled_is_what_the_trainer_reads(lively: str) -> None:
    player = policy(lively, GPU)
    prompts, _ = ragged(12, seed=4)
    found = drawn(player, 12, Distribution(0.7))
    batch = token_batch(prompts, [one.ids for one in found], device="cuda")
    with torch.no_grad():
        read = player(batch, temperature=0.7).logprobs_BT.cpu()
    for row, prompt, one in zip(read, prompts, found, strict=True):
        assert row[len(prompt) : len(prompt) + len(one.ids)].tolist() == pytest.approx(one.logprobs, abs=2e-4)
