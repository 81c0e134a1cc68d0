"""The planner's bytes: against real players, optimisers, caches, batches, and what autograd keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM
from transformers import LlamaForSequenceClassification as LlamaScalar

from ppomax.config import KLConfig, ModelConfig, PlanConfig, SamplingConfig, SaveConfig
from ppomax.data.batches import prompt_batches, token_budget_batches
from ppomax.engine.checkpoint import FILE_BYTES
from ppomax.engine.optimiser import Optimiser
from ppomax.models.lora import Lora
from ppomax.models.players import Policy, Scalar
from ppomax.models.shapes import shape_sized
from ppomax.rollout.cache import preallocated_cache, take_in
from ppomax.rollout.sampler import SPARE, cache_shape
from ppomax.stages.plan import GIB, plan
from ppomax.stages.plan_memory import (
    Machine,
    Pass,
    Role,
    cache,
    held,
    layer_activations,
    microbatch,
    player_bytes,
)
from ppomax.stages.plan_phases import host_memory, phases
from ppomax.types import SetupError, token_batch
from stages.planned import CPU, OPTIMISER, numel, role, small


@pytest.mark.parametrize(
    "compute", [{}, {"lora_rank": 4}, {"train_layers": 1}, {"train_layers": 2, "lora_rank": 3}], ids=str
)
@pytest.mark.parametrize("scalar", [False, True])
def test_trained_parameters_are_the_players(compute: dict[str, int], scalar: bool) -> None:
    rank = compute.get("lora_rank")
    options: dict[str, Any] = {
        "train_layers": compute.get("train_layers"), "trained": True, "lora": Lora(rank, 16) if rank else None,
    }  # fmt: skip
    torch_model = LlamaScalar(small(num_labels=1)) if scalar else LlamaForCausalLM(small())
    player = (Scalar if scalar else Policy)(torch_model, **options)
    counted = held(role("policy", scalar=scalar), PlanConfig(compute=ModelConfig(**compute)))
    assert counted.trained == sum(p.numel() for p in player.trained_parameters().values())
    assert counted.owned == numel(player.model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masters_and_moments_are_the_optimisers(dtype: torch.dtype) -> None:
    model = LlamaForCausalLM(small()).to(dtype)
    optimiser = Optimiser(dict(model.named_parameters()), **OPTIMISER)
    for parameter in model.parameters():
        parameter.grad = None
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.float().sum().backward()
    gradients = sum(m.grad.numel() * m.grad.element_size() for m in optimiser.masters.values() if m.grad is not None)
    optimiser.step(1e-4)
    counted = player_bytes(role(), PlanConfig(), Machine(1, 0, dtype.itemsize, True), "none")
    assert gradients == counted.gradients
    # One step counter of 4 bytes for each tensor is beneath notice, and not counted.
    counters = 4 * len(optimiser.masters)
    weights = counted.weights if dtype == torch.float32 else counted.masters
    assert optimiser.bytes() == weights + counted.moments + counters
    own = {t.data_ptr(): t.numel() * t.element_size() for t in optimiser.state_tensors().values()}
    assert sum(own.values()) == weights + counted.moments + counters


def test_what_players_have_in_common_is_counted_once() -> None:
    shape = role().shape
    lora = PlanConfig(compute=ModelConfig(lora_rank=4))
    assert held(role("reference", trained=False, same_as="policy"), lora).owned == 0
    assert held(role("reference", trained=False), lora).owned == shape.causal
    assert held(role("reward", scalar=True, trained=False, same_as="critic"), lora).owned == shape.hidden
    upper = PlanConfig(compute=ModelConfig(train_layers=1))
    assert held(role("reference", trained=False), upper).owned == shape.layer + shape.rest
    assert held(role("reward", scalar=True, trained=False, shares_trunk=False), upper).owned == shape.scalar


def test_directories_of_one_architecture_share_their_lower_layers(tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("policy", "reward", "other")]
    for name, layers in zip(names, (3, 3, 4), strict=True):
        small(num_hidden_layers=layers).save_pretrained(name)
    policy, reward, other = names
    upper = ModelConfig(train_layers=1)
    found = plan(PlanConfig(policy=policy, reward=(reward,), gpus="1x24g", compute=upper))
    shape = role().shape
    assert found["players"]["reference"]["weights"] == 2 * (shape.layer + shape.rest)
    assert found["players"]["reward"]["weights"] == 2 * (shape.layer + shape.rest + shape.hidden)
    with pytest.raises(SetupError, match="policy and critic of different sizes"):
        plan(PlanConfig(policy=policy, reward=(other,), gpus="1x24g", compute=upper))


def test_sharded_state_by_hand() -> None:
    machine, n = Machine(8, 80 * GIB, 2, packs=False), 6_738_415_616
    policy = Role("policy", shape_sized("7b", 7e9), False, True)
    none, zero2, zero3 = (player_bytes(policy, PlanConfig(), machine, shard) for shard in ("none", "zero2", "zero3"))
    assert (none.weights, none.masters, none.moments, none.gradients) == (2 * n, 4 * n, 8 * n, 4 * n)
    for divided in (zero2, zero3):
        assert (divided.weights, divided.masters, divided.moments) == (0, 4 * n / 8, 8 * n / 8)
        assert divided.gradients == 4 * n / 8
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert (zero2.gathered, zero3.gathered) == (2 * n, 2 * (2 * layer + 2 * 32000 * 4096))
    frozen = Role("reference", policy.shape, False, False)
    of_frozen = [player_bytes(frozen, PlanConfig(), machine, shard).weights for shard in ("none", "zero2", "zero3")]
    assert of_frozen == [2 * n, 2 * n, 2 * n / 8]


def test_what_is_frozen_and_shared_is_not_divided_by_zero3() -> None:
    machine, n, m = Machine(8, 80 * GIB, 2, packs=False), 39_976_960, 6_738_415_616
    shape = shape_sized("7b", 7e9)
    policy, frozen = Role("policy", shape, False, True), Role("reference", shape, False, False)
    adapters = PlanConfig(compute=ModelConfig(lora_rank=16))
    # Rank 16 beside q, k, v, o (4096 × 4096) and gate, up, down (4096 × 11008) of 32 layers.
    assert n == 32 * 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    found = player_bytes(policy, adapters, machine, "zero3")
    assert (found.weights, found.masters, found.gathered) == (2 * m, 4 * n / 8, 2 * n)
    players = {"policy": found, "reference": player_bytes(frozen, adapters, machine, "zero3")}
    assert phases([policy, frozen], players, adapters, machine, "zero3")["generate"]["gathered weights"] == 2 * n
    exact = PlanConfig(kl=KLConfig(estimator="full"))
    assert player_bytes(frozen, exact, machine, "zero3").weights == 2 * m
    assert player_bytes(frozen, PlanConfig(), machine, "zero3").weights == 2 * m / 8


def test_what_is_offloaded_lies_in_the_hosts_memory() -> None:
    machine, n = Machine(8, 80 * GIB, 2, packs=False), 6_738_415_616
    shape, config = shape_sized("7b", 7e9), PlanConfig(compute=ModelConfig(offload=True), ema=0.9)
    policy, frozen = Role("policy", shape, False, True), Role("reference", shape, False, False)
    # Masters, two moments, gradients and the average: 20 bytes a parameter; the reference's weights with zero3 only.
    for shard, of_reference in (("zero2", 0), ("zero3", 2 * n / 8)):
        players = {"policy": player_bytes(policy, config, machine, shard)}
        players["reference"] = player_bytes(frozen, config, machine, shard)
        found = players["policy"]
        assert (found.always, found.gradients, found.host) == (0, 0, 20 * n / 8)
        assert players["reference"].always == 2 * n - 8 * of_reference
        assert found.gathered == player_bytes(policy, PlanConfig(), machine, shard).gathered > 0
        host = host_memory([policy, frozen], players, config, machine, shard)
        assert host == {"offloaded": 20 * n + 8 * of_reference}
    alone = player_bytes(policy, config, Machine(1, 80 * GIB, 2, packs=False), "none")
    assert (alone.host, alone.masters) == (0, 4 * n)
    shared = PlanConfig(compute=ModelConfig(offload=True, lora_rank=16))
    assert player_bytes(policy, shared, machine, "zero3").weights == 2 * n


def test_the_copy_that_is_written_in_the_background_is_counted_where_it_lies() -> None:
    config, roles = PlanConfig(save=SaveConfig(background=True), ema=0.9), [role(), role("critic", scalar=True)]
    gpu = Machine(1, 80 * GIB, 4, packs=False)
    of_policy, of_critic = (held(r, config).trained for r in roles)
    copy = 3 * (16 * of_policy + 12 * of_critic)  # the copy, and its file twice
    for machine in (CPU, gpu):
        players = {r.name: player_bytes(r, config, machine, "none") for r in roles}
        found = phases(roles, players, config, machine, "none")
        for phase in ("generate", "score", "train"):
            assert found[phase].get("background save", 0) == (copy if machine is CPU else 0)
        host = host_memory(roles, players, config, machine, "none")
        assert host == ({} if machine is CPU else {"background save": copy})


@pytest.mark.parametrize(("shard", "offload", "copies"), [("none", False, 8), ("zero2", False, 1), ("zero3", True, 1)])
def test_of_a_divided_run_each_process_copies_its_part(shard: str, offload: bool, copies: int) -> None:
    machine, n = Machine(8, 80 * GIB, 2, packs=False), 6_738_415_616
    config = PlanConfig(save=SaveConfig(background=True), ema=0.9, compute=ModelConfig(offload=offload))
    policy = Role("policy", shape_sized("7b", 7e9), False, True)
    players = {"policy": player_bytes(policy, config, machine, shard)}
    host = host_memory([policy], players, config, machine, shard)
    assert host["background save"] == copies * 16 * n + 8 * 2 * FILE_BYTES


@pytest.mark.parametrize("shard", ["zero2", "zero3"])
def test_one_player_at_a_time_is_gathered(shard: str) -> None:
    machine, config = Machine(4, 0, 2, packs=False), PlanConfig()
    roles = [role(), role("critic", scalar=True), role("reference", trained=False)]
    players = {r.name: player_bytes(r, config, machine, shard) for r in roles}
    found = phases(roles, players, config, machine, shard)
    assert players["critic"].gathered > 0
    for phase in ("score", "train"):
        assert found[phase]["gathered weights"] == max(p.gathered for p in players.values())


# activations, cache, batches


class Saved:
    """Bytes of what autograd keeps, each storage once, parameters aside."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.sizes: dict[int, int] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [None, 4])
