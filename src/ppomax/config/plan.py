"""The planner's schema: all of PPO's settings, and what has to be known about models and machine instead of loading."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from ppomax.config.ppo import PPOConfig

_GPUS = re.compile(r"(?P<count>[1-9]\d*)x(?P<memory>\d+(\.\d+)?)g(b|ib)?", re.IGNORECASE)
_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<unit>[mb])", re.IGNORECASE)


def gpus_of(text: str) -> tuple[int, float]:
    """'8x80g' → 8 GPUs with 80 GiB each."""
    found = _GPUS.fullmatch(text.strip())
    if found is None or float(found["memory"]) == 0:
        raise ValueError("expected NUMBERxMEMORYg, such as 8x80g: eight GPUs with 80 GiB each")
    return int(found["count"]), float(found["memory"])


def parameters_of(text: str) -> float:
    """'1.3b' → 1.3e9, '135m' → 135e6."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or float(found["number"]) == 0:
        raise ValueError("expected a number of parameters, such as 7b, 1.3b or 135m")
    return float(found["number"]) * {"m": 1e6, "b": 1e9}[found["unit"].lower()]


def _checked_gpus(text: str | None) -> str | None:
    if text is not None:
        gpus_of(text)
    return text


def _checked_size(text: str | None) -> str | None:
    if text is not None:
        parameters_of(text)
    return text


Gpus = Annotated[str | None, AfterValidator(_checked_gpus)]
ModelSize = Annotated[str | None, AfterValidator(_checked_size)]


class PlanConfig(PPOConfig):
    """Memory and time of a PPO run, before anything is bought or loaded. Takes every setting of `ppomax ppo`."""

    model_size: ModelSize = Field(
        default=None,
        description="Size of all players, such as 7b, 1.3b or 135m, instead of the models that the settings name.",
    )
    reward_size: ModelSize = Field(
        default=None, description="Size of the reward model, and of a critic that starts from it; None: model_size."
    )
    gpus: Gpus = Field(
        default=None, description="NUMBERxMEMORYg, such as 8x80g: GPUs and GiB of each. None: this machine as it is."
    )
    shard: Literal["none", "zero2", "zero3"] | None = Field(
        default=None,
        description="How several GPUs divide the state. none: a copy on each; zero2: masters, moments and gradients"
        " divided; zero3: all weights too. None: try them in this order.",
    )
    reserve: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Share of the memory that is left to the driver, communication buffers and fragmentation.",
    )
    prompt_tokens: int | None = Field(
        default=None, ge=1, description="Mean length of a prompt, for the time alone; None: max_prompt_tokens."
    )
    response_tokens: int | None = Field(
        default=None, ge=1, description="Mean length of a response, for the time alone; None: the length limit."
    )
    tflops: float | None = Field(
        default=None,
        gt=0,
        description="TFLOP/s (1e12 floating-point operations a second) that one GPU reaches in matrix products, as"
        " `ppomax doctor --measure` finds them. None: measured if the plan is for this machine, else no seconds.",
    )
    bandwidth: float | None = Field(
        default=None,
        gt=0,
        description="GB/s at which one GPU reads its memory: what decoding mostly waits for. None: as for tflops.",
    )
