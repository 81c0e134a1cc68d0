"""The settings of the reward model's loss reach its first step."""

from __future__ import annotations

from pathlib import Path

import pytest

from ppomax.stages.reward import reward
from stages.conftest import Toys, Trained
from stages.toy import metrics, reward_config


def test_label_smoothing_adds_its_share_of_the_opposite_loss(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    """(1 − ε)·L(m) + ε·L(−m) = L(m) + ε·m: at the same weights the loss rises linearly with ε."""
    losses = []
    for smoothing in (None, 0.1, 0.3):
        config = reward_config(
            tmp_path / str(smoothing),
            trained.reward,
            toys.pairs,
            label_smoothing=smoothing,
            max_steps=1,
            lm_weight=None,
        )
        reward(config)
        losses.append(metrics(config.run_dir)[0]["ranking_loss"])
    plain, little, more = losses
    assert little - plain == pytest.approx((more - plain) / 3, rel=1e-3)
    assert abs(little - plain) > 0.01
