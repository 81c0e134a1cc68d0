"""Schemas, named recipes, and how a file and flags are laid over them."""

from ppomax.config.plan import PlanConfig
from ppomax.config.ppo import CriticConfig, KLConfig, ObjectiveConfig, PPOConfig, ScoreConfig
from ppomax.config.schema import (
    ChatConfig,
    CheckpointConfig,
    DoctorConfig,
    EvaluateConfig,
    ModelConfig,
    OptimConfig,
    QuickstartConfig,
    RankConfig,
    ReplayConfig,
    ReportConfig,
    RewardConfig,
    SamplingConfig,
    SaveConfig,
    Schema,
    SFTConfig,
)

__all__ = [
    "ChatConfig",
    "CheckpointConfig",
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
    "ReplayConfig",
    "ReportConfig",
    "RewardConfig",
    "SFTConfig",
    "SamplingConfig",
    "SaveConfig",
    "Schema",
    "ScoreConfig",
]
