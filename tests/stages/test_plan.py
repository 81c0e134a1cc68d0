"""The planner: operations and time, layouts, knobs, bad input, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from ppomax.cli import main
from ppomax.config import ModelConfig, PlanConfig, SamplingConfig
from ppomax.models.lora import Lora
from ppomax.models.players import Policy
from ppomax.stages.plan import plan
from ppomax.stages.plan_time import flops
from ppomax.types import SetupError, token_batch
from stages.planned import CPU, role, small


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
    # The frozen bases of adapters stay whole on every device: to divide them, everything is trained.
    assert change.endswith("--compute.shard zero3, everything trained, checkpointing")
    count, everything = int(change.split()[0]), {"gradient_checkpointing": True}
    for gpus, fits in ((count, True), (count // 2, False)):
        divided = config.model_copy(
            update={
                "gpus": f"{gpus}x24g",
                "shard": "zero3" if gpus > 1 else None,
                "compute": config.compute.model_copy(update=everything),
            }
        )
        assert plan(divided)["layouts"][0]["fits"] is fits


def test_how_a_run_divides_its_players_is_one_of_its_settings() -> None:
    def shards(**compute: Any) -> set[str]:
        found = plan(PlanConfig(model_size="7b", gpus="8x80g", compute=ModelConfig(**compute)))
        return {layout["name"].rsplit(", ")[-1] for layout in found["layouts"]}

    default = ModelConfig().shard
    other = next(shard for shard in ("zero3", "none") if shard != default)
    assert shards() == {"none", "zero2", "zero3"} and shards(shard=other) == {other}


def test_offload_is_a_knob_of_several_gpus() -> None:
    def knobs(gpus: str, **compute: Any) -> dict[str, float]:
        config = PlanConfig(model_size="7b", gpus=gpus, compute=ModelConfig(**compute))
        return {knob["change"]: knob["peak"] for knob in plan(config)["knobs"]}

    assert "--compute.offload" not in knobs("1x24g") and "--compute.offload" not in knobs("8x24g", offload=True)
    assert "--compute.offload" in knobs("8x24g")


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
