"""The gradient of a minibatch whose microbatches are spread over two processes is that of one process.

ppomax runs in one process; a second one would need this: sums over tokens ÷ the count of the whole minibatch.
"""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import torch
import torch.distributed as dist
from stages.conftest import Toys, Trained
from stages.toy import CALM, FLOAT32, FirstIteration, first_iteration, ppo_config, prepared
from torch import Tensor

from parity.comparison import apart
from ppomax.config import CriticConfig, PPOConfig
from ppomax.engine.optimiser import Optimiser
from ppomax.stages.ppo_setup import Job
from ppomax.stages.update import Steering, Totals, _backward, _backward_policy

WORLD = 2


def gradient(optimiser: Optimiser | None) -> Tensor:
    """What has been collected for a player's next step, as one vector."""
    assert optimiser is not None
    return torch.cat([m.grad.flatten() for m in optimiser.masters.values() if m.grad is not None])


def backward_share(job: Job, it: FirstIteration, rank: int) -> list[Tensor]:
    """The gradients of every second microbatch: the policy's with the whole minibatch's denominator."""
    config, steering, totals = job.config, Steering.start(job.config), Totals()
    share = it.plan[0][rank::WORLD]
    length_B = it.scored.rollout.length_B
    whole, own = (sum(int(length_B[list(m.rows)].sum()) for m in part) for part in (it.plan[0], share))
    for micro in share:
        piece = it.experience.take(micro.rows).cut(micro.batch.response_width, "cpu")
        _backward_policy(job.players, piece, micro, piece.advantages_BR, config, steering, float(whole), totals)
    # The critic's loss has no entry of its own: its gradient comes with the share's denominator.
    _backward(job.players, it.experience, share, config, steering, True, totals)
    return [gradient(job.optimisers.policy), gradient(job.optimisers.critic) * own / whole]


def worker(rank: int, config: PPOConfig, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    job = prepared(config)
    found = backward_share(job, first_iteration(job), rank)
    for vector in found:
        dist.all_reduce(vector)
    torch.save(found, f"{folder}/gradients-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_find_the_gradient_of_one(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    configs = [
        ppo_config(
            tmp_path / f"run-{name}", trained.sft, toys.prompts, minibatch=16, reference="tiny",
            compute=FLOAT32.model_copy(update={"tokens_per_microbatch": 128}),
            critic=CriticConfig(init="policy", pretrain_iterations=1, optim=CALM),
        )
        for name in (0, 1, "alone")
    ]  # fmt: skip
    context = multiprocessing.get_context("forkserver")
    arguments = [(rank, configs[rank], str(tmp_path)) for rank in range(WORLD)]
    processes = [context.Process(target=worker, args=words, daemon=True) for words in arguments]
    for process in processes:
        process.start()
    job = prepared(configs[-1])
    it = first_iteration(job)
    assert len(it.plan[0]) > WORLD
    _backward(job.players, it.experience, it.plan[0], job.config, Steering.start(job.config), False, Totals())
    alone = [gradient(job.optimisers.policy), gradient(job.optimisers.critic)]
    for process in processes:
        process.join(240)
        assert process.exitcode == 0
    for rank in range(WORLD):
        for found, expected in zip(torch.load(tmp_path / f"gradients-{rank}.pt"), alone, strict=True):
            assert apart(found, expected) < 1e-5  # measured 8e-8
