"""The run's log: metrics.jsonl is the source of truth, TensorBoard events mirror its scalars."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ppomax.types import DataError

_logger = logging.getLogger(__name__)


class MetricsLog:
    """Appends one JSON object per row to `path` and mirrors the numbers to TensorBoard.

    `tensorboard` is the folder for event files, None for no mirror. `last` is the iteration (or step) of the checkpoint
    that a run resumes from: rows after it are dropped, because the resumed run writes them again.
    """

    def __init__(self, path: Path, tensorboard: Path | None = None, *, last: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if last is not None:
            drop_rows_after(path, last)
        _mend_tail(path)
        self._file = path.open("a", encoding="utf-8")
        self._writer = None if tensorboard is None else _tensorboard_writer(tensorboard, last)

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes and flushes one row, which has an `iteration` or a `step`.

        NaN and infinity become null, and their keys are listed under `nonfinite`.
        """
        position = _position(row)
        clean = _clean_row(row)
        self._file.write(json.dumps(clean, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        if self._writer is not None:
            for key, value in clean.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._writer.add_scalar(key, value, position)
            self._writer.flush()

    def sync(self) -> None:
        """Waits until the rows are on the disk: a checkpoint must not outlive the rows before it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file and the TensorBoard writer."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL log. A torn last line (the writer was killed) is left out; any other bad line is an error."""
    if not path.is_file():
        raise DataError(f"{path}: no such file, expected a log with one JSON object per line")
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise DataError(
                f"{path}, line {number}: malformed JSON ({error.msg}), expected one object per line; "
                "delete or repair that line"
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: found {type(row).__name__}, expected a JSON object")
        rows.append(row)
    return rows


def unbroken_rows(path: Path) -> int:
    """How many rows of a JSONL log follow each other as 0, 1, 2, …; 0 if there is no file."""
    rows = read_metrics(path) if path.exists() else []
    return next((i for i, row in enumerate(rows) if _position(row) != i), len(rows))


def append_samples(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends rows (prompts, responses, their scores) to a JSONL file in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _mend_tail(path)
    text = "".join(json.dumps(_clean_row(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def without_nan(value: Any) -> Any:
    """A summary with None for NaN and infinity, which are statistics of nothing: JSON has neither."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def drop_rows_after(path: Path, last: int) -> None:
    """Removes the rows of a JSONL log whose `iteration` (else `step`) is greater than `last`, if the file exists."""
    if not path.exists():
        return
    kept = [row for row in read_metrics(path) if _position(row) <= last]
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _mend_tail(path: Path) -> None:
    """Cuts a torn last line off, so that the next row does not become part of it."""
    if not path.exists():
        return
    content = path.read_bytes()
    if not content or content.endswith(b"\n"):
        return
    tail = content.rpartition(b"\n")[2]
    try:
        json.loads(tail)
    except ValueError:
        with path.open("r+b") as file:
            file.truncate(len(content) - len(tail))
        return
    with path.open("ab") as file:
        file.write(b"\n")


def _position(row: Mapping[str, Any]) -> int:
    for key in ("iteration", "step"):
        if row.get(key) is not None:
            return int(row[key])
    raise DataError(f"log row with keys {sorted(row)}: found neither 'iteration' nor 'step', expected one of them")


def _clean_row(row: Mapping[str, Any]) -> dict[str, Any]:
    nonfinite: list[str] = []
    clean = {key: _clean(value, key, nonfinite) for key, value in row.items()}
    if nonfinite:
        clean["nonfinite"] = sorted(set(nonfinite))
    return clean


def _clean(value: Any, key: str, nonfinite: list[str]) -> Any:
    """Plain JSON values: numpy and torch scalars become numbers, non-finite ones None."""
    if isinstance(value, Mapping):
        return {str(k): _clean(v, f"{key}.{k}", nonfinite) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(v, key, nonfinite) for v in value]
    if hasattr(value, "tolist"):
        return _clean(value.tolist(), key, nonfinite)
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite.append(key)
        return None
    return value


def _tensorboard_writer(folder: Path, last: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        _logger.warning("TensorBoard is not installed: no event files in %s, metrics.jsonl has all numbers", folder)
        return None
    return SummaryWriter(str(folder), purge_step=None if last is None else last + 1, flush_secs=5)
