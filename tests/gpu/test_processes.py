"""Two processes and NCCL do on a GPU what one process does there, to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parity.processes import run, run_in_two
from stages.conftest import Toys, Trained
from stages.toy import CALM, expect_alike, ppo_config, reward_config, sft_config

from gpu.processes import free_port, worker
from gpu.test_runs import GPU, rewarded
from ppomax.config import ModelConfig, SaveConfig
from ppomax.engine.checkpoint import checkpoints, load_checkpoint

SMALL = GPU.model_copy(update={"tokens_per_microbatch": 160})
SHARDED: dict[str, dict[str, Any]] = {
    "zero3": {"shard": "zero3"}, "zero3 offload": {"shard": "zero3", "offload": True}, "none": {"shard": "none"},
    "zero2 checkpointing": {"shard": "zero2", "gradient_checkpointing": True}, "lora": {"lora_rank": 2},
}  # fmt: skip


def runs(folder: Path, trained: Trained, toys: Toys) -> dict[str, Any]:
    """Name → configuration."""

    def compute(**changes: Any) -> ModelConfig:
        return SMALL.model_copy(update=changes)

    learn = {"ptx_data": (toys.dialogues,), "ptx_weight": 0.5, "ptx_batch": 3, "whiten_advantages": True}
    by_ppo = {
        name: ppo_config(
            folder / name.replace(" ", "-"), trained.sft, toys.prompts, compute=compute(**changes),
            **rewarded(trained), **learn,
        )
        for name, changes in SHARDED.items()
    }  # fmt: skip
    return {
        "sft": sft_config(folder / "sft", toys.dialogues, epochs=0.25, compute=compute(shard="zero2"), optim=CALM),
        "reward": reward_config(
            folder / "reward", trained.sft, toys.pairs, epochs=0.5, compute=compute(shard="zero3"), optim=CALM,
            save=SaveConfig(every=1, keep=9, background=True),
        ),
        **by_ppo,
    }  # fmt: skip


NAMES = [*runs(Path(), Trained(Path(), Path()), Toys("", "", ""))]


@pytest.fixture(scope="module")
def both(
    trained: Trained, toys: Toys, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same runs by one process and by two."""
    folder = tmp_path_factory.mktemp("processes")
    one, two = (runs(folder / name, trained, toys) for name in ("one", "two"))
    for config in one.values():
        run(config)
    run_in_two(folder, [(config, free_port()) for config in two.values()], worker, start="spawn")
    return one, two


@pytest.mark.timeout(1200)  # the first test waits for all runs
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_do_what_one_does(both: tuple[dict[str, Any], dict[str, Any]], name: str) -> None:
    expect_alike(both[0][name].run_dir, both[1][name].run_dir, rel=1e-4, abs=1e-4)


def test_what_they_saved_while_they_trained_is_what_one_saved(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    alone, shared = (checkpoints(side["reward"].run_dir / "checkpoints") for side in both)
    assert len(shared) > 1 and [path.name for path in shared] == [path.name for path in alone]
    for path, other in zip(alone[:-1], shared[:-1], strict=True):  # the last one was waited for
        expected, found = load_checkpoint(path)[0], load_checkpoint(other)[0]
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    first, second = (load_checkpoint(path)[0] for path in shared[:2])
    assert any(float((second[name] - first[name]).abs().max()) > 1e-4 for name in first), "steps can be told apart"
