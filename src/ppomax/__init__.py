"""RLHF with PPO, whole: supervised fine-tuning, reward model, PPO-max, evaluation.

    import ppomax
    ppomax.ppo(ppomax.PPOConfig(policy="runs/sft/final", prompts=("prompts.jsonl",)))

Every name is imported when it is first used, so `import ppomax` costs no torch import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppomax.config import (
        ChatConfig,
        CheckpointConfig,
        CriticConfig,
        DoctorConfig,
        EvaluateConfig,
        KLConfig,
        ModelConfig,
        ObjectiveConfig,
        OptimConfig,
        PlanConfig,
        PPOConfig,
        QuickstartConfig,
        RankConfig,
        ReplayConfig,
        ReportConfig,
        RewardConfig,
        SamplingConfig,
        SaveConfig,
        ScoreConfig,
        SFTConfig,
    )
    from ppomax.config.recipes import recipe
    from ppomax.errors import (
        DamagedError,
        DataError,
        Interrupted,
        NonFiniteError,
        ProcessLost,
        SaveError,
        SetupError,
    )
    from ppomax.stages.chat import chat
    from ppomax.stages.checkpoint import checkpoint
    from ppomax.stages.doctor import doctor
    from ppomax.stages.evaluate import evaluate
    from ppomax.stages.plan import plan
    from ppomax.stages.ppo import ppo
    from ppomax.stages.quickstart import quickstart
    from ppomax.stages.rank import rank
    from ppomax.stages.replay import replay
    from ppomax.stages.report import report
    from ppomax.stages.reward import reward
    from ppomax.stages.sft import sft

__version__ = "0.1.0"

__all__ = [
    "ChatConfig",
    "CheckpointConfig",
    "CriticConfig",
    "DamagedError",
    "DataError",
    "DoctorConfig",
    "EvaluateConfig",
    "Interrupted",
    "KLConfig",
    "ModelConfig",
    "NonFiniteError",
    "ObjectiveConfig",
    "OptimConfig",
    "PPOConfig",
    "PlanConfig",
    "ProcessLost",
    "QuickstartConfig",
    "RankConfig",
    "ReplayConfig",
    "ReportConfig",
    "RewardConfig",
    "SFTConfig",
    "SamplingConfig",
    "SaveConfig",
    "SaveError",
    "ScoreConfig",
    "SetupError",
    "chat",
    "checkpoint",
    "doctor",
    "evaluate",
    "plan",
    "ppo",
    "quickstart",
    "rank",
    "recipe",
    "replay",
    "report",
    "reward",
    "sft",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ppomax' has no attribute {name!r}")
    value = getattr(import_module(_home(name)), name)
    globals()[name] = value
    return value


def _home(name: str) -> str:
    if name.endswith("Config"):
        return "ppomax.config"
    if name[0].isupper():
        return "ppomax.errors"
    return "ppomax.config.recipes" if name == "recipe" else f"ppomax.stages.{name}"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
