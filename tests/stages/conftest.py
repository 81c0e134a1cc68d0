"""What whole runs share: one thread, toy data, a fine-tuned model and a reward model, each made once a session."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ppomax.config import EvaluateConfig, PPOConfig, SamplingConfig
from ppomax.stages import kept
from ppomax.stages.ppo import ppo
from ppomax.stages.reward import reward
from ppomax.stages.sft import sft
from stages.drawing import each_kind_once
from stages.processes import Command
from stages.toy import (
    FLOAT32,
    TOP_LAYER,
    dialogue_rows,
    pair_rows,
    ppo_config,
    prompt_rows,
    reward_config,
    sft_config,
    write_rows,
)

# torch's checkpoint writer logs every tensor at level DEBUG, which drowns what a failing test prints.
logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)


@dataclass(frozen=True)
class Toys:
    """Data specs."""

    prompts: str
    dialogues: str
    pairs: str


@dataclass(frozen=True)
class Trained:
    """Run directories of a finished SFT and of a reward model on it, and the specs of their models."""

    sft_run: Path
    reward_run: Path

    @property
    def sft(self) -> str:
        return str(self.sft_run / "final")

    @property
    def reward(self) -> str:
        return str(self.reward_run / "final")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Equal sums in this process and in those that it starts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def pictures() -> Iterator[None]:
    """Each kind of run is drawn once by a process."""
    with each_kind_once():
        yield


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    folder = tmp_path_factory.mktemp("toys")
    return Toys(
        write_rows(folder / "prompts.jsonl", prompt_rows(45)),
        write_rows(folder / "dialogues.jsonl", dialogue_rows()),
        write_rows(folder / "pairs.jsonl", pair_rows()),
    )


@pytest.fixture(scope="session")
def trained(toys: Toys, model_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """All layers trained."""
    folder = tmp_path_factory.mktemp("trained")
    sft(sft_config(folder / "sft", toys.dialogues))
    reward(reward_config(folder / "reward", str(folder / "sft" / "final"), toys.pairs))
    return Trained(folder / "sft", folder / "reward")


@pytest.fixture(scope="session")
def trained_top(toys: Toys, model_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Only the upper of two layers trained."""
    folder = tmp_path_factory.mktemp("trained-top")
    sft(sft_config(folder / "sft", toys.dialogues, compute=TOP_LAYER))
    reward(reward_config(folder / "reward", str(folder / "sft" / "final"), toys.pairs, compute=TOP_LAYER))
    return Trained(folder / "sft", folder / "reward")


@pytest.fixture(scope="session")
def base_run(toys: Toys, trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> PPOConfig:
    """A finished PPO run of `ppo_config` as it is; not to be changed."""
    config = ppo_config(tmp_path_factory.mktemp("base") / "run", trained.sft, toys.prompts)
    ppo(config)
    return config


@pytest.fixture
def command(tmp_path: Path) -> Iterator[type[Command]]:
    """`ppomax VERB ...` in processes of their own, none of which outlives the test."""
    yield Command
    Command.end_all()


class Draws:
    """How many answers were sampled each time; `interrupt`: Ctrl-C when the first answers of that time have ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[int] = []
        self.interrupt: int | None = None
        self._draw = kept.draw_responses
        monkeypatch.setattr(kept, "draw_responses", self)

    def __call__(self, policy: Any, ids: Any, *given: Any, progress: Any, **options: Any) -> Any:
        self.asked.append(len(ids))

        def interrupt(amount: int) -> None:
            raise KeyboardInterrupt

        now = interrupt if len(self.asked) == self.interrupt else progress
        return self._draw(policy, ids, *given, progress=now, **options)


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> Draws:
    """What evaluation and labelling sample in this test."""
    return Draws(monkeypatch)


def evaluate_config(run_dir: Path, policy: str, trained: Trained, toys: Toys, **changes: Any) -> EvaluateConfig:
    """Of a policy with the supervised model, by two judges and the reward model."""
    settings: dict[str, Any] = {
        "baseline": trained.sft, "reward": trained.reward, "judge": ("stages.toy:share_of_e", "stages.toy:length_reward"),
        "samples_per_prompt": 2, "best_of": (4, 16), "sampling": SamplingConfig(max_new_tokens=10),
        "compute": FLOAT32,
    }  # fmt: skip
    return EvaluateConfig(run_dir=run_dir, policy=policy, prompts=(toys.prompts,), **{**settings, **changes})
