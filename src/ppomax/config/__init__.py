"""Schemas, named recipes, and how a file and flags are laid over them."""

from ppomax.config.plan import PlanConfig
from ppomax.config.ppo import CriticConfig, KLConfig, ObjectiveConfig, PPOConfig, ScoreConfig
from ppomax.config.schema import (
    ChatConfig,
    DoctorConfig,
    EvaluateConfig,
    ModelConfig,
    OptimConfig,
    QuickstartConfig,
    RankConfig,
    ReportConfig,
    RewardConfig,
    SamplingConfig,
    SaveConfig,
    Schema,
    SFTConfig,
)

__all__ = [
    "ChatConfig",
    "CriticConfig",
    "DoctorConfig",
    "EvaluateConfig",
    "KLConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "PPOConfig",
    "PlanConfig",
    "QuickstartConfig",
    "RankConfig",
    "ReportConfig",
    "RewardConfig",
    "SFTConfig",
    "SamplingConfig",
    "SaveConfig",
    "Schema",
    "ScoreConfig",
]
