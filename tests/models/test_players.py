"""Players read response tokens from hidden states: the right ones, whatever stands beside and after them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.architectures import BFLOAT16, batch_of, make_model, policy, ragged, reloaded, scalar
from ppomax.engine.optimiser import Optimiser
from ppomax.models.players import Player, Policy, Scalar, at_end, at_responses, expect_equal_rows, response_mask
from ppomax.types import SetupError, TokenBatch, token_batch

TOLERANCE = 1e-5
LAYERS = 3


def readings(player: Policy | Scalar, batch: TokenBatch) -> Tensor:
    """[B, R] log-probs or values of the response tokens."""
    if isinstance(player, Policy):
        return at_responses(player(batch, temperature=0.6).logprobs_BT, batch)
    return at_responses(player(batch).values_BT, batch, before=True)


def assert_same_rows(found: Tensor, expected: Tensor) -> None:
    """[B, R] equal where both have columns, and 0 beyond."""
    width = min(found.shape[1], expected.shape[1])
    torch.testing.assert_close(found[:, :width], expected[:, :width], atol=TOLERANCE, rtol=0)
    assert not found[:, width:].any() and not expected[:, width:].any()


def lower_bytes(player: Player) -> str:
    """A hash of the embeddings and of all layers but the uppermost."""
    digest = hashlib.sha256()
    for name, tensor in sorted(player.model.state_dict().items()):
        if f"layers.{LAYERS - 1}." not in name and "model.norm" not in name and "score" not in name:
            digest.update(name.encode() + tensor.float().numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(params=["policy", "scalar"])
def opened(request: pytest.FixtureRequest, lively: str, lively_reward: str) -> Callable[..., Policy | Scalar]:
    """A function that opens a policy, or a scalar player, with given options."""
    if request.param == "policy":
        return lambda **options: policy(lively, **options)
    return lambda **options: scalar(lively_reward, **options)


def test_padded_passes_are_cut_where_lengths_differ_by_more_than_a_pass_costs(lively: str) -> None:
    player = policy(lively)
    player.packs = False
    sides = [[1, 2]] * 7, [[3] * n for n in (300, 10, 298, 11, 12, 301, 9)]
    assert player.microbatches(*sides, budget=100_000) == [[5, 0, 2], [4, 3, 1, 6]]
    assert player.microbatches(*sides, budget=700) == [[5, 0], [2], [4, 3, 1, 6]]
    # To start a pass of so small a model takes a GPU longer than all these tokens.
    player.device = torch.device("cuda")
    assert player.microbatches(*sides, budget=100_000) == [[5, 0, 2, 4, 3, 1, 6]]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_plain_transformers(lively: str, temperature: float) -> None:
    from transformers import AutoModelForCausalLM

    prompts, responses = ragged()
    batch = token_batch(prompts, responses)
    scores = policy(lively)(batch, temperature=temperature, statistics=True)
    found = at_responses(scores.logprobs_BT, batch)
    assert found.dtype == torch.float32
    plain = reloaded(AutoModelForCausalLM, lively)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        tempered = torch.log_softmax(logits / temperature, -1)
        n = len(response)
        for column, expected in (
            (scores.logprobs_BT, tempered[range(n), response]),
            (scores.entropy_BT, -(tempered.exp() * tempered).sum(-1)),
            (scores.plain_logprobs_BT, torch.log_softmax(logits, -1)[range(n), response]),
        ):
            row = at_responses(column, batch)[i]
            torch.testing.assert_close(row[:n], expected, atol=TOLERANCE, rtol=0)
            assert not row[n:].any()


def test_a_mask_of_its_own_chooses_the_tokens(lively: str) -> None:
    player, batch = policy(lively), batch_of()
    everything = torch.ones_like(batch.ids_BT, dtype=torch.bool)
    whole = player(batch, mask_BT=everything).logprobs_BT
    assert not whole[:, 0].any(), "the first token has nothing before it"
    mask = torch.rand(batch.ids_BT.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[:, 0] = True
    some = player(batch, mask_BT=mask).logprobs_BT
    kept = mask.clone()
    kept[:, 0] = False
    torch.testing.assert_close(some, torch.where(kept, whole, 0.0), atol=TOLERANCE, rtol=0)
    assert not player(batch, mask_BT=torch.zeros_like(mask)).logprobs_BT.any()


def test_trap_03_width_neighbours_and_order_change_nothing(opened: Callable[..., Policy | Scalar]) -> None:
    player = opened()
    prompts, responses = ragged()
    expected = readings(player, token_batch(prompts, responses))
    longest = token_batch([*prompts, [5] * 60], [*responses, [9] * 40])
    assert_same_rows(readings(player, longest)[:-1, :], expected)
    backwards = readings(player, token_batch(prompts[::-1], responses[::-1]))
    assert_same_rows(backwards.flip(0), expected)
    for i in range(len(prompts)):
        assert_same_rows(readings(player, token_batch([prompts[i]], [responses[i]])), expected[i : i + 1])


@pytest.mark.parametrize("poison", [2, 1, 200])
def test_trap_02_padding_is_never_looked_at(opened: Callable[..., Policy | Scalar], poison: int) -> None:
    player = opened()
    prompts, responses = ragged()
    clean, dirty = (token_batch(prompts, responses, pad=pad) for pad in (0, poison))
    assert bool((clean.ids_BT != dirty.ids_BT).any())
    assert torch.equal(readings(player, clean), readings(player, dirty))


def test_trap_02_pad_and_eos_ids_inside_a_response_count_like_any_other(opened: Callable[..., Policy | Scalar]) -> None:
    player = opened()
    # 2 is both eos and pad here: in the middle, at the end, and as the whole response.
    batch = token_batch([[5, 2, 9], [7, 8], [2]], [[10, 2, 11, 2], [2, 2], [2]], pad=2)
    assert batch.mask_BR.sum(1).tolist() == [4, 2, 1]
    found = readings(player, batch)
    assert int((found != 0).sum()) == 7
    for i, (p, r) in enumerate([([5, 2, 9], [10, 2, 11, 2]), ([7, 8], [2, 2]), ([2], [2])]):
        assert_same_rows(found[i : i + 1], readings(player, token_batch([p], [r])))


def test_trap_02_the_pad_id_has_a_gradient_where_it_is_read(lively: str) -> None:
    # nn.Embedding gives its padding row no gradient; the eos of an earlier turn is read like any other token.
    player = policy(lively, trained=True)
    assert player.model.config.pad_token_id == 2
    batch = token_batch([[2, 7]], [[9, 11]])
    (player(batch).logprobs_BT.sum()).backward()
    table = player.base.get_input_embeddings().weight
    step = torch.zeros_like(table)
    step[2, 4] = 1e-2
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            table.add_(sign * step)
            ends.append(float(player(batch).logprobs_BT.sum()))
            table.sub_(sign * step)
    # The table is tied: input and output uses together make the slope.
    assert float(table.grad[2, 4]) == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=2e-2)


def test_trap_03_scores_do_not_depend_on_the_batch(lively_reward: str) -> None:
    player = scalar(lively_reward)
    prompts, responses = ragged(rows=12)
    together = at_end(player(batch := token_batch(prompts, responses)).values_BT, batch)
    assert float(together.std()) > 0.05, "scores that are all alike would show nothing"
    for i in range(12):
        alone = token_batch([prompts[i]], [responses[i]])
        assert abs(float(at_end(player(alone).values_BT, alone)) - float(together[i])) < 1e-4


def numbered(prompt_lengths: list[int], response_lengths: list[int]) -> tuple[TokenBatch, Tensor]:
    """A batch, and a [B, T] tensor whose entry at row b, token t is 100·b + t."""
    batch = token_batch([[5] * n for n in prompt_lengths], [[6] * n for n in response_lengths])
    B, T = batch.ids_BT.shape
    return batch, torch.arange(T)[None, :] + 100.0 * torch.arange(B)[:, None]


def test_trap_11_the_value_of_a_token_is_read_before_it() -> None:
    # Row 0: prompt 0 1 2, response 3 4. Row 1: prompt 100, response 101 102 103 104 105. Row 2: one token each.
    batch, x_BT = numbered([3, 1, 1], [2, 5, 1])
    assert at_responses(x_BT, batch).tolist() == [[3, 4, 0, 0, 0], [101, 102, 103, 104, 105], [201, 0, 0, 0, 0]]
    before = at_responses(x_BT, batch, before=True)
    assert before.tolist() == [[2, 3, 0, 0, 0], [100, 101, 102, 103, 104], [200, 0, 0, 0, 0]]


def test_trap_05_masked_entries_are_zero_even_where_the_source_is_nan() -> None:
    batch, x_BT = numbered([3, 1, 1], [2, 5, 1])
    x_BT = torch.where(torch.arange(6)[None, :] < batch.length_B[:, None], x_BT, float("nan"))
    for before in (False, True):
        assert bool(torch.isfinite(at_responses(x_BT, batch, before=before)).all())


def test_trap_01_and_24_the_score_stands_at_the_last_counted_token() -> None:
    batch, x_BT = numbered([3, 1, 1], [2, 5, 1])
    assert at_end(x_BT, batch).tolist() == [4, 105, 201]


def test_response_mask_marks_the_response_tokens() -> None:
    batch, _ = numbered([3, 1, 1], [2, 5, 1])
    assert response_mask(batch).int().tolist() == [[0, 0, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize("upper", [1, 2, LAYERS])
def test_a_split_player_computes_the_same_bits(opened: Callable[..., Policy | Scalar], upper: int) -> None:
    whole, split, batch = opened(), opened(train_layers=upper), batch_of()
    with torch.no_grad():
        expected = whole.hidden(batch)
        assert torch.equal(split.hidden(batch), expected)
        trunk = split.trunk(batch)
        assert torch.equal(split.hidden(batch.with_trunk(trunk)), expected)
        assert not torch.equal(trunk, expected)
    assert torch.equal(readings(split, batch.with_trunk(trunk)), readings(split, batch))
    assert torch.equal(readings(split, batch), readings(whole, batch))


def test_a_split_player_in_bfloat16_computes_the_same_bits(lively: str) -> None:
    whole, split, batch = policy(lively, BFLOAT16), policy(lively, BFLOAT16, train_layers=1), batch_of()
    assert torch.equal(readings(whole, batch), readings(split, batch.with_trunk(split.trunk(batch))))


@pytest.mark.parametrize("upper", [1, 2])
def test_only_the_upper_layers_norm_and_scalar_head_are_trained(
    opened: Callable[..., Policy | Scalar], upper: int
) -> None:
    player, batch = opened(train_layers=upper, trained=True), batch_of()
    readings(player, batch).sum().backward()
    layers = tuple(f"model.layers.{i}." for i in range(LAYERS - upper, LAYERS))
    for name, parameter in player.model.named_parameters():
        expected = name.startswith((*layers, "model.norm.", "score."))
        assert parameter.requires_grad == expected, name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == expected, name
    assert set(player.trained_parameters()) == {
        name for name, p in player.model.named_parameters() if p.grad is not None
    }


def test_gradients_of_a_split_player_are_those_of_the_whole(opened: Callable[..., Policy | Scalar]) -> None:
    whole, split, batch = opened(trained=True), opened(train_layers=1, trained=True), batch_of()
    readings(whole, batch).sum().backward()
    readings(split, batch.with_trunk(split.trunk(batch))).sum().backward()
    expected = dict(whole.model.named_parameters())
    assert len(split.trained_parameters()) >= 10
    for name, parameter in split.trained_parameters().items():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=TOLERANCE, rtol=1e-4)


def test_a_frozen_player_has_no_gradient_at_all(opened: Callable[..., Policy | Scalar]) -> None:
    for upper in (None, 1):
        player = opened(train_layers=upper)
        assert player.trained_parameters() == {}
        assert not readings(player, batch_of()).requires_grad


def test_trap_10_lower_layers_do_not_move(opened: Callable[..., Policy | Scalar]) -> None:
    player = opened(train_layers=1, trained=True)
    before, top = lower_bytes(player), next(iter(player.trained_parameters().values())).detach().clone()
    optimiser = Optimiser(
        player.trained_parameters(), weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, max_grad_norm=1.0
    )  # fmt: skip
    for _ in range(2):
        readings(player, batch_of()).sum().backward()
        optimiser.step(1e-2)
    assert not torch.equal(next(iter(player.trained_parameters().values())), top)
    assert lower_bytes(player) == before


def test_trap_07_gradient_checkpointing_changes_no_number(opened: Callable[..., Policy | Scalar]) -> None:
    for upper in (None, 1):
        plain = opened(train_layers=upper, trained=True)
        thrifty = opened(train_layers=upper, trained=True, checkpointing=True)
        passes: list[object] = []
        thrifty.base.layers[-1].mlp.register_forward_pre_hook(lambda module, _, passes=passes: passes.append(module))
        batch = batch_of()
        a, b = readings(plain, batch), readings(thrifty, batch)
        assert torch.equal(a, b)
        a.sum().backward()
        assert len(passes) == 1
        b.sum().backward()
        assert len(passes) == 2, "the backward pass computes the layer again"
        for name, parameter in thrifty.trained_parameters().items():
            expected = dict(plain.model.named_parameters())[name].grad
            torch.testing.assert_close(parameter.grad, expected, atol=TOLERANCE, rtol=1e-5, msg=name)
        with torch.no_grad():
            assert torch.equal(readings(thrifty, batch), a)


def test_the_lm_term_reads_the_unembedding(lively: str, lively_reward: str) -> None:
    # Tied: the scalar model's own embeddings unembed, so its trunk gives the policy's log-probs.
    batch = batch_of()
    out = scalar(lively_reward)(batch, lm_mask_BT=response_mask(batch))
    torch.testing.assert_close(out.logprobs_BT, policy(lively)(batch).logprobs_BT, atol=TOLERANCE, rtol=0)
    head = torch.nn.Linear(32, 259, bias=False)
    other = scalar(lively_reward)
    other.unembedding = head
    logits = other.hidden(batch) @ head.weight.T
    expected = torch.log_softmax(logits, -1)[:, :-1].gather(2, batch.ids_BT[:, 1:, None])[..., 0]
    found = other(batch, lm_mask_BT=response_mask(batch)).logprobs_BT
    kept = response_mask(batch)[:, 1:]
    torch.testing.assert_close(found[:, 1:][kept], expected[kept], atol=TOLERANCE, rtol=0)


def test_scalar_values_are_float32_and_linear_in_the_head(lively_reward: str) -> None:
    player, batch = scalar(lively_reward, BFLOAT16), batch_of()
    values = player(batch).values_BT
    assert values.dtype == torch.float32
    with torch.no_grad():
        player.head.weight.mul_(2.0)
        assert torch.equal(player(batch).values_BT, 2 * values)


@pytest.mark.parametrize("layers", [0, LAYERS + 1, -1])
def test_impossible_train_layers_name_the_range(lively: str, layers: int) -> None:
    with pytest.raises(SetupError, match=f"train_layers: found {layers}, expected 1 to {LAYERS}"):
        policy(lively, train_layers=layers)


def test_a_scalar_player_needs_a_score_head() -> None:
    with pytest.raises(SetupError, match="has no linear `score` head"):
        Scalar(make_model("llama"), train_layers=None, trained=False)


def test_an_exact_kl_needs_as_many_rows_on_both_sides(lively: str) -> None:
    """Models of one tokenizer may differ in the rows that pad it."""
    plain, padded = policy(lively), policy(lively)
    padded.model.resize_token_embeddings(272, mean_resizing=False)
    expect_equal_rows(plain, policy(lively), what="kl", instead="take k1")
    with pytest.raises(SetupError, match="^kl: found 272 rows in its unembedding, expected 259 .*; take k1$"):
        expect_equal_rows(plain, padded, what="kl", instead="take k1")
