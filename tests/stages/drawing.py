"""Reports of toy runs draw each kind of run once: pictures take most of a toy run's time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from ppomax.monitor import report
from ppomax.monitor.pictures import Picture, pictures_of
from ppomax.monitor.run_files import RunFiles

_drawn: set[Any] = set()


def pictures_once(run: RunFiles) -> list[Picture]:
    """The pictures of a run, if this process has drawn none yet of a run with these measurements and this data card;
    one row is another kind than several."""
    measured = frozenset(key for row in run.metrics for key in row), min(len(run.metrics), 2)
    kind = run.stage, measured, frozenset(run.summary), frozenset(run.data)
    if kind in _drawn:
        return []
    pictures = pictures_of(run)
    _drawn.add(kind)
    return pictures


@contextmanager
def _drawn_by(draw: Callable[[RunFiles], list[Picture]]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "pictures_of", draw)
        yield


def each_kind_once() -> AbstractContextManager[None]:
    """For the time of a block."""
    return _drawn_by(pictures_once)


def every_picture() -> AbstractContextManager[None]:
    """The same as users see, within such a block."""
    return _drawn_by(pictures_of)
