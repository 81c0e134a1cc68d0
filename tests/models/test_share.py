"""One trunk for all players: the same objects, refused by name where they differ."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from models.architectures import batch_of, policy, save_model, scalar
from ppomax.config import ModelConfig
from ppomax.engine.optimiser import Optimiser
from ppomax.models.players import Player
from ppomax.models.share import first_difference, share_frozen, share_trunk, twin
from ppomax.types import SetupError

LAYERS = 3


def lower_parameters(player: Player) -> dict[str, nn.Parameter]:
    """Embeddings and all layers but the uppermost, by name."""
    return {
        name: p
        for name, p in player.model.named_parameters()
        if "embed_tokens" in name or any(f"layers.{i}." in name for i in range(LAYERS - 1))
    }


@pytest.fixture
def change(lively: str) -> Player:
    """A policy whose trunk a test may damage."""
    return policy(lively, train_layers=1)


def test_lower_layers_become_the_same_objects(lively: str, lively_reward: str) -> None:
    first = policy(lively, train_layers=1, trained=True)
    reference, critic = policy(lively, train_layers=1), scalar(lively_reward, train_layers=1, trained=True)
    batch = batch_of()
    before = reference(batch).logprobs_BT, critic(batch).values_BT.detach()
    for other, role in ((reference, "reference"), (critic, "critic")):
        share_trunk(first, other, roles=("policy", role))
        theirs = lower_parameters(other)
        assert len(theirs) == 1 + 9 * (LAYERS - 1)
        for name, parameter in lower_parameters(first).items():
            assert theirs[name] is parameter, name
        ours, upper = dict(first.model.named_parameters()), f"layers.{LAYERS - 1}."
        for name, parameter in other.model.named_parameters():
            if upper in name or "model.norm" in name:
                assert parameter is not ours[name], name
    assert torch.equal(reference(batch).logprobs_BT, before[0])
    assert torch.equal(critic(batch).values_BT, before[1])


def test_the_tied_unembedding_follows_the_shared_embeddings(lively: str) -> None:
    first, other = policy(lively, train_layers=1), policy(lively, train_layers=1)
    share_trunk(first, other, roles=("policy", "reference"))
    shared = first.base.get_input_embeddings().weight
    assert other.base.get_input_embeddings().weight is shared
    assert other.model.get_output_embeddings().weight is shared


def test_an_untied_unembedding_stays_its_own(tmp_path: Path) -> None:
    folder = save_model("llama-untied", tmp_path)
    first, other = policy(folder, train_layers=1), policy(folder, train_layers=1)
    head = other.model.get_output_embeddings().weight
    share_trunk(first, other, roles=("policy", "reference"))
    assert other.model.get_output_embeddings().weight is head
    assert other.base.get_input_embeddings().weight is first.base.get_input_embeddings().weight


def test_one_trunk_serves_every_player(lively: str, lively_reward: str) -> None:
    first, critic = policy(lively, train_layers=1), scalar(lively_reward, train_layers=1)
    batch = batch_of()
    expected = critic(batch).values_BT
    share_trunk(first, critic, roles=("policy", "critic"))
    assert torch.equal(critic(batch.with_trunk(first.trunk(batch))).values_BT, expected)


@pytest.mark.parametrize(
    "name", ["embed_tokens.weight", "layers.0.self_attn.k_proj.weight", "layers.1.input_layernorm.weight"]
)
def test_a_trunk_that_differs_is_refused_by_name(lively: str, change: Player, name: str) -> None:
    first = policy(lively, train_layers=1)
    with torch.no_grad():
        dict(change.base.named_parameters())[name].view(-1)[-1] += 1e-6
    where = name.replace("embed_tokens", "embeddings")
    assert first_difference(first, change) == where
    with pytest.raises(SetupError, match=rf"lower layers of policy and reward a differ, first in {where}"):
        share_trunk(first, change, roles=("policy", "reward a"))


def test_upper_layers_may_differ(lively: str, change: Player) -> None:
    first = policy(lively, train_layers=1)
    with torch.no_grad():
        change.base.layers[LAYERS - 1].mlp.up_proj.weight.add_(1.0)
        change.base.norm.weight.add_(1.0)
    assert first_difference(first, change) is None


def test_trunks_of_different_depth_are_refused(lively: str) -> None:
    first, other = policy(lively, train_layers=1), policy(lively, train_layers=2)
    with pytest.raises(SetupError, match=r"first in layers\.1\."):
        share_trunk(first, other, roles=("policy", "critic"))
    with pytest.raises(SetupError, match=r"first in layers\.1\."):
        share_trunk(other, first, roles=("policy", "critic"))


def test_trap_10_the_reference_does_not_move_with_the_policy(lively: str) -> None:
    first, reference = policy(lively, train_layers=1, trained=True), policy(lively, train_layers=1)
    share_trunk(first, reference, roles=("policy", "reference"))
    batch = batch_of()
    before = {name: p.detach().clone() for name, p in reference.model.named_parameters()}
    expected = reference(batch).logprobs_BT
    optimiser = Optimiser(first.trained_parameters(), weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, max_grad_norm=None)
    first(batch).logprobs_BT.sum().backward()
    optimiser.step(1e-1)
    assert not torch.equal(first(batch).logprobs_BT.detach(), expected)
    assert torch.equal(reference(batch).logprobs_BT, expected)
    for name, parameter in reference.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_an_unembedding_of_its_own_stays_though_the_configuration_calls_it_tied(tmp_path: Path) -> None:
    folder = save_model("llama-untied", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    batch = batch_of()
    for share in (partial(share_trunk, roles=("policy", "reference")), share_frozen):
        first, other = policy(folder, train_layers=1), policy(folder, train_layers=1)
        expected = other(batch).logprobs_BT
        share(first, other)
        assert torch.equal(other(batch).logprobs_BT, expected)


@pytest.mark.parametrize("compute", [{"lora_rank": 2}, {"train_layers": 1}], ids=str)
def test_a_twin_holds_what_stays_frozen_and_copies_the_rest(compute: dict[str, int], lively_reward: str) -> None:
    model = scalar(lively_reward).model
    other = twin(model, ModelConfig(**compute))
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    frozen = set(lower_parameters(scalar(lively_reward))) if "train_layers" in compute else set(ours) - {"score.weight"}
    for name, parameter in theirs.items():
        assert (parameter is ours[name]) == (name in frozen), name
        assert torch.equal(parameter, ours[name])
    assert all(a is not b for a, b in zip(model.modules(), other.modules(), strict=True))


def test_what_is_trained_whole_has_no_twin(lively: str) -> None:
    assert twin(policy(lively).model, ModelConfig()) is None
