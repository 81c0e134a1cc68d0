"""Frozen weights that players have in common, in memory once."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ppomax.config import ModelConfig
from ppomax.models.load import decoder_stack, tied
from ppomax.models.players import Player
from ppomax.types import SetupError


def twin(model: Any, config: ModelConfig) -> Any | None:
    """A copy of a model that nobody trains yet, which holds the very tensors that stay frozen: beside adapters all but
    those of a scalar head, else those below the uppermost `train_layers`. None where there are none."""
    if config.lora_rank is not None:
        head = getattr(model, "score", None)
        shared = set(model.parameters()) - set(() if head is None else head.parameters())
    elif config.train_layers is not None and hasattr(decoder_stack(model), "layers"):
        shared = {tensor for _, tensor in _lower(decoder_stack(model), config.train_layers)}
    else:
        return None
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def first_difference(a: Player, b: Player) -> str | None:
    """The name of the first parameter of the frozen lower layers that differs between two players, or None."""
    ours, theirs = dict(_lower_parameters(a)), dict(_lower_parameters(b))
    for name, tensor in ours.items():
        other = theirs.get(name)
        if other is None or other.shape != tensor.shape or not torch.equal(other, tensor):
            return name
    return None if ours.keys() == theirs.keys() else next(iter(theirs.keys() - ours.keys()))


def share_trunk(first: Player, other: Player, *, roles: tuple[str, str]) -> None:
    """Let `other` use the embeddings and frozen lower layers of `first`; SetupError if they are not equal."""
    different = first_difference(first, other)
    if different is not None:
        raise SetupError(
            f"train_layers: the frozen lower layers of {roles[0]} and {roles[1]} differ, first in {different}; "
            "expected both trained from the same model with the same train_layers. Train them so, or leave it None"
        )
    count = len(first.base.layers) - (first.train_layers or 0)
    for i in range(count):
        other.base.layers[i] = first.base.layers[i]
    was_tied = tied(other.model)
    other.base.set_input_embeddings(first.base.get_input_embeddings())
    if was_tied:
        _tie(other)


def share_frozen(first: Player, other: Player) -> None:
    """Let the frozen `other` hold the tensors of `first` that are frozen and equal: beside adapters, all of them."""
    was_tied = tied(other.model)
    frozen = {name.replace(".base_layer.", "."): p for name, p in first.model.named_parameters() if not p.requires_grad}
    for name, parameter in [*other.model.named_parameters()]:
        ours = frozen.get(name)
        if ours is not None and ours.shape == parameter.shape and torch.equal(ours, parameter):
            owner, _, leaf = name.rpartition(".")
            setattr(other.model.get_submodule(owner), leaf, ours)
    if was_tied:
        _tie(other)


def _tie(player: Player) -> None:
    """The unembedding is the embedding again, after the embedding was replaced."""
    player.model.get_output_embeddings().weight = player.base.get_input_embeddings().weight  # type: ignore[operator]


def _lower_parameters(player: Player) -> list[tuple[str, nn.Parameter]]:
    return _lower(player.base, player.train_layers or 0)


def _lower(base: Any, train_layers: int) -> list[tuple[str, nn.Parameter]]:
    embeddings = base.get_input_embeddings().named_parameters(prefix="embeddings")
    return [*embeddings, *base.layers[: len(base.layers) - train_layers].named_parameters(prefix="layers")]
