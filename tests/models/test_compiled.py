"""Compiled layers: the same numbers and gradients, few graphs for all lengths, and clear errors before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch._dynamo.utils import counters

from models.architectures import EOS, FLOAT32, policy, ragged, save_model, scalar
from models.test_packing import gradients, padded, several_per_prompt
from ppomax.config import ModelConfig, SFTConfig
from ppomax.engine import world
from ppomax.engine.randomness import uniforms_for
from ppomax.models.compiled import compile_layers
from ppomax.models.lora import Lora
from ppomax.models.players import Player, Policy
from ppomax.models.shard import shard
from ppomax.rollout.sampler import Distribution, sample
from ppomax.stages.checkpoint import player_of
from ppomax.types import SetupError, TokenBatch, token_batch

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def traced(player: Policy) -> Policy:
    """Compiled by a backend that needs no compiler, so that the graphs are real and the test is short."""
    compile_layers(player, backend="aot_eager")
    return player


def ready(player: Player) -> Player:
    """As every stage that trains has it."""
    return shard(player, FLOAT32, ModelConfig(compiled=True))


def assert_same_gradients(compiled: Policy, plain: Policy, batch: TokenBatch) -> None:
    (found, slopes), (expected, of_plain) = gradients(compiled, batch), gradients(plain, batch)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
    for name, slope in of_plain.items():
        torch.testing.assert_close(slopes[name], slope, atol=1e-4, rtol=1e-4, msg=name)
    for player in (compiled, plain):
        player.zero_grad()


def batches() -> list[TokenBatch]:
    """Of several widths and heights, one of them with prompts that rows share."""
    return [several_per_prompt(), *(token_batch(*ragged(rows=rows, seed=rows)) for rows in (4, 7, 2))]


@pytest.mark.parametrize(("packs", "options"), [(True, {}), (False, {"checkpointing": True})])
def test_numbers_and_gradients_are_those_of_the_layers_as_written(
    lively: str, packs: bool, options: dict[str, int]
) -> None:
    plain, compiled = policy(lively, trained=True, **options), traced(policy(lively, trained=True, **options))
    if not packs:
        plain, compiled = padded(plain), padded(compiled)
    for batch in batches():
        with torch.no_grad():
            torch.testing.assert_close(compiled(batch).logprobs_BT, plain(batch).logprobs_BT)
        assert_same_gradients(compiled, plain, batch)
    # Training and reading, each anew where an accident of the first batch (as many rows as prompts, say) was taken for
    # a rule: a number that does not depend on the three layers or the four shapes.
    assert 2 <= counters["stats"]["unique_graphs"] <= 5
    assert not counters["graph_break"]


def test_layers_with_adapters_share_their_graphs(lively: str) -> None:
    plain, compiled = (policy(lively, trained=True, lora=Lora(2, 4.0)) for _ in range(2))
    assert_same_gradients(traced(compiled), plain, several_per_prompt())
    # Two for three layers: nothing below the first one learns.
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_decoding_compiles_nothing(lively: str) -> None:
    compiled, plain = traced(policy(lively, trained=True)), policy(lively)
    uniforms_BR = uniforms_for(0, 0, range(2), [0] * 2, 6)
    found, expected = (
        sample(
            player, [[5, 6, 7], [8, 9]], uniforms_BR, distribution=Distribution(1.0), eos_ids=[EOS], max_rows=2,
            max_tokens=None, stop=None,
        )
        for player in (compiled, plain)
    )  # fmt: skip
    assert found == expected
    assert counters["stats"]["unique_graphs"] == 0


def test_the_real_compiler(lively: str) -> None:
    compiled, plain = ready(policy(lively, trained=True)), policy(lively, trained=True)
    assert_same_gradients(compiled, plain, several_per_prompt())
    assert counters["stats"]["unique_graphs"] == 1


def test_a_frozen_player_stays_as_written(lively_reward: str) -> None:
    frozen = ready(scalar(lively_reward))
    frozen(several_per_prompt())
    assert not frozen.compiled and counters["stats"]["unique_graphs"] == 0


def test_a_run_is_exported_and_replayed_as_written(lively: str) -> None:
    """A machine that only reads a run needs no compiler, and hooks look into layers that are not one kernel."""
    settings = SFTConfig(model=lively, compute=ModelConfig(compiled=True))
    player, _, _ = player_of(settings, "final", FLOAT32)
    player(several_per_prompt())
    assert not player.compiled and counters["stats"]["unique_graphs"] == 0


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_a_stack_without_layers_cannot_be_sharded(
    kind: Literal["zero2", "zero3"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = policy(save_model("gpt2", tmp_path), trained=True)
    monkeypatch.setattr(world, "size", lambda: 2)
    with pytest.raises(SetupError, match=f"compute.shard: found {kind} with GPT2Model.*; expected none"):
        shard(player, FLOAT32, ModelConfig(shard=kind))


def test_what_cannot_be_compiled_is_refused_before_the_first_step(
    lively: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SetupError, match="compiled: GPT2Model has no list of decoder layers"):
        ready(policy(save_model("gpt2", tmp_path_factory.mktemp("gpt2")), trained=True))
    with monkeypatch.context() as context, pytest.raises(SetupError, match="compiled: found True with 2 processes"):
        context.setattr(world, "size", lambda: 2)
        ready(policy(lively, trained=True))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SetupError, match=r"compiled: found no C\+\+ compiler, expected one of g\+\+"):
        ready(policy(lively, trained=True))
