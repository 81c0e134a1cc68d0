"""Whole runs by two processes, started once for all of them: a test hands over configurations and reads run directories."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from stages.drawing import each_kind_once
from stages.toy import share_of_e

from ppomax.config import PPOConfig, RewardConfig, SFTConfig
from ppomax.engine import world
from ppomax.errors import Interrupted
from ppomax.stages.ppo import ppo
from ppomax.stages.reward import reward
from ppomax.stages.sft import sft

WORLD = 2
VERBS: dict[type, Any] = {SFTConfig: sft, RewardConfig: reward, PPOConfig: ppo}
# In the run directory of a run that is to be asked to stop in its second iteration.
STOP = "stops-early"
calls = 0


def stopping_reward(prompts: Sequence[Any], responses: Sequence[str], **columns: Any) -> list[float]:
    """`share_of_e`; in its second call the process is asked to stop, as a cluster's scheduler does."""
    global calls
    calls += 1
    if calls == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return share_of_e(prompts, responses)


stopping_reward.__module__, stopping_reward.__qualname__ = "stages.toy", "share_of_e"


def run(config: Any, *, stop: bool = False, resume: bool = False) -> None:
    """One run; `stop`: PPO's, asked to stop in its second iteration, which it must have done and saved."""
    global calls
    calls = 0
    if not stop:
        VERBS[type(config)](config, resume=resume)
        return
    try:
        ppo(config, reward=stopping_reward)
    except Interrupted:
        return
    raise AssertionError("the run was not interrupted")


def worker(rank: int, folder: str, jobs: list[tuple[Any, dict[str, bool]]]) -> None:
    """All runs, one after the other, in one of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    assert world.size() == WORLD
    for config, options in jobs:
        try:
            with each_kind_once():
                run(config, **options)
        except Exception:
            Path(folder, f"failed-{rank}.txt").write_text(f"{config.run_dir}\n{traceback.format_exc()}")
            os._exit(1)
    dist.destroy_process_group()


def run_in_two(
    folder: Path, jobs: Sequence[tuple[Any, Any]], work: Callable[..., None] = worker, start: str = "forkserver"
) -> None:
    """All runs by two processes; a failure of either is an error that quotes it.

    work: what each process does, given its number, the folder and the jobs. start: multiprocessing's start method.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context(start)
    processes = [context.Process(target=work, args=(r, str(folder), jobs), daemon=True) for r in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(1000)
    slow = [process.pid for process in processes if process.is_alive()]
    for process in processes:
        process.kill()
    failures = [file.read_text() for file in sorted(folder.glob("failed-*.txt"))]
    assert not failures, failures[0]
    assert not slow, f"processes {slow} were still running after 1000 seconds"
    assert [process.exitcode for process in processes] == [0, 0]
