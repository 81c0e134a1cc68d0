from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ppomax.monitor.log import MetricsLog, append_samples, drop_rows_after, read_metrics
from ppomax.types import DataError


def test_rows_come_back_as_written_and_nonfinite_numbers_are_named(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append({"iteration": 1, "score_mean": torch.tensor(0.5), "kl": np.float32(0.25), "phase": "policy"})
        log.append({"iteration": 2, "score_mean": float("nan"), "histogram": {"counts": [1.0, float("inf")]}})
        flushed = path.read_text()
    assert flushed.count("\n") == 2
    assert read_metrics(path) == [
        {"iteration": 1, "score_mean": 0.5, "kl": 0.25, "phase": "policy"},
        {
            "iteration": 2,
            "score_mean": None,
            "histogram": {"counts": [1.0, None]},
            "nonfinite": ["histogram.counts", "score_mean"],
        },
    ]
    assert "NaN" not in flushed and "Infinity" not in flushed


def test_a_row_needs_an_iteration_or_a_step(tmp_path: Path) -> None:
    with (
        MetricsLog(tmp_path / "metrics.jsonl") as log,
        pytest.raises(DataError, match="neither 'iteration' nor 'step'"),
    ):
        log.append({"loss": 1.0})


def test_a_torn_last_line_is_left_out_and_cut_off_before_the_next_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes('{"step": 1}\n{"step": 2, "note": "你'.encode()[:-1])
    assert read_metrics(path) == [{"step": 1}]
    with MetricsLog(path) as log:
        log.append({"step": 2})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


def test_a_last_line_that_only_lacks_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    with MetricsLog(path) as log:
        log.append({"step": 3})
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


@pytest.mark.parametrize(("line", "found"), [("{oops}", "malformed JSON"), ("[1]", "found list")])
def test_a_bad_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path, line: str, found: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(DataError, match=f"line 2: {found}"):
        read_metrics(path)


def test_a_missing_log_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_resumed_log_repeats_no_iteration(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for i in (1, 2, 3):
            log.append({"iteration": i, "step": 10 * i, "run": "first"})
    with MetricsLog(path, last=2) as log:
        log.append({"iteration": 3, "step": 30, "run": "second"})
    assert [(row["iteration"], row["run"]) for row in read_metrics(path)] == [(1, "first"), (2, "first"), (3, "second")]


def test_samples_are_appended_and_dropped_by_iteration(tmp_path: Path) -> None:
    path = tmp_path / "run" / "samples.jsonl"
    append_samples(path, [{"iteration": 1, "response": "你好\n\u2028<b>"}])
    append_samples(path, [{"iteration": 2, "response": "b", "score": float("-inf")}, {"iteration": 2, "response": "c"}])
    drop_rows_after(tmp_path / "none.jsonl", 1)
    assert [row["response"] for row in read_metrics(path)] == ["你好\n\u2028<b>", "b", "c"]
    assert json.loads(path.read_text().split("\n")[1])["nonfinite"] == ["score"]
    drop_rows_after(path, 1)
    assert [row["iteration"] for row in read_metrics(path)] == [1]


def test_scalars_are_mirrored_to_tensorboard_under_the_iteration(tmp_path: Path) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "events") as log:
        log.append({"iteration": 7, "step": 14, "kl_per_token": 0.5, "loss": float("nan"), "phase": "policy"})
    events = loader.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"iteration", "step", "kl_per_token"}
    scalar = events.Scalars("kl_per_token")[0]
    assert (scalar.step, scalar.value) == (7, 0.5)


def test_a_missing_tensorboard_is_said_once_and_the_log_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.WARNING), MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "events") as log:
        log.append({"step": 1})
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["TensorBoard is not installed"]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
