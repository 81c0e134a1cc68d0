"""Runs that are killed: the words of short commands, and what each leaves when nothing happens to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from stages import toy
from stages.conftest import (  # noqa: F401  fixtures
    Toys,
    Trained,
    command,
    one_thread,
    pictures,
    toys,
    trained,
)
from stages.toy import prompt_rows, write_rows

from ppomax.cli import main

Words = Callable[..., list[str]]


@pytest.fixture(scope="session")
def words(trained: Trained, toys: Toys, tmp_path_factory: pytest.TempPathFactory) -> Words:  # noqa: F811
    """The command line of a verb; every step, or iteration, ends with a save."""
    prompts = write_rows(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", prompt_rows(20))
    common = "--compute.dtype float32 --compute.device cpu --optim.lr 5e-3 --save.every 1"
    own = {
        "sft": f"--model tiny --data {toys.dialogues} --heldout 0.1 --eval-every 5",
        "reward": f"--model {trained.sft} --data {toys.pairs} --heldout 0.2 --tokens-per-batch 1024",
        # A history, a steered η, an average and a buffer: all that a checkpoint of PPO holds.
        "ppo": f"--policy {trained.sft} --reward {trained.reward} --prompts {prompts} --ptx-data {toys.dialogues} "
        "--ptx-weight 0.1 --rollout-batch 8 --minibatch 4 --sampling.max-new-tokens 8 --critic.optim.lr 5e-3 "
        "--ema 0.9 --kl.target 1 --buffer 2 --objective.importance-cap 2 --save.keep-best score_mean",
    }
    return lambda verb, run_dir, *more: [verb, "--run-dir", str(run_dir), *own[verb].split(), *common.split(), *more]


@pytest.fixture(scope="session")
def uninterrupted(words: Words, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run directory of a command that nothing happened to."""
    done: dict[tuple[str, ...], Path] = {}

    def run(verb: str, *more: str) -> Path:
        key = (verb, *more)
        if key not in done:
            done[key] = tmp_path_factory.mktemp("uninterrupted") / verb
            assert main(words(verb, done[key], *more)) == 0
        return done[key]

    return run


def expect_equal(verb: str, a: Path, b: Path) -> None:
    """Two runs are the same, bit for bit; PPO's has a moving average, and so a last/ as well."""
    toy.expect_equal(verb, a, b, *(("last",) if verb == "ppo" else ()))
