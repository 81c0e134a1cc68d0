"""Two processes do what one does, to rounding: SFT, reward model and PPO, sharded both ways, resumed either way."""

from __future__ import annotations

import json
import os
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from stages.conftest import Toys, Trained
from stages.toy import CALM, FLOAT32, expect_alike, metrics, ppo_config, reward_config, sft_config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from parity.processes import WORLD, run, run_in_two
from ppomax.config import CriticConfig, KLConfig, ModelConfig, ObjectiveConfig, SaveConfig
from ppomax.engine import world
from ppomax.engine.background import Background, copied
from ppomax.engine.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from ppomax.engine.rundir import Run
from ppomax.errors import SaveError
from ppomax.models.embedded import embedded_directory
from ppomax.models.load import Compute, load_causal_lm
from ppomax.models.players import Policy
from ppomax.models.shard import shard
from ppomax.stages.session import Session
from ppomax.types import token_batch

# A clip that binds: a norm of one process's shards alone would scale its gradients otherwise.
CLIPPED = CALM.model_copy(update={"max_grad_norm": 0.02})
ONE_UPDATE = "one update"
SMALL = FLOAT32.model_copy(update={"tokens_per_microbatch": 160})


def compute(**changes: Any) -> ModelConfig:
    return SMALL.model_copy(update=changes)


def runs(folder: Path, trained: Trained, trained_above: Trained, toys: Toys) -> dict[str, Any]:
    """Name → configuration."""
    by_reward = CriticConfig(init="reward", pretrain_iterations=1, optim=CALM)
    at_once = by_reward.model_copy(update={"pretrain_iterations": 0})
    rewarded = {"reward": (trained.reward,), "critic": by_reward, "optim": CALM}
    top = {"reward": (trained_above.reward,), "critic": by_reward, "optim": CALM}
    plain = {"optim": CALM, "critic": CriticConfig(init="policy", pretrain_iterations=1, optim=CALM)}
    clipped = {"reward": (trained.reward,), "critic": by_reward.model_copy(update={"optim": CLIPPED}), "optim": CLIPPED}
    learn = {"ptx_data": (toys.dialogues,), "ptx_weight": 0.5, "ptx_batch": 3}
    age = {"buffer": 2, "objective": ObjectiveConfig(importance_cap=2.0), "ema": 0.9}

    def ppo(name: str, policy: str, **changes: Any) -> Any:
        return ppo_config(folder / name, policy, toys.prompts, **{"compute": SMALL, **changes})

    return {
        "sft": sft_config(folder / "sft", toys.dialogues, epochs=0.5, compute=SMALL, optim=CALM),
        "sft checkpointing": sft_config(
            folder / "sft-2", toys.dialogues, epochs=0.5, optim=CALM,
            compute=compute(shard="zero2", gradient_checkpointing=True),
        ),
        "reward": reward_config(folder / "reward", trained.sft, toys.pairs, epochs=1, compute=SMALL, optim=CALM),
        "reward top": reward_config(
            folder / "reward-top", trained.sft, toys.pairs, compute=compute(train_layers=1), optim=CALM, epochs=1
        ),
        ONE_UPDATE: ppo(
            "one-update", trained.sft, iterations=1, rollout_batch=16, minibatch=16, **rewarded | {"critic": at_once}
        ),
        "twenty": ppo("twenty", trained.sft, iterations=20, **rewarded),
        "zero2": ppo("zero2", trained.sft, compute=compute(shard="zero2"), whiten_advantages=True, **clipped, **learn),
        "none": ppo("none", trained.sft, compute=compute(shard="none"), whiten_advantages=True, **clipped, **learn),
        "none trunk": ppo(
            "none-trunk", trained_above.sft, compute=compute(train_layers=1, shard="none"),
            save=SaveConfig(every=1, background=True),
            **top, **learn,
        ),
        "none reward": reward_config(
            folder / "none-reward", trained.sft, toys.pairs, epochs=1, compute=compute(shard="none"), optim=CALM
        ),
        "trunk": ppo("trunk", trained_above.sft, compute=compute(train_layers=1), **top, **learn),
        "lora": ppo("lora", trained.sft, compute=compute(lora_rank=2), **rewarded),
        "average": ppo("average", trained.sft, iterations=4, **plain, **age),
        "full kl": ppo("full-kl", trained.sft, kl=KLConfig(place="loss", estimator="full"), **plain),
        "one to two": ppo("one-to-two", trained.sft, iterations=4, save=SaveConfig(every=2), **plain, **age),
        "two to one": ppo(
            "two-to-one", trained.sft, iterations=4, save=SaveConfig(every=1, background=True), **plain, **age
        ),
        "two to one, none": ppo(
            "two-to-one-none", trained.sft, iterations=4, compute=compute(shard="none"), save=SaveConfig(every=2),
            **plain, **age,
        ),
    }  # fmt: skip


