"""Settings that contradict each other, or that would be ignored, are refused before anything is sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ppomax.config import (
    CriticConfig,
    KLConfig,
    ObjectiveConfig,
    ScoreConfig,
)
from ppomax.types import SetupError
from stages.conftest import Toys, Trained
from stages.toy import FLOAT32, ppo_config, prepared

NO_CRITIC = CriticConfig(init=None, pretrain_iterations=0)

CONTRADICTIONS: dict[str, dict[str, Any]] = {
    "critic.init: found None": {"critic": NO_CRITIC},
    "critic.pretrain_iterations: found 1 without": {
        "critic": CriticConfig(init=None, pretrain_iterations=1), "advantage": "whole_return", "baseline": None,
    },
    "samples_per_prompt: found 1 with baseline leave_one_out": {"advantage": "whole_return", "baseline": "leave_one_out"},
    "samples_per_prompt: found 1 with baseline group_mean": {"advantage": "whole_return", "baseline": "group_mean"},
    "rollout_batch: found 1 with baseline batch_mean": {
        "advantage": "whole_return", "baseline": "batch_mean", "rollout_batch": 1, "minibatch": 1,
    },
    "whiten_advantages: found True with minibatch 1": {
        "advantage": "whole_return", "whiten_advantages": True, "minibatch": 1,
    },
    "baseline: found group_normalise with": {
        "advantage": "rewards_to_go", "baseline": "group_normalise", "samples_per_prompt": 2,
    },
    "score.scale: found True beside": {"score": ScoreConfig(scale=True)},
    "score.missing_eos_penalty: found 1.0 with score.truncated bootstrap": {
        "score": ScoreConfig(truncated="bootstrap", missing_eos_penalty=1.0),
    },
    "objective.kind: found policy_gradient with 4 steps an iteration": {
        "objective": ObjectiveConfig(kind="policy_gradient"), "rollout_batch": 16, "minibatch": 8, "epochs": 2,
    },
    "objective.kind: found policy_gradient with 3 steps an iteration": {
        "objective": ObjectiveConfig(kind="policy_gradient", importance_cap=2.0), "minibatch": 16, "buffer": 3,
    },
    "score.clip: found 5.0 beside": {"score": ScoreConfig(scale=True, normalise=False)},
    "baseline: found batch_mean with advantage gae": {"baseline": "batch_mean"},
    "k: found 3 with advantage gae": {"k": 3},
    "kl.horizon: found 2 with rollout_batch 16": {"kl": KLConfig(target=1.0, horizon=2.0)},
    "compute.compiled: found True with objective trpo": {
        "objective": ObjectiveConfig(kind="trpo"), "compute": FLOAT32.model_copy(update={"compiled": True}),
    },
    "kl.place: found loss with objective trpo": {
        "objective": ObjectiveConfig(kind="trpo"), "kl": KLConfig(place="loss", estimator="k2"),
    },
    "objective.denominator: found reference": { "rollout_batch": 16, "minibatch": 16,
        "objective": ObjectiveConfig(kind="policy_gradient", denominator="reference"),
    },
    "critic.pretrain_tolerance: found a tolerance": {
        "critic": CriticConfig(init="policy", pretrain_iterations=2, pretrain_tolerance=0.1),
    },
    "score.by_source: found True without": {"score": ScoreConfig(by_source=True, normalise=False)},
    "kl.target: found a target without": {"kl": KLConfig(coefficient=None, target=1.0)},
    "kl.estimator: found k1 in the loss": {"kl": KLConfig(place="loss")},
    "objective.penalty_target: found 0.1 with objective.denominator reference": {
        "objective": ObjectiveConfig(kind="penalty", penalty_target=0.1, denominator="reference"),
    },
    "objective.penalty_target: found 0.1 with": {"objective": ObjectiveConfig(penalty_target=0.1)},
    "objective.dual_clip: found": {"objective": ObjectiveConfig(kind="surrogate", dual_clip=2.0)},
    "objective.entropy_clip: found": {"objective": ObjectiveConfig(entropy_clip=2.0)},
    "ptx_weight: found 0.1 with objective trpo": {"objective": ObjectiveConfig(kind="trpo"), "ptx": True},
    "objective.entropy_weight: found 0.1 with objective trpo": {"objective": ObjectiveConfig(kind="trpo", entropy_weight=0.1)},
    "compute.dtype: found torch.bfloat16 with objective trpo": {
        "objective": ObjectiveConfig(kind="trpo"), "compute": FLOAT32.model_copy(update={"dtype": "bfloat16"}),
    },
    "score.truncated: found bootstrap without": {
        "critic": NO_CRITIC, "advantage": "whole_return", "baseline": None, "score": ScoreConfig(truncated="bootstrap"),
    },
}  # fmt: skip


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_refused(
    message: str, trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    settings = dict(CONTRADICTIONS[message])
    if settings.pop("ptx", False):
        settings |= {"ptx_data": (toys.dialogues,), "ptx_weight": 0.1}
    with pytest.raises(SetupError) as error:
        prepared(ppo_config(tmp_path / "run", trained.sft, toys.prompts, **settings))
    assert str(error.value).startswith(message)
