"""What lies in a run directory: read once, whatever of it exists."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ppomax.monitor.log import read_metrics
from ppomax.types import DataError, SetupError

STAGES = ("sft", "reward", "ppo", "evaluate")


@dataclass(frozen=True)
class RunFiles:
    """One run directory. `stage` is sft, reward, ppo, evaluate, or "" where nothing tells."""

    path: Path
    stage: str
    config: str
    metrics: tuple[Mapping[str, Any], ...]
    samples: tuple[Mapping[str, Any], ...]
    summary: Mapping[str, Any]
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """True where there is nothing to report."""
        return not (self.metrics or self.samples or self.summary)


def read_run(path: Path, stage: str | None = None) -> RunFiles:
    """Reads config.yaml, metrics.jsonl, samples.jsonl, summary.json and data.json of one directory; missing ones are
    empty."""
    metrics, samples = (_rows(path / name) for name in ("metrics.jsonl", "samples.jsonl"))
    summary, data = (_object(path / name) for name in ("summary.json", "data.json"))
    config = (path / "config.yaml").read_text(encoding="utf-8") if (path / "config.yaml").is_file() else ""
    return RunFiles(path, stage or _guess_stage(metrics, samples, summary), config, metrics, samples, summary, data)


def read_run_tree(path: Path) -> tuple[RunFiles, dict[str, RunFiles]]:
    """The run at `path`, and its chapters by stage: sub-runs named after their stage, or the run itself."""
    if not path.is_dir():
        raise SetupError(f"{path}: found no such directory, expected a run directory; give the folder that a run wrote")
    root = read_run(path)
    chapters = {stage: read_run(path / stage, stage) for stage in STAGES if (path / stage).is_dir()}
    chapters = {stage: run for stage, run in chapters.items() if not run.is_empty}
    if root.stage and root.stage not in chapters:
        chapters[root.stage] = root
    if root.is_empty and not chapters:
        raise SetupError(
            f"{path}: found no metrics.jsonl, samples.jsonl or summary.json, nor a sub-run in {', '.join(STAGES)}; "
            "expected a run directory that some stage has written to; run that stage first"
        )
    return root, {stage: chapters[stage] for stage in STAGES if stage in chapters}


def config_value(run: RunFiles, *keys: str) -> Any:
    """The first of `keys` found anywhere in config.yaml, outer levels first; None where there is none."""
    try:
        level: list[Any] = [yaml.safe_load(run.config) or {}]
    except yaml.YAMLError as error:
        raise DataError(f"{run.path / 'config.yaml'}: malformed YAML ({error}); restore or delete it") from error
    while level:
        for mapping in level:
            for key in keys:
                if isinstance(mapping, Mapping) and mapping.get(key) is not None:
                    return mapping[key]
        level = [value for mapping in level if isinstance(mapping, Mapping) for value in mapping.values()]
    return None


def series(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """The values of one metric, NaN where a row lacks it."""
    return [number(row.get(key)) for row in rows]


def number(value: Any) -> float:
    """A JSON number as float; NaN for everything else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def last_finite(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    """The newest known value of a metric; NaN where no row has one."""
    known = [value for value in series(rows, key) if math.isfinite(value)]
    return known[-1] if known else math.nan


def _rows(path: Path) -> tuple[dict[str, Any], ...]:
    return tuple(read_metrics(path)) if path.is_file() else ()


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: malformed JSON ({error}), expected one object; delete it or run again") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: found {type(found).__name__}, expected a JSON object")
    return found


def _guess_stage(
    metrics: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> str:
    keys = {key for row in metrics for key in row}
    if "fit_for_ppo" in summary:
        return "reward"
    if keys & {"kl_per_sequence", "score_mean"}:
        return "ppo"
    if keys & {"ranking_loss", "accuracy", "heldout_accuracy"}:
        return "reward"
    if "loss" in keys:
        return "sft"
    compared = any("before" in row and "after" in row for row in samples) or any(
        isinstance(value, Mapping) and "win_rate" in value for value in summary.values()
    )
    return "evaluate" if compared or "win_rate" in summary else ""
