"""Counted operations against PyTorch's own counter, on models with grouped heads, other layouts, frozen parts, adapters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.architectures import VOCABULARY, batch_of, make_model, policy, save_model, scalar
from ppomax.models import logprobs
from ppomax.models.flops import Cost, stack_costs, work_of
from ppomax.models.lora import Lora
from ppomax.models.players import Player, Scalar
from ppomax.types import TokenBatch, Work, token_batch

FAMILIES = ("llama", "llama-untied", "qwen2", "gpt2", "gpt-neox")
ROWS, LENGTH, PROMPT = 3, 11, 4
TOKENS, PLACES = ROWS * LENGTH, ROWS * (LENGTH - PROMPT)
# PyTorch's counter sees products with masked scores too: all pairs, not the causal ones.
PAIRS = ROWS * LENGTH**2


def square() -> TokenBatch:
    """Rows of one length and different prompts: nothing to pad, nothing to share."""
    ids = torch.arange(5, 5 + TOKENS).view(ROWS, LENGTH).tolist()
    return token_batch([row[:PROMPT] for row in ids], [row[PROMPT:] for row in ids])


def in_place(_: torch.Size, a: torch.Size, b: torch.Size, **__: object) -> int:
    """Operations of a product that is added to what is there, which PyTorch's counter does not know."""
    return 2 * a.numel() * b[1]


