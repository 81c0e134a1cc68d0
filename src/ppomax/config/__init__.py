"""Schemas, named recipes, and how a file and flags are laid over them."""

from ppomax.config.schema import (
    ChatConfig,
    CriticConfig,
    DoctorConfig,
    EvaluateConfig,
    KLConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    QuickstartConfig,
    ReportConfig,
    RewardConfig,
    SamplingConfig,
    SaveConfig,
    Schema,
    ScoreConfig,
    SFTConfig,
)

__all__ = [
    "ChatConfig",
    "CriticConfig",
    "DoctorConfig",
    "EvaluateConfig",
    "KLConfig",
    "ModelConfig",
    "OptimConfig",
    "PPOConfig",
    "QuickstartConfig",
    "ReportConfig",
    "RewardConfig",
    "SFTConfig",
    "SamplingConfig",
    "SaveConfig",
    "Schema",
    "ScoreConfig",
]
