"""Players spread over processes by FSDP2: every process holds a part of each parameter and of its AdamW state.

Parameters are float32 shards, which are the masters; a pass gathers them in the compute precision and the backward pass
sums gradients into float32 shards. Frozen parameters of a trained player stay whole in every process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils._pytree import SUPPORTED_NODES

from ppomax.config import ModelConfig
from ppomax.engine import world
from ppomax.models.compiled import compile_layers
from ppomax.models.load import Compute
from ppomax.models.players import Player, ScalarOutput, TokenScores
from ppomax.types import SetupError, token_batch

P = TypeVar("P", bound=Player)


def shard(player: P, compute: Compute, config: ModelConfig) -> P:
    """Make a player ready to train: compiled, if that is asked for; spread over the processes, if there are several.

    With zero3 a layer that a pass gathered goes back after the forward pass, and frozen players are spread too, unless
    they share weights with trained ones; with zero2 it goes back after the backward pass, and frozen ones stay whole.
    With none all stays whole: `Optimiser` sums the gradients.
    """
    trained = {p for p in player.parameters() if p.requires_grad}
    if trained and config.compiled:
        compile_layers(player)
    reshard, shares = config.shard == "zero3", config.train_layers is not None or config.lora_rank is not None
    if world.size() == 1 or config.shard == "none" or (not trained and (shares or not reshard)):
        return player
    if not isinstance(getattr(player.base, "layers", None), nn.ModuleList):
        raise SetupError(
            f"compute.shard: found {config.shard} with {type(player.base).__name__}, which has no list of decoder "
            "layers to spread; expected none"
        )
    _register_outputs()
    spread = trained or set(player.parameters())
    whole = set(player.parameters()) - spread
    for parameter in whole:
        parameter.data = parameter.data.to(compute.dtype)
    options = {
        "mesh": init_device_mesh(compute.device.type, (world.size(),)),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=compute.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        "offload_policy": CPUOffloadPolicy() if config.offload and compute.device.type != "cpu" else OffloadPolicy(),
        "ignored_params": whole,
    }
    player.model.config.dtype = compute.dtype  # type: ignore[union-attr]
    player.device = compute.device
    for layer in player.base.layers:
        if any(p in spread for p in layer.parameters()):
            _as_masters(layer, trained)
            fully_shard(layer, reshard_after_forward=reshard, **options)
    # What is left (embeddings, last norm, heads) belongs to the player itself, which no pass goes around.
    _as_masters(player, trained)
    fully_shard(player, reshard_after_forward=False, **options)
    for module in _sharded(player):
        module.set_gradient_divide_factor(1.0)  # losses are divided by the counts of all processes already
        module.set_force_sum_reduction_for_comms(True)
    player.register_forward_hook(_give_back)
    player.gathered = partial(_whole, player, reshard)
    with torch.no_grad():  # the first pass makes the player the root of its layers, in whatever order they are called
        player(token_batch([[1, 2]], [[3]], device=str(compute.device)))
    return player


def _as_masters(module: nn.Module, trained: set[nn.Parameter]) -> None:
    """Trained parameters in float32, just before they are divided: a player never stands whole in float32."""
    for parameter in module.parameters():
        if parameter in trained and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


@contextmanager
def _whole(player: Player, reshard: bool) -> Iterator[None]:
    """All parameters gathered for the time of a block, without gradient: processes may then make different passes."""
    layers = [module for module in _sharded(player) if module is not player]
    try:
        with torch.inference_mode(False), torch.no_grad():
            for module in _sharded(player):
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()
        yield
    finally:
        for module in _sharded(player):
            module.reshard()
        for layer in layers:
            layer.set_reshard_after_forward(reshard, recurse=False)


def _sharded(player: nn.Module) -> list[FSDPModule]:
    return [module for module in player.modules() if isinstance(module, FSDPModule)]


def _give_back(player: nn.Module, inputs: object, output: object) -> None:
    """After a pass without gradient nothing else would, and the next pass would not see what a step changes."""
    if not torch.is_grad_enabled():
        for module in _sharded(player):
            module.reshard()
            _forget_pass(module)


def _forget_pass(module: FSDPModule) -> None:
    """FSDP2 notes every pass for the backward pass, and forgets it there alone: with frozen players the notes would
    grow for as long as a run lasts. The names are its own; where a version has others, they stay."""
    with suppress(AttributeError):
        group: Any = module._get_fsdp_state()._fsdp_param_group
        if group is not None:
            group._post_forward_indices.clear()
            group.comm_ctx.post_forward_order.clear()


def _register_outputs() -> None:
    """FSDP2 looks for tensors in what a pass returns, to know when its backward pass begins."""
    for output in (TokenScores, ScalarOutput):
        if output not in SUPPORTED_NODES:
            torch.export.register_dataclass(output)