def counted(run: Callable[[], object]) -> int:
    """Operations of matrix products in a call."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        run()
    # Some versions of transformers form the angles of rotary positions as a product; there is no weight in it.
    angles = sum(sum(of.values()) for name, of in counter.get_flop_counts().items() if name.endswith("rotary_emb"))
    return counter.get_total_flops() - angles


def expected(player: Player, cost: Cost, places: int = PLACES) -> int:
    """By our formula, but with the pairs that a counter of products sees."""
    return cost.of(tokens=TOKENS, pairs=PAIRS, places=places)


def padded(player: Player) -> Player:
    """The player on padded batches, whose attention is plain products of whole rows."""
    player.packs = False
    return player


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A saved model of each family."""
    return {name: save_model(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_pass(name: str, folders: dict[str, str]) -> None:
    player, batch = padded(policy(folders[name])), square()
    with torch.no_grad():
        assert counted(lambda: player(batch)) == expected(player, player.costs.forward)
    assert player.costs.trunk == player.costs.backward == Cost()


@pytest.mark.parametrize("name", FAMILIES)
def test_backward_pass_of_a_whole_model(name: str, folders: dict[str, str]) -> None:
    player, batch = padded(policy(folders[name], trained=True)), square()
    loss = player(batch).logprobs_BT.sum()
    assert counted(loss.backward) == expected(player, player.costs.backward)
    assert player.costs.backward.token == 2 * player.costs.forward.token


def test_logits_that_are_computed_again_are_no_useful_work(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "chunk_rows", lambda vocabulary: PLACES // 3)
    player = padded(policy(folders["llama"], trained=True))
    loss = player(square()).logprobs_BT.sum()
    # A trained unembedding computes its logits again in the backward pass, but for the last chunk's.
    again = 2 * (PLACES - PLACES // 3) * VOCABULARY * player.base.config.hidden_size
    assert counted(loss.backward) == expected(player, player.costs.backward) + again


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("name", ["llama", "llama-untied", "qwen2"])
def test_frozen_lower_layers(name: str, layers: int, folders: dict[str, str]) -> None:
    player, batch = padded(policy(folders[name], trained=True, train_layers=layers)), square()
    costs = player.costs
    states: list[torch.Tensor] = []
    assert counted(lambda: states.append(player.trunk(batch))) == expected(player, costs.trunk)
    known, loss = batch.with_trunk(states[0]), []
    # A frozen unembedding forms its gradient in the forward pass.
    at_once = Cost(place=costs.forward.place)
    found = counted(lambda: loss.append(player(known).logprobs_BT.sum()))
    assert found == expected(player, costs.forward + at_once)
    found = counted(loss[0].backward)
    assert found == expected(player, costs.backward) - expected(player, at_once)
    whole = policy(folders[name]).costs.forward
    assert costs.trunk + costs.forward == whole


@pytest.mark.parametrize("layers", [None, 2])
def test_adapters(layers: int | None, folders: dict[str, str]) -> None:
    pytest.importorskip("peft")
    player = padded(policy(folders["llama"], trained=True, train_layers=layers, lora=Lora(2, 4.0)))
    batch, costs = square(), player.costs
    if layers is not None:
        batch = batch.with_trunk(player.trunk(batch))
    loss: list[torch.Tensor] = []
    forward = counted(lambda: loss.append(player(batch).logprobs_BT.sum()))
    both = forward + counted(loss[0].backward)
    # What x·Aᵀ is, the backward pass finds out again; that is not useful work.
    again = sum(2 * TOKENS * p.numel() for name, p in player.trained_parameters().items() if ".lora_A." in name)
    assert both == expected(player, costs.forward + costs.backward) + again
    # The frozen maps have no gradient of their own.
    assert costs.backward.token < 1.2 * costs.forward.token


@pytest.mark.parametrize("layers", [None, 1, 0])
def test_scalar_players(layers: int | None, folders: dict[str, str]) -> None:
    player, batch = padded(scalar(folders["llama"], trained=True, train_layers=layers)), square()
    if layers is not None:
        batch = batch.with_trunk(player.trunk(batch))
    loss: list[torch.Tensor] = []
    assert counted(lambda: loss.append(player(batch).values_BT.sum())) == expected(player, player.costs.forward, 0)
    assert counted(loss[0].backward) == expected(player, player.costs.backward, 0)
    if layers == 0:
        assert player.costs.backward == Cost(token=2 * 32, place=0)


def test_scalar_player_with_its_language_modelling_term(folders: dict[str, str]) -> None:
    player, batch = padded(scalar(folders["llama"], trained=True, train_layers=1)), square()
    batch = batch.with_trunk(player.trunk(batch))
    mask = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    mask[:, PROMPT:] = True

    def run() -> None:
        assert isinstance(player, Scalar)
        out = player(batch, lm_mask_BT=mask)
        assert out.logprobs_BT is not None
        (out.values_BT.sum() + out.logprobs_BT.sum()).backward()

    assert counted(run) == expected(player, player.costs.forward + player.costs.backward)


def test_a_causal_mask_leaves_the_pairs_that_are_useful() -> None:
    spans = [(0, 4), (3, 5), (7, 7)]
    seen = sum(1 for start, end in spans for query in range(start, end) for key in range(query + 1))
    assert seen == 10 + 9
    assert work_of(Cost(pair=1), spans, places=9) == Work(tokens=6, slots=6, flops=seen)
    assert work_of(Cost(place=3), spans, slots=8, places=9) == Work(tokens=6, slots=8, flops=27)


def test_work_of_a_ragged_batch(folders: dict[str, str]) -> None:
    batch = batch_of()
    lengths, prompts = batch.length_B.tolist(), batch.prompt_length_B.tolist()
    player = policy(folders["llama"], trained=True)
    assert player.packs
    packed, both = player.work(batch), player.work(batch, training=True)
    whole = padded(player).work(batch)
    assert packed == Work(sum(lengths), sum(lengths), whole.flops)
    assert whole == Work(sum(lengths), batch.ids_BT.numel(), packed.flops) and whole.slots > whole.tokens
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    cost = player.costs.forward
    assert whole.flops == cost.token * sum(lengths) + cost.pair * pairs + cost.place * (sum(lengths) - sum(prompts))
    assert both.tokens == packed.tokens and both.flops == 3 * packed.flops


def test_a_packed_pass_reads_a_shared_prompt_once(folders: dict[str, str]) -> None:
    batch = token_batch([[5, 6, 7, 8], [5, 6, 7, 8], [9, 9]], [[1, 2], [3], [4, 4, 4]])
    player = policy(folders["llama"])
    work = player.work(batch)
    assert work.tokens == work.slots == 4 + 2 + 1 + 2 + 3 == len(batch.packing.source_N)
    pairs = (1 + 2 + 3 + 4) + (5 + 6) + 5 + (1 + 2) + (3 + 4 + 5)
    assert work.flops == player.costs.forward.of(tokens=12, pairs=pairs, places=6)
    assert padded(player).work(batch).tokens == 6 + 5 + 5


def test_experts_have_no_count() -> None:
    model = make_model("llama")
    model.config.num_local_experts = 8  # type: ignore[union-attr]
    costs = stack_costs(model.model, split=0, token_weights=[], place_weights=[])  # type: ignore[arg-type]
    assert costs.trunk == costs.forward == costs.backward == Cost()


def test_twice_the_parameters_per_token(folders: dict[str, str]) -> None:
    # The rule of thumb that everybody uses, for what is not norms and embeddings.
    player = policy(folders["llama"])
    maps = sum(p.numel() for name, p in player.base.layers.named_parameters() if p.ndim == 2)
    assert player.costs.forward.token == 2 * maps
    assert player.costs.forward.place == 2 * VOCABULARY * 32
