"""report.html: one self-contained page, made from what lies in the run directory and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ppomax.errors import SaveError
from ppomax.monitor.card import card_rows
from ppomax.monitor.pictures import Picture, pictures_of
from ppomax.monitor.plots import AMBER, BLUE, GREEN, GREY, PURPLE, RED, share_bars
from ppomax.monitor.run_files import RunFiles, config_value, last_finite, number, read_run_tree, series
from ppomax.monitor.samples import (
    RankedPair,
    SamplePair,
    TrainingSample,
    chosen_pairs,
    ranked_pairs,
    training_samples,
)
from ppomax.monitor.verdict import Change, Comparison, changes, comparisons, headline, sentences, stage_seconds

_TITLES = {
    "sft": "Supervised fine-tuning",
    "reward": "The reward model",
    "ppo": "Reinforcement learning with PPO",
    "evaluate": "Evaluation",
}
_HIDDEN_METRICS = frozenset({"iteration", "step", "phase", "alarms", "nonfinite", "score_histogram"})


@dataclass(frozen=True)
class AlarmGroup:
    """One kind of alarm, with the iterations in which it held and its newest message."""

    title: str
    detail: str
    when: str


@dataclass(frozen=True)
class MetricRange:
    """A row of the table of all metrics."""

    key: str
    first: str
    lowest: str
    highest: str
    last: str


@dataclass(frozen=True)
class Chapter:
    """One stage of the report."""

    stage: str
    title: str
    facts: tuple[str, ...]
    pictures: tuple[Picture, ...]
    alarms: tuple[AlarmGroup, ...]
    fitness: tuple[str, tuple[str, ...]] | None
    training_samples: tuple[TrainingSample, ...]
    ranked_pairs: tuple[RankedPair, ...]
    data: tuple[tuple[str, str], ...]
    metrics: tuple[MetricRange, ...]
    config: str


@dataclass(frozen=True)
class Evaluation:
    """What the evaluation chapter adds: comparisons, changes, and answers side by side."""

    outcome: Picture | None
    comparisons: tuple[Comparison, ...]
    changes: tuple[Change, ...]
    spread: tuple[SamplePair, ...]
    worst: tuple[SamplePair, ...]
    count: int


def write_report(run_dir: Path | str) -> Path:
    """Writes `run_dir/report.html` from the run's files and its sub-runs sft, reward, ppo and evaluate.

    Pieces that are missing are left out. Raises SetupError where there is nothing to report.
    """
    run_dir = Path(run_dir)
    root, runs = read_run_tree(run_dir)
    chapters = [_chapter(run) for run in runs.values()]
    alarm_count = sum(len(chapter.alarms) for chapter in chapters)
    environment = Environment(
        loader=PackageLoader("ppomax.monitor", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup  # only for our own drawings; everything else is escaped
    page = environment.get_template("report.html.j2").render(
        name=run_dir.resolve().name,
        numbers=headline(root, runs),
        sentences=sentences(root, runs, alarm_count),
        chapters=chapters,
        evaluation=_evaluation(root, runs),
        stage_times=_stage_times(root),
        facts=_root_facts(root),
    )
    path = run_dir / "report.html"
    temporary = path.with_name("report.html.tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise SaveError(
            f"{path}: found that it cannot be written ({error.strerror}), expected room and rights"
        ) from error
    return path


def _chapter(run: RunFiles) -> Chapter:
    return Chapter(
        stage=run.stage,
        title=_TITLES[run.stage],
        facts=tuple(_facts(run)),
        pictures=tuple(pictures_of(run)),
        alarms=tuple(_alarm_groups(run.metrics)),
        fitness=_fitness(run),
        ranked_pairs=tuple(ranked_pairs(run.samples) if run.stage == "reward" else ()),
        training_samples=tuple(training_samples(run.samples) if run.stage == "ppo" else ()),
        data=tuple(card_rows(run.data)),
        metrics=tuple(_metric_ranges(run.metrics)),
        config=run.config.strip(),
    )


def _fitness(run: RunFiles) -> tuple[str, tuple[str, ...]] | None:
    """The reward stage's verdict: yes, with care or no, and its reasons."""
    found = run.summary.get("fit_for_ppo")
    if run.stage != "reward" or not isinstance(found, Mapping):
        return None
    return str(found.get("answer", "")), tuple(str(reason) for reason in found.get("reasons") or ())


