"""Adapters: nothing but them is trained, the merged export is the model, and PEFT reads them alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from models.architectures import policy, save_model
from ppomax.models.load import Compute, export, export_scalar, load_causal_lm, load_scalar_lm
from ppomax.models.lora import ADAPTER, Lora, _Adapted, add_adapters, has_adapters, merged_state
from ppomax.models.players import Policy, Scalar
from ppomax.types import SetupError, TokenBatch, token_batch

FLOAT32 = Compute(torch.device("cpu"), torch.float32)
LORA = Lora(rank=4, alpha=8.0)


def batch() -> TokenBatch:
    return token_batch([[5, 6, 7], [8]], [[9, 10], [11, 12, 13]], device="cpu")


def tiny() -> nn.Module:
    return load_causal_lm("tiny", FLOAT32)


def moved(player: Policy | Scalar) -> dict[str, nn.Parameter]:
    """What is trained, after a step in a random direction."""
    trained = player.trained_parameters()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return trained


@pytest.mark.parametrize("train_layers", [None, 1])
def test_adapters_start_as_the_model_and_are_all_that_is_trained(train_layers: int | None) -> None:
    before = Policy(tiny(), train_layers=None, trained=False)(batch()).logprobs_BT
    policy = Policy(tiny(), train_layers=train_layers, trained=True, lora=LORA)
    assert torch.allclose(policy(batch()).logprobs_BT, before, atol=1e-6)
    names = policy.trained_parameters()
    assert names and all(".lora_A." in name or ".lora_B." in name for name in names)
    layers = {name.split("layers.")[1].split(".")[0] for name in names}
    count = len(policy.base.layers)
    assert layers == {str(i) for i in range(count - (train_layers or count), count)}
    # Seven linear maps a Llama layer, A and B each; rank × (in + out) numbers for each map.
    assert len(names) == 14 * len(layers)
    policy(batch()).logprobs_BT.sum().backward()
    assert all(parameter.grad is not None for parameter in names.values())
    assert all(p.grad is None for name, p in policy.model.named_parameters() if ".lora_" not in name)


def test_the_formula_by_hand() -> None:
    policy = Policy(tiny(), train_layers=None, trained=True, lora=LORA)
    trained = moved(policy)
    original = dict(tiny().named_parameters())
    merged = dict(merged_state(policy.model, policy.model.state_dict()))
    assert merged.keys() == tiny().state_dict().keys()
    for name, tensor in merged.items():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.default.weight" in trained:
            low, high = (trained[f"{stem}.lora_{side}.default.weight"] for side in "AB")
            assert torch.allclose(tensor, original[name] + 8.0 / 4 * high @ low, atol=1e-6)
        elif name in original:
            assert torch.equal(tensor, original[name])


def by_peft(model: nn.Module) -> None:
    """Let the adapted layers compute as PEFT wrote them."""
    adapted = [layer for layer in model.modules() if hasattr(layer, "base_layer")]
    assert adapted
    for layer in adapted:
        layer.__class__ = type(layer).__base__


@pytest.mark.parametrize(("name", "biases"), [("llama", False), ("qwen2", True)])
def test_layers_and_gradients_are_those_of_pefts_own_layers(tmp_path: Path, name: str, biases: bool) -> None:
    folder = save_model(name, tmp_path)
    ours, theirs = (policy(folder, trained=True, lora=LORA) for _ in range(2))
    assert biases == any(name.endswith("base_layer.bias") for name, _ in ours.model.named_parameters())
    by_peft(theirs.model)
    with torch.no_grad():
        for player in (ours, theirs):
            for key, parameter in player.model.named_parameters():
                generator = torch.Generator().manual_seed(len(key))
                if ".lora_" in key or key.endswith("bias"):
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        expected = theirs(batch()).logprobs_BT
        assert torch.allclose(ours(batch()).logprobs_BT, expected, atol=1e-6)
    assert expected.abs().max() > 1
    for player in (ours, theirs):
        assert torch.allclose(player(batch()).logprobs_BT, expected, atol=1e-6)
        player(batch()).logprobs_BT.square().sum().backward()
    for (key, found), right in zip(
        ours.trained_parameters().items(), theirs.trained_parameters().values(), strict=True
    ):
        assert torch.allclose(found.grad, right.grad, atol=1e-5, rtol=1e-4), key
        assert right.grad.abs().max() > 0


@pytest.mark.parametrize("learns", [True, False], ids=["states that learn", "states from frozen layers"])
def test_first_and_second_derivatives_of_an_adapted_layer(learns: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, low, high = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 4), (3, 4), (3,), (2, 4), (3, 2))
    )
    learning = [t.requires_grad_() for t in ([x, low, high] if learns else [low, high])]

    def layer(*given: torch.Tensor) -> torch.Tensor:
        x_NI, low_RI, high_OR = given if learns else (x, *given)
        return _Adapted.apply(x_NI, weight, bias, low_RI, high_OR, 0.5)  # type: ignore[return-value]

    assert torch.allclose(layer(*learning), x @ weight.T + bias + 0.5 * x @ low.T @ high.T)
    assert torch.autograd.gradcheck(layer, learning)
    assert torch.autograd.gradgradcheck(layer, learning)


def test_the_seed_keys_the_start_and_nothing_global_moves() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (
        Policy(tiny(), train_layers=None, trained=True, lora=Lora(4, 8.0, seed)).trained_parameters()
        for seed in (3, 3, 4)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_causal_lm_exported_is_read_by_transformers_and_peft(tmp_path: Path) -> None:
    policy = Policy(tiny(), train_layers=1, trained=True, lora=LORA)
    moved(policy)
    expected = policy(batch()).logprobs_BT
    tokenizer = AutoTokenizer.from_pretrained(policy.model.name_or_path)
    export(policy.model, tokenizer, tmp_path)
    assert has_adapters(policy.model)
    assert torch.equal(policy(batch()).logprobs_BT, expected)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not has_adapters(plain)
    base = AutoModelForCausalLM.from_pretrained(policy.model.name_or_path)
    adapted: Any = peft.PeftModel.from_pretrained(base, str(tmp_path / ADAPTER))
    for model in (plain, adapted, adapted.merge_and_unload()):
        ids, mask = batch().ids_BT, torch.arange(5)[None] < batch().length_B[:, None]
        logits = model(ids, attention_mask=mask).logits
        found = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        answered = expected[:, 1:] != 0
        assert torch.allclose(found[answered], expected[:, 1:][answered], atol=1e-5)


def test_a_reward_model_scores_alike_after_save_reload_and_merge(tmp_path: Path) -> None:
    scalar = Scalar(load_scalar_lm("tiny", FLOAT32, fresh_head_seed=0), train_layers=None, trained=True, lora=LORA)
    moved(scalar)
    assert "score.weight" in scalar.trained_parameters()
    expected = scalar(batch()).values_BT
    tokenizer = AutoTokenizer.from_pretrained(scalar.model.name_or_path)
    export_scalar(scalar.model, tokenizer, tmp_path)
    reloaded = Scalar(load_scalar_lm(str(tmp_path), FLOAT32), train_layers=None, trained=False)(batch()).values_BT
    base = AutoModelForSequenceClassification.from_pretrained(scalar.model.name_or_path, num_labels=1)
    adapted: Any = peft.PeftModel.from_pretrained(base, str(tmp_path / ADAPTER)).merge_and_unload()
    by_peft = Scalar(adapted, train_layers=None, trained=False)(batch()).values_BT
    for found in (reloaded, by_peft):
        counts = torch.arange(5)[None] < batch().length_B[:, None]
        assert torch.allclose(found[counts], expected[counts], atol=1e-5)


def test_without_peft_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(SetupError, match=r"compute.lora_rank needs `peft`: pip install 'peft>=0.18'"):
        Policy(tiny(), train_layers=None, trained=True, lora=LORA)


def test_the_head_alone() -> None:
    scalar = Scalar(load_scalar_lm("tiny", FLOAT32, fresh_head_seed=0), train_layers=0, trained=True)
    assert [*scalar.trained_parameters()] == ["score.weight"]
    whole = Scalar(load_scalar_lm("tiny", FLOAT32, fresh_head_seed=0), train_layers=None, trained=False)
    assert torch.equal(scalar(batch()).values_BT, whole(batch()).values_BT)
    with pytest.raises(SetupError, match="train_layers: found 0, expected 1 to 2"):
        Policy(tiny(), train_layers=0, trained=True)


def test_adapters_and_a_head_alone_contradict_each_other() -> None:
    with pytest.raises(SetupError, match="lora_rank: found 4 with train_layers 0"):
        Scalar(load_scalar_lm("tiny", FLOAT32, fresh_head_seed=0), train_layers=0, trained=True, lora=LORA)


def test_a_stack_that_adapters_cannot_go_into_is_refused_and_not_trained_whole(tmp_path: Path) -> None:
    with pytest.raises(
        SetupError, match="lora_rank: found 4 with GPT2LMHeadModel, which has no list of decoder layers"
    ):
        policy(save_model("gpt2", tmp_path), trained=True, lora=LORA)
    without_maps = nn.Module()
    without_maps.layers = nn.ModuleList([nn.LayerNorm(4)])
    with pytest.raises(SetupError, match="lora_rank: found no linear map in the decoder layers of Module"):
        add_adapters(without_maps, SimpleNamespace(layers=without_maps.layers), LORA, first_layer=0)


def test_an_architecture_that_peft_refuses_is_a_setup_error(tmp_path: Path) -> None:
    folder = save_model("mamba", tmp_path)
    with pytest.raises(SetupError, match="lora_rank: MambaForCausalLM: .*; leave it None"):
        policy(folder, trained=True, lora=Lora(2, 4.0))