@pytest.fixture(scope="module")
def both(
    trained: Trained, trained_above: Trained, toys: Toys, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same runs by one process and by two."""
    folder = tmp_path_factory.mktemp("processes")
    one, two = (runs(folder / name, trained, trained_above, toys) for name in ("one", "two"))
    for config in one.values():
        run(config)
    run(two["one to two"], stop=True)
    given = {"one to two": {"resume": True}, "two to one": {"stop": True}, "two to one, none": {"stop": True}}
    run_in_two(folder, [(config, given.get(name, {})) for name, config in two.items()])
    run(two["two to one"], resume=True)
    run(two["two to one, none"], resume=True)
    return one, two


NAMES = [*runs(Path(), Trained(Path(), Path()), Trained(Path(), Path()), Toys("", "", ""))]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # the first test waits for all runs
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_do_what_one_does(both: tuple[dict[str, Any], dict[str, Any]], name: str) -> None:
    rel = 1e-5 if name == ONE_UPDATE else 1e-4
    expect_alike(both[0][name].run_dir, both[1][name].run_dir, rel=rel, abs=rel / 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "none"])
def test_trap_21_the_norm_that_is_clipped_is_that_of_all_shards(
    both: tuple[dict[str, Any], dict[str, Any]], name: str
) -> None:
    alone, shared = (metrics(side[name].run_dir) for side in both)
    compared = 0
    for role in ("policy", "critic"):
        for row, other in zip(alone, shared, strict=True):
            if (norm := row.get(f"grad_norm_{role}")) is not None:
                assert norm > 2 * (CLIPPED.max_grad_norm or 0.0), "the clip binds"
                assert other[f"grad_norm_{role}"] == pytest.approx(norm, rel=1e-3)
                compared += 1
    assert compared >= 4


def making(rank: int, folder: str, jobs: list[Any]) -> None:
    """The embedded model in an empty cache, by the second process first."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    os.environ["PPOMAX_CACHE"] = str(Path(folder, "cache"))
    if rank == 0:
        dist.barrier()
    found = embedded_directory("tiny")
    if rank == 1:
        dist.barrier()
    if found is None or not {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in found.iterdir()}:
        Path(folder, f"failed-{rank}.txt").write_text(str(found and sorted(found.iterdir())))
    dist.destroy_process_group()


def test_an_embedded_model_is_made_whole_by_whichever_process_comes_first(tmp_path: Path) -> None:
    run_in_two(tmp_path, [], making)


def reading(rank: int, folder: str, jobs: list[Any]) -> None:
    """Passes of a frozen player that is spread over two processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    device = Compute(torch.device("cpu"), torch.float32)
    player = shard(Policy(load_causal_lm("tiny", device), train_layers=None, trained=False), device, ModelConfig())
    batch = token_batch([[5, 6]], [[7, 8]])
    try:
        found = []
        with torch.no_grad():
            for _ in range(4):
                player(batch)
                found.append(len(player._get_fsdp_state()._fsdp_param_group.comm_ctx.post_forward_order))  # type: ignore[attr-defined]
        assert found == [0] * 4, found
    except Exception:
        Path(folder, f"failed-{rank}.txt").write_text(traceback.format_exc())
    dist.destroy_process_group()


def test_what_fsdp_notes_of_a_pass_without_gradient_is_forgotten(tmp_path: Path) -> None:
    run_in_two(tmp_path, [], reading)


def saving(rank: int, folder: str, jobs: list[Any]) -> None:
    """Saves in the background of divided tensors, which change meanwhile, beside sums of all processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    background, run = Background(minutes=0.5), Path(folder, "run")
    try:
        mesh = init_device_mesh("cpu", (WORLD,))
        tensors = {name: distribute_tensor(torch.arange(9.0), mesh, [Shard(0)]) for name in "ab"} | {"c": torch.ones(2)}
        for number in range(4):
            background.start(partial(save_checkpoint, run, f"step-{number}", copied(tensors), {"n": number}, keep=9))
            for tensor in tensors.values():
                tensor.add_(1)
            for _ in range(50):
                assert world.largest(rank) == WORLD - 1
        background.settle()
        world.first(lambda: Path(folder, "file").write_text("where a folder should be"))
        background.start(partial(save_checkpoint, Path(folder, "file"), "step-4", copied(tensors), {}))
        looked, end = 0, time.monotonic() + 30
        with pytest.raises(SaveError, match="step-4"):
            while time.monotonic() < end:
                time.sleep(0.05 * rank)
                background.settle(wait=False)
                looked += 1
        assert world.gathered(looked) == [looked] * WORLD, "both learn of it in the same step"
    except BaseException:
        Path(folder, f"failed-{rank}.txt").write_text(traceback.format_exc())
    dist.destroy_process_group()


def test_processes_save_together_while_they_train(tmp_path: Path) -> None:
    run_in_two(tmp_path, [], saving)
    for number in range(4):
        tensors, state = load_checkpoint(tmp_path / "run" / f"step-{number}")
        assert state == {"n": number}
        assert tensors["a"].tolist() == tensors["b"].tolist() == [number + i for i in range(9)]
        assert tensors["c"].tolist() == [number + 1] * 2


def going_on(rank: int, folder: str, jobs: list[Any]) -> None:
    """A resumed run whose best checkpoint is damaged, up to its next save."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    save = SaveConfig(every=100, keep=9, keep_best="measure")
    current = Session(Run(Path(folder, "run"), "sft"), save, "step", wait_minutes=0.5)
    try:
        current.restore([], "data", empty=lambda: {"w": torch.zeros(3)})
        current.append({"step": 6, "measure": 7.0})
        current.checkpoint(6, False, lambda: ({"w": torch.ones(3)}, {}))
    except Exception:
        Path(folder, f"failed-{rank}.txt").write_text(traceback.format_exc())


def test_two_processes_agree_that_a_damaged_checkpoint_is_not_the_best(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    measures = [1.0, 2.0, 9.0, 3.0, 4.0, 5.0]
    rows = [json.dumps({"step": step, "measure": measure}) for step, measure in enumerate(measures)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows))
    state = {"seconds": 0.0, "frozen": {}, "data": "data"}
    for step in (2, 5):
        save_checkpoint(folder, f"step-{step}", {"w": torch.zeros(3)}, {"step": step, **state}, keep=9)
    (folder / "step-2" / "state.json").write_text("{}")
    run_in_two(tmp_path, [], going_on)
    assert [path.name for path in checkpoints(folder)] == ["step-5", "step-6"]
