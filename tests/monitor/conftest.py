"""A run directory as the quickstart leaves it, with curves like those of a real run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ppomax.monitor.preferences import JudgedPair, summary_of
from ppomax.monitor.report import write_report
from ppomax.monitor.statistics import histogram

HOSTILE = "<script>alert('x')</script> & \"quoted\" 你好 $x_1$"


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def ppo_rows(iterations: int = 24) -> list[dict[str, Any]]:
    random = np.random.default_rng(3)
    rows = []
    for i in range(1, iterations + 1):
        phase = "critic" if i <= 2 else "policy"
        gain = 1 - math.exp(-max(i - 2, 0) / 8)
        noise = random.normal(size=8) * 0.04
        scores = random.normal(-0.4 + 2.2 * gain, 1.1 - 0.4 * gain, size=256)
        rows.append(
            {
                "iteration": i, "step": 2 * i, "phase": phase,
                "score_mean": float(scores.mean()), "score_std": float(scores.std()),
                "score_histogram": histogram(scores.tolist(), bins=20, limits=(-4, 4)),
                "normalised_score_mean": 1.3 * gain + noise[0], "gold_mean": 0.05 + 0.55 * gain + noise[1],
                "kl_per_sequence": 6.2 * gain + abs(noise[2]), "kl_per_token": 0.3 * gain + abs(noise[2]) / 20,
                "response_length": 18 + 3 * gain + 10 * noise[3], "response_length_finished": 17 + 3 * gain,
                "truncated_share": 0.06 + abs(noise[4]) / 2, "perplexity": 4.2 - 1.6 * gain + noise[5],
                "entropy": 1.9 - 0.7 * gain + noise[6], "policy_loss": noise[7] / 4 if phase == "policy" else None,
                "value_loss": 0.9 * math.exp(-i / 6) + 0.12 + abs(noise[0]), "ptx_loss": 2.1 + noise[1] / 2,
                "explained_variance": -0.4 + 0.95 * (1 - math.exp(-i / 4)) + noise[2],
                "clip_fraction": 0.0 if phase == "critic" else 0.09 + abs(noise[3]),
                "approx_kl": 0.004 + abs(noise[4]) / 20,
                "ratio_max": 1.4, "grad_norm_policy": 0.8 + noise[5], "grad_norm_critic": 2.4 * math.exp(-i / 9) + 0.4,
                "lr_policy": 1e-4, "kl_coefficient": 0.05,
                "on_topic_share": 0.81 - 0.07 * gain + noise[6], "top_opening_share": 0.05 + 0.03 * gain,
                "top_closing_share": 0.03 + 0.05 * gain, "distinct_2": 0.71 - 0.06 * gain,
                "degenerate_share": abs(noise[7]) / 10, "seconds/generate": 2.2 + noise[0],
                "seconds/score": 1.6 + noise[1], "seconds/score/policy": 0.7, "seconds/score/reward/rm": 0.6,
                "seconds/score/other": 0.3 + noise[1], "seconds/total": 6.6 + noise[:3].sum(),
                "tokens_per_second": 180.0, "utilisation/generate": 0.05, "utilisation/train": 0.4 + noise[3],
                "seconds/train": 2.7 + noise[2], "seconds/other": 0.1, "tokens/response": 1200.0 + 100 * gain,
                "padding_fraction": 0.08, "peak_memory_gib": 2.1,
                "alarms": ["Responses leave the topic: 70%, limit 71%. Try a larger KL coefficient."] if i > 21 else [],
            }
        )  # fmt: skip
    return rows


def comparison_rows(count: int = 60) -> list[dict[str, Any]]:
    random = np.random.default_rng(5)
    rows = []
    for i in range(count):
        gold = random.normal([0.05, 0.6], 0.3).round(4).tolist()
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"What do you think of my garden, number {i}?"}],
                "before": f"Number {i} looks like a garden. It has some plants and a fence that needs paint.",
                "after": f"Your garden sounds lovely! I would enjoy sitting in number {i} on a warm evening.",
                "gold_before": gold[0], "gold_after": gold[1],
                "reward_before": gold[0] * 2, "reward_after": gold[1] * 2,
            }
        )  # fmt: skip
    rows[7] |= {"before": HOSTILE, "gold_before": 0.99, "gold_after": -0.9}
    return rows


def write_quickstart(run: Path) -> Path:
    random = np.random.default_rng(4)
    write_jsonl(
        run / "sft/metrics.jsonl",
        (
            {"step": s, "loss": 2.0 + 1.4 * math.exp(-s / 15) + random.normal() * 0.06, "tokens_per_second": 880.0}
            | ({"heldout_loss": 2.1 + 1.3 * math.exp(-s / 15)} if s % 10 == 0 else {})
            for s in range(1, 61)
        ),
    )
    (run / "sft/config.yaml").write_text("model: smollm2-135m\nseed: 0\noptimiser:\n  lr: 0.0002\n", encoding="utf-8")
    write_jsonl(
        run / "reward/metrics.jsonl",
        (
            {
                "step": s, "ranking_loss": 0.35 + 0.35 * math.exp(-s / 25) + random.normal() * 0.04, "lm_loss": 2.2,
                "loss": 2.55 + 0.35 * math.exp(-s / 25),
                "accuracy": min(1, 0.5 + 0.4 * (1 - math.exp(-s / 20)) + random.normal() * 0.05),
            }
            | ({"heldout_accuracy": 0.5 + 0.36 * (1 - math.exp(-s / 20)), "heldout_loss": 2.6} if s % 10 == 0 else {})
            for s in range(1, 101)
        ),
    )  # fmt: skip
    margins = random.normal(1.4, 1.3, size=400).tolist()
    longer = random.integers(-20, 21, size=400).tolist()
    judged = [
        JudgedPair(m, 0.0, 30 + n, 30, "default", i) for i, (m, n) in enumerate(zip(margins, longer, strict=True))
    ]
    write_json(run / "reward/summary.json", summary_of(judged) | {"heldout_accuracy": 0.86})
    write_jsonl(
        run / "reward/samples.jsonl",
        (
            {
                "step": 100, "kind": kind, "source": "default", "prompt": "How was the concert?", "chosen": "Very good.",
                "rejected": f"Fine, {HOSTILE}", "reward_chosen": 1.25, "reward_rejected": -0.5,
                "along_chosen": [0.1, 0.6, 1.25], "along_rejected": [0.1, -0.5],
            }
            for kind in ("wrong", "wrong", "right", "close")
        ),
    )  # fmt: skip
    write_jsonl(run / "ppo/metrics.jsonl", ppo_rows())
    write_jsonl(
        run / "ppo/samples.jsonl",
        (
            {"iteration": i, "prompt": "How was the concert?", "response": f"It was good, {HOSTILE}", "score": 0.2 * i}
            for i in (1, 1, 24, 24)
        ),
    )
    (run / "ppo/config.yaml").write_text("policy: runs/quickstart/sft/final\nseed: 0\n", encoding="utf-8")
    gold = {"win": 0.81, "tie": 0.08, "lose": 0.11, "win_rate": 0.85, "ci95": [0.80, 0.90]}
    write_json(
        run / "evaluate/summary.json",
        {
            "gold": gold, "plain": gold | {"win_rate": 0.83, "win": 0.79, "lose": 0.13},
            "reward": {"win": 0.9, "tie": 0.0, "lose": 0.1, "win_rate": 0.9},
            "best_of": {"4": {"win": 0.7, "tie": 0.1, "lose": 0.2, "win_rate": 0.75, "ci95": [0.7, 0.8]}},
            "perplexity_before": 4.2, "perplexity_after": 2.7,
        },
    )  # fmt: skip
    write_jsonl(run / "evaluate/samples.jsonl", comparison_rows())
    write_json(
        run / "summary.json",
        {
            "wall_seconds": 431.7, "reward_accuracy": 0.86, "gold": gold | {"mean_before": 0.05, "mean_after": 0.6},
            "stage_seconds": {"model": 27.0, "sft": 48.0, "label": 51.0, "reward": 70.0, "ppo": 190.0, "evaluate": 46},
            "kl_per_sequence": 6.1, "length_before": 18.2, "length_after": 20.7, "distinct2_before": 0.71,
            "distinct2_after": 0.65, "topic_before": 0.81, "topic_after": 0.74, "iterations": 24, "seed": 0,
        },
    )  # fmt: skip
    return run


@pytest.fixture
def quickstart(tmp_path: Path) -> Path:
    """A whole quickstart directory, to be changed by the test."""
    return write_quickstart(tmp_path / "quickstart")


@pytest.fixture(scope="module")
def quickstart_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a whole quickstart directory."""
    run = write_quickstart(tmp_path_factory.mktemp("run") / "quickstart")
    return write_report(run).read_text(encoding="utf-8")


@pytest.fixture
def make_ppo_rows() -> Callable[..., list[dict[str, Any]]]:
    """Makes the metrics of a PPO run: `make_ppo_rows(iterations=24)`."""
    return ppo_rows
