"""The planner: its counts against real models, caches, optimisers, passes and batches; layouts, knobs, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM
from transformers import LlamaForSequenceClassification as LlamaScalar

from ppomax.cli import main
from ppomax.config import ModelConfig, PlanConfig, SamplingConfig
from ppomax.data.batches import prompt_batches, token_budget_batches
from ppomax.engine.optimiser import Optimiser
from ppomax.models.attention import attention_for
from ppomax.models.lora import Lora
from ppomax.models.players import Policy, Scalar
from ppomax.models.shapes import shape_named, shape_of, shape_sized
from ppomax.rollout.cache import preallocated_cache
from ppomax.stages.plan import GIB, plan
from ppomax.stages.plan_memory import (
    Machine,
    Pass,
    Role,
    cache,
    held,
    layer_activations,
    microbatch,
    phases,
    player_bytes,
)
from ppomax.stages.plan_time import flops
from ppomax.types import SetupError, token_batch
from tests.models.architectures import CONFIGS

CPU = Machine(1, 24 * GIB, 4, packs=True)
SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 500, "tie_word_embeddings": True, "pad_token_id": 0,
}  # fmt: skip
OPTIMISER: dict[str, Any] = {"weight_decay": 0.0, "betas": (0.9, 0.95), "eps": 1e-8, "max_grad_norm": 1.0}


def small(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**SMALL, **changes}, attn_implementation=attention_for(torch.device("cpu")))


def role(name: str = "policy", *, scalar: bool = False, trained: bool = True, **more: Any) -> Role:
    return Role(name, shape_of(small(), "small"), scalar, trained, **more)


def numel(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# shapes


@pytest.mark.parametrize(
    ("size", "published"),
    [
        ("135m", 134_515_008), ("1.1b", 1_100_048_384), ("7b", 6_738_415_616), ("8b", 8_030_261_248),
        ("13b", 13_015_864_320), ("70b", 68_976_648_192),
    ],
)  # fmt: skip
def test_sizes_are_those_of_the_published_models(size: str, published: int) -> None:
    assert shape_sized(size, 0).causal == published


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_parameters_are_those_of_the_real_model(name: str) -> None:
    config = CONFIGS[name]()
    shape = shape_of(config, name)
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(config)
    assert shape.causal == numel(causal)
    if "gemma" not in name and "gpt" not in name:
        config.num_labels = 1
        with torch.device("meta"):
            assert shape.scalar == numel(AutoModelForSequenceClassification.from_config(config))


def test_a_layer_of_llama_by_hand() -> None:
    shape = shape_of(small(), "small")
    # Queries and output 64 × 64, keys and values 64 × 32, three maps 64 × 176; two norms of 64.
    assert shape.matrices == 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 176
    assert shape.layer == shape.matrices + 2 * 64
    assert shape.rank_one == 2 * 128 + 2 * 96 + 3 * 240
    assert (shape.embedding, shape.unembedding, shape.rest) == (500 * 64, 0, 64)
    assert shape.causal == 3 * shape.layer + 500 * 64 + 64
    assert shape.scalar == shape.causal + 64
    assert shape.gated and not shape_of(CONFIGS["gpt2"](), "gpt2").gated


@pytest.mark.parametrize("millions", [30, 135, 250, 500, 2_000, 5_000, 10_000, 20_000, 50_000, 180_000])
def test_a_size_between_is_near_what_was_asked(millions: int) -> None:
    shape = shape_sized(f"{millions}m", millions * 1e6)
    assert shape.causal == pytest.approx(millions * 1e6, rel=0.01)
    assert shape.hidden == shape.heads * shape.head_dim and shape.heads % shape.kv_heads == 0


def test_a_directory_needs_its_config_alone(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert shape_named(str(tmp_path)).causal == shape_of(small(), "small").causal


# state


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
    counted = layer_activations(role().shape, part, dtype.itemsize, rank=rank)
    assert counted == pytest.approx(kept[1] - kept[0], rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_is_the_samplers(dtype: torch.dtype) -> None:
    policy = Policy(LlamaForCausalLM(small()).to(dtype), train_layers=None, trained=False)
    rows, prompt, response = 6, 5, 7
    real = preallocated_cache(3, prompt + response)
    ids = torch.ones(rows, prompt, dtype=torch.long)
    with torch.inference_mode():
        policy.next_logits(ids, torch.ones_like(ids), torch.arange(prompt)[None].expand(rows, -1), real)
    taken = sum(t.numel() * t.element_size() for layer in real.layers for t in (layer.keys, layer.values))
    config = PlanConfig(
        max_prompt_tokens=prompt, rollout_batch=24, minibatch=24,
        sampling=SamplingConfig(max_new_tokens=response, max_rows=rows),
    )  # fmt: skip
    assert cache(role(), config, Machine(1, 0, dtype.itemsize, True)) == taken
    # Four devices decode 24 rows six at a time as well, sixteen devices two at a time.
    assert cache(role(), config, Machine(4, 0, dtype.itemsize, True)) == taken
    assert cache(role(), config, Machine(16, 0, dtype.itemsize, True)) == taken / 3


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


# time


@pytest.mark.parametrize(
    "compute",
    [{}, {"gradient_checkpointing": True}, {"lora_rank": 1}, {"train_layers": 1}],
    ids=["full", "checkpointing", "lora", "upper"],
)
def test_operations_are_those_of_a_real_pass(compute: dict[str, Any]) -> None:
    """torch counts the products of a forward and a backward pass of a policy on six rows of 16 + 24 tokens."""
    rank = compute.get("lora_rank")
    policy = Policy(
        LlamaForCausalLM(small()), train_layers=compute.get("train_layers"), trained=True,
        checkpointing=compute.get("gradient_checkpointing", False), lora=Lora(rank, 16) if rank else None,
    )  # fmt: skip
    batch = token_batch([[i + 1] * 16 for i in range(6)], [[7] * 24] * 6)
    if policy.train_layers is not None:
        batch = batch.with_trunk(policy.trunk(batch))
    with FlopCounterMode(display=False) as counter:
        policy(batch).logprobs_BT.sum().backward()
    config = PlanConfig(
        max_prompt_tokens=16, rollout_batch=6, minibatch=6, sampling=SamplingConfig(max_new_tokens=24),
        compute=ModelConfig(**compute),
    )  # fmt: skip
    counted = flops([role()], config, CPU)["train"]
    # Not counted: adapters' own products, gradients that the lowest layer needs not, and that torch recomputes a layer
    # without its last product.
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.06)


def test_time_by_hand() -> None:
    found = plan(
        PlanConfig(
            model_size="7b", gpus="4x80g", tflops=100, bandwidth=1000, rollout_batch=64, max_prompt_tokens=100,
            sampling=SamplingConfig(max_new_tokens=200, max_rows=8),
        )
    )  # fmt: skip
    n, tokens = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 64 * 300
    pairs, vocabulary = 64 * 300**2 / 2, 2 * 32000 * 4096 * 64 * 200
    forward = 2 * n * tokens + 32 * 4 * 4096 * pairs
    assert found["flops"]["score"] == pytest.approx(4 * forward + 2 * vocabulary)
    assert found["seconds"]["score"] == pytest.approx(found["flops"]["score"] / 4e14)
    # Sixteen rows a device, eight at a time: weights are read 2 × 200 times, and the cache as it grows.
    weights = (n + 32 * 2 * 4096 + 32000 * 4096) * 2 * 400
    cached = 16 * 200 * (100 + 100) * 2 * 32 * 4096 * 2
    assert found["seconds"]["generate"] == pytest.approx((weights + cached) / 1e12)


# layouts


def test_the_first_layout_that_fits_is_recommended() -> None:
    def shown(gpus: str, **more: Any) -> tuple[str, bool]:
        found = plan(PlanConfig(model_size="1.3b", gpus=gpus, **more))
        peak = next(one["peak"] for one in found["layouts"] if one["name"] == found["shown"])
        assert peak == max(sum(parts.values()) for parts in found["phases"].values())
        assert found["recommended"] == (peak <= found["machine"]["usable"])
        return found["shown"], found["recommended"]

    assert shown("1x1000g") == ("full", True)
    assert shown("8x1000g") == ("full, none", True)
    assert shown("8x1000g", shard="zero2") == ("full, zero2", True)
    assert shown("8x40g") == ("full, zero2", True)
    name, fits = shown("1x4g")
    assert not fits and "checkpointing" in name


def test_a_knob_does_what_it_says() -> None:
    config = PlanConfig(model_size="7b", gpus="1x24g", sampling=SamplingConfig(max_new_tokens=512))
    found = plan(config)
    assert not found["recommended"] and found["knobs"]
    peaks = {knob["change"]: knob["peak"] for knob in found["knobs"]}
    lora = {"gradient_checkpointing": True, "lora_rank": 16}
    turned = config.model_copy(
        update={
            "compute": config.compute.model_copy(update=lora),
            "sampling": SamplingConfig(max_new_tokens=512, max_rows=16),
        }
    )
    assert peaks["--sampling.max-rows 16"] == plan(turned)["layouts"][0]["peak"]
    (change,) = [knob["change"] for knob in found["knobs"] if "GPUs" in knob["change"]]
    count = int(change.split()[0])
    for gpus, fits in ((count, True), (count // 2, False)):
        divided = config.model_copy(
            update={
                "gpus": f"{gpus}x24g",
                "shard": "zero3" if gpus > 1 else None,
                "compute": config.compute.model_copy(update=lora),
            }
        )
        assert plan(divided)["layouts"][0]["fits"] is fits


# bad input and the command


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus": "8x80g", "policy": "runs/no/such"}, "no such directory"),
        ({"reward": ("my.rewards:score",)}, "critic.init: found 'reward', but no reward is a model"),
        ({"reward_size": "1.3b", "model_size": None}, "reward_size: found a size without model_size"),
        ({"prompt_tokens": 600}, "prompt_tokens: found a mean of 600, expected at most the longest, 512"),
        ({"response_tokens": 65}, "response_tokens: found a mean of 65"),
        ({"gpus": "1x80g", "shard": "zero3"}, "shard: found zero3 on one device"),
        ({"minibatch": 48}, "minibatch: found 48, expected a divisor of rollout_batch 128"),
        ({"compute": ModelConfig(train_layers=33)}, "compute.train_layers: found 33, expected 1 to 32"),
        ({"compute": ModelConfig(train_layers=3), "reward_size": "3b"}, "policy and critic of different sizes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_planned_is_refused(settings: dict[str, Any], message: str) -> None:
    size = None if "policy" in settings else "7b"
    with pytest.raises(SetupError) as refused:
        plan(PlanConfig(**{"model_size": size, "gpus": "8x80g", **settings}))
    assert message in str(refused.value)


def test_models_that_are_not_dense_stacks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mixtral", "num_local_experts": 8, "hidden_size": 64})
    )
    with pytest.raises(SetupError, match="expected one stack of equal, dense decoder layers"):
        shape_named(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SetupError, match=r"config\.json cannot be read"):
        shape_named(str(tmp_path))


@pytest.mark.parametrize(
    "words", [["--gpus", "8x"], ["--gpus", "0x80g"], ["--model-size", "7"], ["--model-size", "0b"]]
)
def test_a_malformed_size_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert words[1] in error and "such as" in error


def test_the_command_takes_a_run_s_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ppo.yaml"
    file.write_text("recipe: grpo\nrollout_batch: 64\ncompute: {lora_rank: 8}\n")
    words = ["plan", "--config", str(file), "--model-size", "7b", "--gpus", "2x80g"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {*found["players"]} == {"policy", "reference", "reward"}
    assert found["layouts"][0]["name"] == "lora 8, none"
    assert found["seconds"] is None
    assert main([*words, "--tflops", "100"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for part in ("Llama-2-7B", "2 × 80.0 GiB", "recommended", "lora 8", "generate", "100 TFLOP/s"):
        assert part in out


def test_this_machine_is_planned_for_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppomax.stages.doctor.SECONDS_PER_MEASUREMENT", 0.05)
    found = plan(PlanConfig(model_size="135m", compute=ModelConfig(device="cpu", dtype="float32")))
    assert found["machine"]["devices"] == 1 and found["machine"]["packed"]
    assert found["machine"]["tflops"] > 0 and found["machine"]["bandwidth"] > 0
    assert set(found["seconds"]) == {"generate", "score", "train"}
