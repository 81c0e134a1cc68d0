"""The trained toy models of tests/stages, and two whose upper layer alone was trained on from there."""

from __future__ import annotations

import pytest
from stages.conftest import Toys, Trained, one_thread, pictures, toys, trained
from stages.toy import TOP_LAYER, reward_config, sft_config

from ppomax.stages.reward import reward
from ppomax.stages.sft import sft

__all__ = ["one_thread", "pictures", "toys", "trained"]


@pytest.fixture(scope="session")
def trained_above(trained: Trained, toys: Toys, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """They share the lower layer of `trained.sft`."""
    folder = tmp_path_factory.mktemp("trained-above")
    sft(sft_config(folder / "sft", toys.dialogues, model=trained.sft, epochs=1, compute=TOP_LAYER))
    reward(reward_config(folder / "reward", str(folder / "sft" / "final"), toys.pairs, compute=TOP_LAYER))
    return Trained(folder / "sft", folder / "reward")
