"""A run's checkpoints from outside: list, verify, and export one as a model. The run may be going on meanwhile."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppomax.config import CheckpointConfig, PPOConfig, RewardConfig, Schema, SFTConfig
from ppomax.config.layers import overlay, read_yaml
from ppomax.engine.checkpoint import (
    checkpoint_number,
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    verify_checkpoint,
)
from ppomax.engine.durable import TEMPORARY, disk_errors, publish, size_text
from ppomax.engine.rundir import stored_verb
from ppomax.errors import DamagedError
from ppomax.models.load import Compute, export, export_scalar, load_causal_lm, load_scalar_lm, load_tokenizer
from ppomax.models.players import Player, Policy, Scalar
from ppomax.rewards.mixture import is_function, parse_terms
from ppomax.stages.inputs import compute_of, expect_same_weights, training_of
from ppomax.types import DataError, SetupError

SCHEMAS: dict[str, type[Schema]] = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig}


def checkpoint(config: CheckpointConfig) -> list[dict[str, Any]] | Path:
    """What `config.action` asks for: the checkpoints as rows (name, size, age, problems), or the exported model's path.

    Raises DamagedError where verify finds damage, SetupError where there is nothing to look at.
    """
    settings = run_settings(config.run_dir)
    if config.action == "export":
        return _export(config, settings)
    rows: list[dict[str, Any]] = []
    while not rows:  # the run may delete those that were chosen, when it has newer ones
        rows = [row for path in _chosen(config) if (row := _row(path))]
    problems = [problem for row in rows for problem in row["problems"]]
    if config.action == "verify" and problems:
        raise DamagedError("\n".join(problems))
    return rows


def run_settings(run_dir: Path) -> Any:
    """The settings of a training run, from its config.yaml."""
    verb = stored_verb(run_dir)
    if verb not in SCHEMAS:
        found = f"a run of `ppomax {verb}`" if verb else "no run of ppomax"
        raise SetupError(f"{run_dir}: found {found}, expected a run directory of {', '.join(SCHEMAS)}")
    values = read_yaml(run_dir / "config.yaml")
    return overlay(SCHEMAS[verb](), values, origin=str(run_dir / "config.yaml"))


def _chosen(config: CheckpointConfig) -> list[Path]:
    folder = config.run_dir / "checkpoints"
    found = checkpoints(folder)
    chosen = [path for path in found if config.number in (None, checkpoint_number(path))]
    if not chosen:
        there = ", ".join(path.name for path in found) or "none"
        wanted = "a checkpoint" if config.number is None else f"number {config.number}"
        raise SetupError(f"{folder}: found {there}, expected {wanted}")
    return chosen


def _row(path: Path) -> dict[str, Any] | None:
    """What is said of a checkpoint; None if the run deleted it, or wrote it anew, while it was looked at."""
    try:
        found = path.stat()
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        problems = verify_checkpoint(path)
        if problems and path.stat().st_ino != found.st_ino:
            return None
    except FileNotFoundError:
        if not os.path.lexists(path):
            return None
        return {"name": path.name, "size": "?", "age": "?", "problems": [f"{path}: found a link to nothing"]}
    age = _age(time.time() - found.st_mtime)
    return {"name": path.name, "size": size_text(size), "age": age, "problems": problems}


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _export(config: CheckpointConfig, settings: Any) -> Path:
    if config.number is None:
        path, problems = latest_checkpoint(config.run_dir / "checkpoints")
        if path is None:
            raise DataError("; ".join(problems) or f"{config.run_dir / 'checkpoints'}: found no checkpoint")
    else:
        (path,) = _chosen(config)
    out = config.out or config.run_dir / "exported" / f"{path.name}-{config.model}"
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise SetupError(f"{out}: found something there, expected a new or empty directory; choose another --out")
    if config.model != "final" and not isinstance(settings, PPOConfig):
        raise SetupError(f"model: found {config.model!r}, expected 'final': only ppo has a {config.model}")
    changes = {} if config.dtype is None else {"dtype": config.dtype}
    compute = compute_of(settings.compute.model_copy(update={**changes, "device": "cpu"}))
    try:
        tensors, state = load_checkpoint(path, verified=config.number is None)
    except Exception as error:  # torch has several for files that are gone
        if path.exists():
            raise
        if config.number is None:
            return _export(config, settings)
        raise SetupError(
            f"{path}: the run deleted it while it was read, expected one that stays; export a newer one"
        ) from error
    for name, fingerprint in state["frozen"].items():
        if name in _starts(settings):
            expect_same_weights("frozen model", name, fingerprint)
    averaged = any(name.startswith("average/") for name in tensors)
    if config.model == "last" and not averaged:
        raise SetupError("model: found 'last', expected 'final': without a moving average (ema None) they are one")
    player, prefix, start = player_of(settings, config.model, compute, averaged=averaged)
    put(player, tensors, prefix)
    tokenizer = load_tokenizer(start, settings.compute.chat_template)
    write = export_scalar if isinstance(player, Scalar) else export
    temporary = out.parent / f"{TEMPORARY}{out.name}"
    with disk_errors(out, temporary=temporary):
        shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
        temporary.mkdir(parents=True)
        write(player.model, tokenizer, temporary)
        publish(temporary, out)
    return out


@torch.no_grad()
def put(player: Player, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """The checkpoint's float32 weights into a player's trained parameters."""
    for name, parameter in player.trained_parameters().items():
        if prefix + name not in tensors:
            raise DataError(f"tensor {prefix}{name}: found nothing in the checkpoint, expected one")
        parameter.copy_(tensors[prefix + name])


def critic_start(settings: PPOConfig) -> str | None:
    """The model that the critic of a PPO run started from; None for a run without one."""
    if settings.critic.init == "reward":
        return next(spec for _, spec in parse_terms(settings.reward) if not is_function(spec))
    return settings.policy if settings.critic.init == "policy" else settings.critic.init


def _starts(settings: Any) -> list[Any]:
    return [settings.policy, critic_start(settings)] if isinstance(settings, PPOConfig) else [settings.model]


def player_of(settings: Any, model: str, compute: Compute, *, averaged: bool = False) -> tuple[Player, str, str]:
    """The start model as the run wrapped it, the prefix of its weights in a checkpoint, and whose tokenizer it has."""
    options = training_of(settings.compute, settings.seed)
    if isinstance(settings, SFTConfig):
        return Policy(load_causal_lm(settings.model, compute), trained=True, **options), "master.", settings.model
    if isinstance(settings, RewardConfig):
        start = load_scalar_lm(settings.model, compute, fresh_head_seed=settings.seed)
        return Scalar(start, trained=True, **options), "master.", settings.model
    if model == "critic":
        start = critic_start(settings)
        if start is None:
            raise SetupError("model: found 'critic', but the run has none (critic.init None)")
        seed = settings.seed if settings.critic.init == "policy" else None
        critic = load_scalar_lm(start, compute, fresh_head_seed=seed)
        return Scalar(critic, trained=True, **options), "critic/master.", settings.policy
    prefix = "average/" if averaged and model == "final" else "policy/master."
    return Policy(load_causal_lm(settings.policy, compute), trained=True, **options), prefix, settings.policy
