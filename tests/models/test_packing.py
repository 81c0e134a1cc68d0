"""Packed passes: no padding, a shared prompt read once, and the numbers of padded rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.architectures import BFLOAT16, VOCABULARY, policy, ragged, save_model, save_reward_model, scalar
from ppomax.models.attention import packing_is_exact
from ppomax.models.players import Player, Policy, at_responses
from ppomax.types import Packing, TokenBatch, token_batch

TOLERANCE = 1e-5
PACKS = ["llama", "llama-untied", "qwen2", "gpt2", "gpt-neox", "gemma3"]


def several_per_prompt() -> TokenBatch:
    """Five prompts, two of them with three responses, one of which is empty; rows of a prompt do not stand together."""
    prompts, responses = ragged(rows=9, seed=4)
    prompts[5] = prompts[8] = prompts[1]
    prompts[6] = prompts[7] = prompts[0]
    responses[6] = []
    return token_batch(prompts, responses)


def padded(player: Player) -> Player:
    player.packs = False
    return player


def gradients(player: Policy, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs [B, R], and the gradients of a sum that tells the tokens apart."""
    logprobs = at_responses(player(batch).logprobs_BT, batch)
    weights = torch.arange(logprobs.numel(), dtype=torch.float32).view(logprobs.shape) / logprobs.numel()
    (logprobs * weights).sum().backward()
    found = {name: p.grad.clone() for name, p in player.trained_parameters().items() if p.grad is not None}
    return logprobs.detach(), found


def test_packing_by_hand() -> None:
    # Rows: [7 8 | 1], [7 8 | 2 3], [9 | 4]. Packed: 7 8, 9, then 1, 2 3, 4.
    packing = Packing.of(token_batch([[7, 8], [7, 8], [9]], [[1], [2, 3], [4]]))
    assert packing.source_N.tolist() == [0, 1, 8, 2, 6, 7, 9]
    assert packing.position_N.tolist() == [0, 1, 0, 2, 2, 3, 1]
    assert packing.place_BT.tolist() == [[0, 1, 3, 0], [0, 1, 4, 5], [2, 6, 0, 0]]
    assert packing.prompt_GP.tolist() == [[0, 1], [2, 0]]
    assert packing.response_BR.tolist() == [[3, 0], [4, 5], [6, 0]]
    assert packing.prompt_B.tolist() == [0, 0, 1]
    # Blocks: prompts [2, 2] at 0..3, responses [3, 2] at 4..9.
    assert packing.block_N.tolist() == [0, 1, 2, 4, 6, 7, 8]
    # The third row's prompt has one token, so its second prompt column is hidden.
    assert packing.visible_BRS.int().tolist() == [
        [[1, 1, 1, 0], [1, 1, 1, 1]], [[1, 1, 1, 0], [1, 1, 1, 1]], [[1, 0, 1, 0], [1, 0, 1, 1]],
    ]  # fmt: skip


def test_every_token_comes_once_and_shared_prompts_once() -> None:
    batch = several_per_prompt()
    packing = batch.packing
    prompts = {tuple(row[:p].tolist()) for row, p in zip(batch.ids_BT, batch.prompt_length_B, strict=True)}
    responses = int((batch.length_B - batch.prompt_length_B).sum())
    assert len(prompts) == 5
    assert len(packing.source_N) == sum(map(len, prompts)) + responses
    ids_N = batch.ids_BT.flatten()[packing.source_N]
    again = ids_N[packing.place_BT]
    for row, ids, n in zip(again, batch.ids_BT, batch.length_B.tolist(), strict=True):
        assert row[:n].tolist() == ids[:n].tolist()


