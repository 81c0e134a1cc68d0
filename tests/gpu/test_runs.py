"""Whole runs on the GPU: as on the processor, resumed exactly, and clear about memory that runs out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stages.conftest import Toys, Trained
from stages.toy import (
    CALM,
    ROUNDING,
    expect_alike,
    expect_exact_resume,
    metrics,
    ppo_config,
    recipe_settings,
    reward_config,
    sft_config,
    stopping_after,
    write_rows,
)

from ppomax.cli import main
from ppomax.config import CriticConfig, ModelConfig, PPOConfig, QuickstartConfig, SaveConfig
from ppomax.engine.background import copied
from ppomax.monitor.log import read_metrics
from ppomax.stages.ppo import ppo
from ppomax.stages.quickstart import quickstart
from ppomax.stages.reward import reward
from ppomax.stages.sft import sft

GPU = ModelConfig(dtype="float32", device="cuda")
CPU = ModelConfig(dtype="float32", device="cpu")
HALF = ModelConfig(dtype="bfloat16", device="cuda")
# Beside what is rounding alone: processors pack batches, so that what is read is counted differently.
COUNTS = (*ROUNDING, "tokens/", "flops/")


def expect_as_on_the_processor(folder: Path, one: str = "cpu", other: str = "gpu") -> None:
    expect_alike(folder / one, folder / other, rel=1e-3, abs=1e-4, but=COUNTS)


def rewarded(trained: Trained) -> dict[str, Any]:
    critic = CriticConfig(init="reward", pretrain_iterations=1, optim=CALM)
    return {"reward": (trained.reward,), "critic": critic, "optim": CALM}


@pytest.mark.parametrize("verb", ["sft", "reward"])
def test_training_goes_as_on_the_processor(verb: str, trained: Trained, toys: Toys, tmp_path: Path) -> None:
    for name, compute in (("cpu", CPU), ("gpu", GPU)):
        if verb == "sft":
            sft(sft_config(tmp_path / name, toys.dialogues, epochs=0.5, compute=compute, optim=CALM))
        else:
            reward(reward_config(tmp_path / name, trained.sft, toys.pairs, epochs=1, compute=compute, optim=CALM))
    expect_as_on_the_processor(tmp_path)


@pytest.mark.parametrize("layout", [{}, {"lora_rank": 2}, {"gradient_checkpointing": True}])
def test_ppo_goes_as_on_the_processor(layout: dict[str, Any], trained: Trained, toys: Toys, tmp_path: Path) -> None:
    learn = {"ptx_data": (toys.dialogues,), "ptx_weight": 0.5, "ptx_batch": 3, "whiten_advantages": True}
    for name, compute in (("cpu", CPU), ("gpu", GPU)):
        compute = compute.model_copy(update=layout)
        ppo(ppo_config(tmp_path / name, trained.sft, toys.prompts, compute=compute, **rewarded(trained), **learn))
    expect_as_on_the_processor(tmp_path)


@pytest.mark.parametrize("recipe", ["rloo", "trpo", "grpo"])
def test_other_recipes_go_as_on_the_processor(recipe: str, trained: Trained, toys: Toys, tmp_path: Path) -> None:
    for name, compute in (("cpu", CPU), ("gpu", GPU)):
        settings = {**recipe_settings(recipe, CALM), "minibatch": 16, "compute": compute}
        ppo(ppo_config(tmp_path / name, trained.sft, toys.prompts, **settings))
    expect_as_on_the_processor(tmp_path)


def test_the_shared_trunk_goes_as_on_the_processor(trained_top: Trained, toys: Toys, tmp_path: Path) -> None:
    for name, compute in (("cpu", CPU), ("gpu", GPU)):
        compute = compute.model_copy(update={"train_layers": 1})
        ppo(ppo_config(tmp_path / name, trained_top.sft, toys.prompts, compute=compute, **rewarded(trained_top)))
    expect_as_on_the_processor(tmp_path)


def test_in_bfloat16_the_first_ratio_is_one_and_the_row_says_what_the_gpu_did(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    settings = {**rewarded(trained), "critic": CriticConfig(init="reward", pretrain_iterations=0, optim=CALM)}
    ppo(ppo_config(tmp_path / "run", trained.sft, toys.prompts, minibatch=16, compute=HALF, **settings))
    row = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert row["ratio_max"] == 1.0 and row["kl_per_sequence"] == 0.0
    assert 0 < row["peak_memory_gib"] < 4 and row["peak_flops_per_second"] > 1e12


@pytest.mark.parametrize("compute", [GPU, HALF], ids=["float32", "bfloat16"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    compute: ModelConfig, trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    settings = {"iterations": 5, "compute": compute, "save": SaveConfig(every=1)}
    expect_exact_resume(ppo_config(tmp_path / "whole", trained.sft, toys.prompts, **settings), ("final", "critic"))


@pytest.mark.parametrize(("first", "then"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_checkpoint_moves_between_processor_and_gpu(
    first: str, then: str, trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    def config(name: str, device: str) -> PPOConfig:
        compute = ModelConfig(dtype="float32", device=device)
        critic = CriticConfig(init="policy", pretrain_iterations=1, optim=CALM)
        settings = {"iterations": 4, "save": SaveConfig(every=1), "optim": CALM, "critic": critic}
        return ppo_config(tmp_path / name, trained.sft, toys.prompts, compute=compute, **settings)

    ppo(config("whole", first))
    with pytest.raises(KeyboardInterrupt):
        ppo(config("parts", first), reward=stopping_after(2))
    ppo(config("parts", then), resume=True)
    expect_as_on_the_processor(tmp_path, "whole", "parts")
    # What the first device did is there as it was, not done again.
    assert metrics(tmp_path / "parts")[:2] == metrics(tmp_path / "whole")[:2]


def test_the_quickstart_runs_whole(tmp_path: Path) -> None:
    summary = quickstart(QuickstartConfig(run_dir=tmp_path / "quickstart", model="tiny"))
    assert (tmp_path / "quickstart" / "report.html").exists() and summary["iterations"] > 0


def test_memory_of_the_gpu_that_runs_out_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i} " * 115, "response": "yes"} for i in range(100, 200)]
    write_rows(Path("long.jsonl"), rows)
    words = (
        "sft --model tiny --data long.jsonl --heldout 0 --batch-size 64 --run-dir run --compute.dtype float32 "
        "--compute.device cuda --compute.tokens-per-microbatch 64000"
    )
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 150 * 2**20) / total)
    try:
        assert main(words.split()) == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    said = " ".join(capsys.readouterr().err.split())
    assert "error: out of memory in train, a microbatch of 64 × 4" in said
    assert "Lower --compute.tokens-per-microbatch, --compute.train-layers, or free some memory" in said


def test_copies_for_a_save_in_the_background_are_in_the_hosts_memory() -> None:
    copies = copied({"weight": torch.ones(3, device="cuda")})
    assert copies["weight"].device.type == "cpu" and copies["weight"].tolist() == [1, 1, 1]