def test_a_layers_activations_are_what_autograd_keeps(dtype: torch.dtype, rank: int | None) -> None:
    """A third layer's share: five responses of 24 tokens to prompts of 16, packed."""
    kept = []
    for layers in (2, 3):
        model = LlamaForCausalLM(small(num_hidden_layers=layers)).to(dtype).eval()
        policy = Policy(model, train_layers=None, trained=True, lora=Lora(rank, 16) if rank else None)
        batch = token_batch([[i + 1] * 16 for i in range(5)], [[7] * 24] * 5)
        saved = Saved(model)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            scores = policy(batch)
        assert scores.logprobs_BT.requires_grad
        kept.append(saved.bytes)
    part = Pass(5, 5 * 40, 5 * 24, keys=5 * 16 + 5 * 40, scores=5 * 16 * 16 + 5 * 24 * 40, pairs=0, alone=True)
    counted = layer_activations(role().shape, part, dtype.itemsize, adapters=rank is not None)
    assert counted == pytest.approx(kept[1] - kept[0], rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_is_the_samplers(dtype: torch.dtype) -> None:
    policy = Policy(LlamaForCausalLM(small()).to(dtype), train_layers=None, trained=False)
    rows, prompt, response = 6, 5, 7
    real, spare = [], response // SPARE
    for waiting in (0, 1):
        shape = cache_shape(rows + waiting, prompt, response, max_rows=rows, max_tokens=None)
        assert shape == (rows, prompt + response + waiting * spare)
        made, prefilled = preallocated_cache(3, *shape), DynamicCache()
        ids = torch.ones(rows, prompt, dtype=torch.long)
        with torch.inference_mode():
            policy.next_states(ids, torch.ones_like(ids), torch.arange(prompt)[None].expand(rows, -1), prefilled)
            take_in(made, prefilled, torch.arange(rows), prompt)
        real.append(sum(t.numel() * t.element_size() for layer in made.layers for t in (layer.keys, layer.values)))
    alone, taken = real
    config = PlanConfig(
        max_prompt_tokens=prompt, rollout_batch=24, minibatch=24,
        sampling=SamplingConfig(max_new_tokens=response, max_rows=rows),
    )  # fmt: skip
    assert cache(role(), config, Machine(1, 0, dtype.itemsize, True)) == taken
    # Four devices decode 24 rows six at a time, so that nobody waits; sixteen devices two at a time.
    assert cache(role(), config, Machine(4, 0, dtype.itemsize, True)) == alone
    assert cache(role(), config, Machine(16, 0, dtype.itemsize, True)) == alone / 3
    # A third of the tokens, a third of the rows.
    narrow = config.model_copy(update={"sampling": config.sampling.model_copy(update={"max_cache_tokens": 2 * 13})})
    assert cache(role(), narrow, Machine(1, 0, dtype.itemsize, True)) == taken / 3


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("budget", [16, 100, 333, 5_000])
def test_microbatches_are_as_large_as_the_largest_real_one(samples: int, packs: bool, budget: int) -> None:
    P, R, minibatch = 20, 30, 16
    prompts = [[i // samples] * P for i in range(minibatch)]
    responses = [[1] * R for _ in range(minibatch)]
    if packs:
        groups = prompt_batches(prompts, responses, budget=budget)
        real = max(len({prompts[i][0] for i in group}) * P + len(group) * R for group in groups)
    else:
        groups = token_budget_batches([P + R] * minibatch, budget=budget, max_rows=minibatch)
        real = max(len(group) * (P + R) for group in groups)
    config = PlanConfig(
        max_prompt_tokens=P, rollout_batch=16, minibatch=minibatch, samples_per_prompt=samples,
        sampling=SamplingConfig(max_new_tokens=R), compute=ModelConfig(tokens_per_microbatch=budget),
    )  # fmt: skip
    part = microbatch(config, Machine(1, 0, 4, packs))
    # The planner fills the budget; a real microbatch of whole rows (packed: a prompt's together) falls short of it.
    assert real <= part.tokens < real + P + R * (samples if packs else 1)
    assert part.alone == (len(groups) == 1)


def test_phases_add_up_and_checkpointing_keeps_less() -> None:
    roles = [role(), role("critic", scalar=True), role("reference", trained=False), role("reward", trained=False)]
    kept = []
    for checkpointing in (False, True):
        config = PlanConfig(compute=ModelConfig(gradient_checkpointing=checkpointing))
        players = {r.name: player_bytes(r, config, CPU, "none") for r in roles}
        found = phases(roles, players, config, CPU, "none")
        assert {*found} == {"load", "generate", "score", "train", "save"}
        # Masters and moments of both are less than one file, which is held twice.
        assert found["save"]["working"] == 2 * 12 * (held(roles[0], config).trained + held(roles[1], config).trained)
        assert found["train"]["always"] == sum(p.always for p in players.values())
        assert found["train"]["gradients"] == players["policy"].gradients + players["critic"].gradients
        kept.append(found["train"]["activations"])
    config = PlanConfig()
    layer = layer_activations(role().shape, microbatch(config, CPU), 4)
    inputs = microbatch(config, CPU).tokens * 64 * 4
    assert kept[0] - kept[1] == pytest.approx(3 * layer - (layer + 3 * inputs))


def test_a_player_that_begins_as_another_one_is_not_loaded_again() -> None:
    """Rewards, reference, policy, critic: with everything in common but adapters, or but the upper layers."""
    shape = shape_sized("7b", 7e9)
    roles = [
        Role("policy", shape, False, True), Role("critic", shape, True, True),
        Role("reference", shape, False, False, same_as="policy"), Role("reward", shape, True, False, same_as="critic"),
    ]  # fmt: skip
    P, S, layer = shape.causal, shape.scalar, shape.layer

    def load(shard: str = "none", devices: int = 1, **compute: Any) -> float:
        config, where = PlanConfig(compute=ModelConfig(**compute)), Machine(devices, 80 * GIB, 2, packs=False)
        players = {r.name: player_bytes(r, config, where, shard) for r in roles}
        return sum(phases(roles, players, config, where, shard)["load"].values())

    adapters = 32 * 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert load() == 2 * (2 * S + 2 * P)
    assert load(lora_rank=16) == 2 * (S + P + adapters + adapters + 4096)
    below = shape.embedding + 24 * layer
    # While the policy is there the reward model still stands whole; then its lower layers are the policy's.
    assert load(train_layers=8) == 2 * max(S + P + (P - below), 2 * S + 2 * P - 3 * below)
    # Divided among eight as soon as each is loaded: the critic whole beside shards, float32 ones of the policy.
    assert load("zero3", 8) == 2 * S / 8 + 2 * P / 8 + 4 * P / 8 + 2 * S
