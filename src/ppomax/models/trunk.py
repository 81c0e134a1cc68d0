"""States of the frozen lower layers, computed once for rows that are read many times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from ppomax.engine import world
from ppomax.models.players import Player
from ppomax.monitor.progress import Advance
from ppomax.types import TokenBatch, token_batch

LARGEST_BYTES = 2 * 2**30
Rows = Sequence[Sequence[int]]


def kept_bytes(player: Player, prompts: Rows, responses: Rows) -> int:
    """Bytes of the states that `trunk_states` keeps of these rows; 0 where it keeps none."""
    if player.train_layers is None or world.size() > 1:
        return 0
    weight = player.base.get_input_embeddings().weight
    size = sum(map(len, (*prompts, *responses))) * weight.shape[1] * weight.element_size()
    return size if size <= LARGEST_BYTES else 0


def trunk_states(
    player: Player, prompts: Rows, responses: Rows, *, budget: int,
    watch: Callable[[int], AbstractContextManager[Advance]],
) -> list[Tensor] | None:  # fmt: skip
    """States [T, H] of every row (prompt + response ids), or None: nothing is frozen, they would take over 2 GiB, or
    several processes share the rows, each in another order in every epoch.

    The microbatches depend on the rows alone, so that a resumed run sees the same numbers bit for bit. watch: given the
    number of rows, a progress bar that is moved as they are read.
    """
    if not kept_bytes(player, prompts, responses):
        return None
    weight = player.base.get_input_embeddings().weight
    states: list[Tensor] = [weight.new_zeros(0)] * len(prompts)
    with watch(len(prompts)) as advance:
        for group in player.microbatches(prompts, responses, budget=budget):
            batch = token_batch([prompts[i] for i in group], [responses[i] for i in group], device=str(weight.device))
            for i, state in zip(group, player.trunk(batch), strict=True):
                states[i] = state[: len(prompts[i]) + len(responses[i])].clone()
            advance(len(group))
    return states


def with_states(batch: TokenBatch, states: Sequence[Tensor] | None) -> TokenBatch:
    """The batch with the states of its rows, padded with zeros (which nothing that counts can see)."""
    if states is None:
        return batch
    B, T = batch.ids_BT.shape
    padded = states[0].new_zeros(B, T, states[0].shape[-1])
    for b, state in enumerate(states):
        padded[b, : len(state)] = state
    return batch.with_trunk(padded)
