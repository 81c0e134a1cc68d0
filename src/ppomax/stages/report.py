"""The report of a run, or of a folder of runs, written anew."""

from __future__ import annotations

from pathlib import Path

from ppomax.config import ReportConfig
from ppomax.monitor.report import write_report


def report(config: ReportConfig) -> Path:
    """Write `report.html` from what lies in `run_dir`; returns its path. Raises DataError and SaveError."""
    return write_report(config.run_dir)