@pytest.mark.parametrize(
    ("name", "train_layers"), [*((name, None) for name in PACKS), *((name, 1) for name in PACKS[:3])]
)
def test_packed_and_padded_agree_in_numbers_and_gradients(name: str, train_layers: int | None, tmp_path: Path) -> None:
    folder, batch = save_model(name, tmp_path), several_per_prompt()
    options = {"train_layers": train_layers, "trained": True}
    packed = policy(folder, **options)
    assert packed.packs
    found, expected = gradients(packed, batch), gradients(padded(policy(folder, **options)), batch)
    torch.testing.assert_close(found[0], expected[0], atol=TOLERANCE, rtol=0)
    assert found[1].keys() == expected[1].keys() and found[1]
    for parameter, gradient in found[1].items():
        scale = float(expected[1][parameter].abs().max())
        torch.testing.assert_close(gradient, expected[1][parameter], atol=TOLERANCE * max(scale, 1.0), rtol=0)


def test_scalars_agree(tmp_path: Path) -> None:
    folder, batch = save_reward_model("llama", tmp_path), several_per_prompt()
    found, expected = (p(batch).values_BT for p in (scalar(folder), padded(scalar(folder))))
    counted = torch.arange(found.shape[1]) < batch.length_B[:, None]
    torch.testing.assert_close(found[counted], expected[counted], atol=TOLERANCE, rtol=0)


def test_trap_03_a_row_alone_is_the_row_in_company(lively: str) -> None:
    batch = several_per_prompt()
    together = at_responses(policy(lively)(batch).logprobs_BT, batch)
    for b, (n, p) in enumerate(zip(batch.length_B.tolist(), batch.prompt_length_B.tolist(), strict=True)):
        row = batch.ids_BT[b].tolist()
        alone = token_batch([row[:p]], [row[p:n]])
        expected = at_responses(policy(lively)(alone).logprobs_BT, alone)[0, : n - p]
        torch.testing.assert_close(together[b, : n - p], expected, atol=TOLERANCE, rtol=0)


def test_gradient_checkpointing_keeps_the_packing(lively: str) -> None:
    batch = several_per_prompt()
    plain = gradients(policy(lively, trained=True), batch)
    saved = gradients(policy(lively, trained=True, checkpointing=True), batch)
    assert torch.equal(plain[0], saved[0])
    for name, gradient in plain[1].items():
        torch.testing.assert_close(saved[1][name], gradient, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["mistral", "qwen2-window"])
def test_models_with_windows_are_not_packed(name: str, tmp_path: Path) -> None:
    assert not policy(save_model(name, tmp_path)).packs


def test_bfloat16_packs(lively: str) -> None:
    assert policy(lively, BFLOAT16).packs


def test_long_sequences_take_the_fused_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, batch = save_model("llama", tmp_path), several_per_prompt()
    expected = at_responses(policy(folder)(batch).logprobs_BT, batch)
    monkeypatch.setattr("ppomax.models.attention.LONGEST_FOLDED", 4)
    found = at_responses(policy(folder)(batch).logprobs_BT, batch)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_microbatches_count_packed_tokens_only_where_the_player_packs(lively: str) -> None:
    prompts, responses = [[3] * 10] * 4, [[5] * 2, [6] * 4, [7] * 2, [8] * 2]
    player = policy(lively)
    # Packed: 10 + 10 tokens in one batch of 20. Padded: 4 rows x 14.
    assert player.microbatches(prompts, responses, budget=20) == [[1, 0, 2, 3]]
    assert [len(group) for group in padded(player).microbatches(prompts, responses, budget=20)] == [1] * 4


def test_what_stands_in_the_padding_is_not_read(lively: str) -> None:
    batch = several_per_prompt()
    poisoned = batch.ids_BT.clone()
    for row, n in zip(poisoned, batch.length_B.tolist(), strict=True):
        row[n:] = VOCABULARY - 1
    other = TokenBatch(poisoned, batch.length_B, batch.prompt_length_B)
    found, expected = (at_responses(policy(lively)(b).logprobs_BT, b) for b in (other, batch))
    assert torch.equal(found, expected)


def test_layers_that_choose_their_keys_are_not_packed(lively: str) -> None:
    base = policy(lively).base
    assert packing_is_exact(base)
    base.config.index_topk = 2048  # what a few tokens do not show
    assert not packing_is_exact(base)
