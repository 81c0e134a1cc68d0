"""A reward that can be gamed is gamed in a real run, and the run says so while it happens; a sound one raises nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ppomax.config import KLConfig, OptimConfig, PPOConfig
from ppomax.stages.ppo import ppo
from stages.conftest import Toys, Trained
from stages.toy import LONGER, column, metrics, ppo_config


def alarms(config: PPOConfig) -> dict[str, int]:
    """The alarms of a run, and the iteration of each one's first."""
    found: dict[str, int] = {}
    for row in metrics(config.run_dir):
        for message in row["alarms"]:
            found.setdefault(message.partition(":")[0], row["iteration"])
    return found


def test_a_planted_hack_raises_alarms_that_a_run_without_it_does_not(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {**LONGER, "iterations": 20, "kl": KLConfig(coefficient=None)}
    still = ppo_config(tmp_path / "still", trained.sft, toys.prompts, **settings, optim=OptimConfig(lr=1e-9))
    hacked = ppo_config(tmp_path / "hacked", trained.sft, toys.prompts, **settings, optim=OptimConfig(lr=2e-2))
    ppo(still)
    ppo(hacked)
    scores = column(hacked, "score_mean")
    assert sum(scores[-3:]) > 3 * sum(scores[:3]), "the letter that the reward counts takes over"
    more = {name: first for name, first in alarms(hacked).items() if name not in alarms(still)}
    for name in ("Perplexity of the responses has fallen", "Entropy has fallen", "Far from the reference (KL)",
                 "One opening phrase takes over"):  # fmt: skip
        assert more[name] < 15, "while there is still something to save"
