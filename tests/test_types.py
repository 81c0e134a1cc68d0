"""The carriers: masks and lengths are those of the rows, whatever ids the rows hold."""

from __future__ import annotations

import torch

from ppomax.types import Prompt, Rollout, token_batch

EOS = PAD = 2
# An eos in the middle, the pad id 0 in the middle and at the end, and nothing but pads.
RESPONSES = [[10, EOS, 11, EOS], [0, 7, 0], [PAD]]


def test_trap_02_the_mask_of_a_rollout_comes_from_its_lengths() -> None:
    for pad in (0, PAD):
        ids_BR = torch.tensor([row + [pad] * (4 - len(row)) for row in RESPONSES])
        rollout = Rollout(
            (Prompt((), key="x"),) * 3, ((5,),) * 3, ids_BR, torch.tensor([4, 3, 1]), torch.zeros(3, 4),
            torch.tensor([False, True, False]), torch.zeros(3, dtype=torch.long),
        )  # fmt: skip
        assert rollout.mask_BR.int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]
        assert rollout.responses() == RESPONSES


def test_trap_02_a_batch_counts_the_pad_id_where_a_row_holds_it() -> None:
    for pad in (0, PAD):
        batch = token_batch([[5, PAD, 9], [0], [PAD]], RESPONSES, pad=pad)
        assert batch.length_B.tolist() == [7, 4, 2]
        assert batch.mask_BR.sum(1).tolist() == [4, 3, 1]
