"""PPO's memory does not grow with its iterations: what an iteration made is gone when the next ones have come."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ppomax.config import ObjectiveConfig, SamplingConfig
from ppomax.stages.ppo import ppo
from stages.conftest import Toys, Trained
from stages.toy import ppo_config

ITERATIONS, SETTLED = 50, 5
# Looking at everything that lives takes seconds in a long session, so it is looked at a few times only.
WATCHED = 4


def tensor_bytes() -> int:
    """Bytes of all tensors that something still refers to."""
    gc.collect()
    return sum(x.numel() * x.element_size() for x in gc.get_objects() if issubclass(type(x), torch.Tensor))


def test_fifty_iterations_hold_no_more_tensors_than_five(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    held: list[int] = []
    iteration = 0

    def watch(prompts: Sequence[Any], responses: Sequence[str], **columns: Any) -> list[float]:
        nonlocal iteration
        if SETTLED <= iteration < SETTLED + WATCHED or iteration >= ITERATIONS - WATCHED:
            held.append(tensor_bytes())
        iteration += 1
        return [float(len(response)) for response in responses]

    config = ppo_config(
        tmp_path / "run", trained.sft, toys.prompts, reward=(), iterations=ITERATIONS, rollout_batch=4, minibatch=4,
        buffer=2, objective=ObjectiveConfig(importance_cap=2), ema=0.9, sampling=SamplingConfig(max_new_tokens=4),
        ptx_data=(toys.dialogues,), ptx_weight=0.1,
    )  # fmt: skip
    ppo(config, reward=watch)
    assert iteration == ITERATIONS and len(held) == 2 * WATCHED
    # Prompts and responses of a few tokens differ in length: by hundreds of bytes, an iteration's tensors are thousands.
    assert max(held[WATCHED:]) - max(held[:WATCHED]) < 2_000, held