def _facts(run: RunFiles) -> list[str]:
    """Short facts for the line under a chapter's title."""
    facts = []
    model = config_value(run, "model", "policy")
    if isinstance(model, str):
        facts.append(f"model {model}")
    for key, word in (("iteration", "iterations"), ("step", "optimiser steps")):
        count = last_finite(run.metrics, key)
        if math.isfinite(count):
            facts.append(f"{count + 1:,.0f} {word}")  # rows are numbered from 0
    seed = config_value(run, "seed")
    if seed is not None:
        facts.append(f"seed {seed}")
    rates = [value for value in series(run.metrics, "tokens_per_second") if math.isfinite(value)]
    if rates:
        facts.append(f"{sum(rates) / len(rates):,.0f} tokens per second")
    memory = [value for value in series(run.metrics, "peak_memory_gib") if math.isfinite(value)]
    if memory:
        facts.append(f"{max(memory):.1f} GiB of memory at most")
    return facts


def _root_facts(root: RunFiles) -> list[str]:
    seed = root.summary.get("seed")
    return [] if seed is None else [f"seed {seed}"]


def _alarm_groups(rows: Sequence[Mapping[str, Any]]) -> list[AlarmGroup]:
    """Alarms of all rows, grouped by the words before the first colon."""
    seen: dict[str, list[tuple[int, str]]] = {}
    for i, row in enumerate(rows, start=1):
        for message in row.get("alarms") or ():
            title, _, detail = str(message).partition(":")
            seen.setdefault(title, []).append((int(row.get("iteration", row.get("step", i))), detail.strip()))
    groups = []
    for title, entries in seen.items():
        first, last = entries[0][0], entries[-1][0]
        when = f"iteration {first}" if first == last else f"iterations {first} to {last}, {len(entries)} times"
        groups.append(AlarmGroup(title, entries[-1][1], when))
    return groups


def _metric_ranges(rows: Sequence[Mapping[str, Any]]) -> list[MetricRange]:
    keys = sorted({key for row in rows for key in row} - _HIDDEN_METRICS)
    ranges = []
    for key in keys:
        values = [value for value in series(rows, key) if math.isfinite(value)]
        if values:
            shown = (f"{value:.4g}" for value in (values[0], min(values), max(values), values[-1]))
            ranges.append(MetricRange(key, *shown))
    return ranges


def _evaluation(root: RunFiles, runs: Mapping[str, RunFiles]) -> Evaluation | None:
    compared, changed = comparisons(root, runs), changes(root, runs)
    rows = runs["evaluate"].samples if "evaluate" in runs else ()
    spread, worst = chosen_pairs(rows)
    if not (compared or changed or spread):
        return None
    outcome = None
    if compared:
        overall_first = sorted(compared, key=lambda entry: ", source " in entry.name)
        bars = [(entry.name, (entry.win, entry.tie, entry.lose)) for entry in overall_first[:16]]
        outcome = Picture(
            "Win, tie, lose",
            share_bars(bars, (("policy better", GREEN), ("tie", GREY), ("baseline better", RED)), unit="%"),
            "Each bar is one judge (or one source of prompts): how often it preferred the policy's answer, and how "
            'often the baseline\'s. For "best of n" nothing is trained: the baseline writes n answers and the reward '
            "model picks one.",
            "Green that is long only for the reward model and not for a judge that training never saw.",
        )
    return Evaluation(outcome, tuple(compared), tuple(changed), tuple(spread), tuple(worst), len(rows))


def _stage_times(root: RunFiles) -> Picture | None:
    stages = stage_seconds(root)
    if not stages:
        return None
    colours = (GREY, "#0891b2", AMBER, PURPLE, BLUE, GREEN, "#be185d", RED)
    parts = [(name, colours[i % len(colours)]) for i, (name, _) in enumerate(stages)]
    svg = share_bars([("", [number(seconds) for _, seconds in stages])], parts, unit="s")
    return Picture("Time by stage", svg, "Seconds that each stage took, from left to right in their order.", "")
