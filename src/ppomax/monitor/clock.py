"""Where the time of an iteration goes: seconds, tokens and floating-point operations by part."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ppomax.types import Work


class Clock:
    """`with clock("score"): ...` times a part, within it `with clock("score/reference", work): ...` a part of that.

    device: on a GPU every boundary waits for what was queued, so that seconds count where they were asked for. peak:
    the most operations a second that the machine does, if that is known.
    """

    def __init__(self, device: torch.device | None = None, peak: float | None = None) -> None:
        self.device, self.peak = device, peak
        self.restart()

    def restart(self) -> None:
        """Begin an iteration."""
        self.seconds: dict[str, float] = {}
        self.work: dict[str, Work] = {}
        self.began = self._now()

    @contextmanager
    def __call__(self, part: str, work: Work | None = None) -> Iterator[None]:
        """Add the seconds of a block to a part, and the work that is done in it."""
        began = self._now()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + self._now() - began
        if work is not None:
            self.count(part, work)

    def count(self, part: str, work: Work) -> None:
        """Add to the work of a part."""
        self.work[part] = self.work.get(part, Work()) + work

    def row(self) -> dict[str, float]:
        """Keys of metrics.jsonl since `restart`: see docs/metrics.md.

        The inner parts of a part add up to it with its `other`, and the outer parts with `other` to `total`.
        """
        seconds, work = dict(self.seconds), dict(self.work)
        outer = [part for part in self.seconds if "/" not in part]
        seconds["total"] = self._now() - self.began
        seconds["other"] = seconds["total"] - sum(self.seconds[part] for part in outer)
        for part in outer:
            inside = [inner for inner in self.seconds if inner.startswith(f"{part}/")]
            if inside:
                seconds[f"{part}/other"] = self.seconds[part] - sum(self.seconds[inner] for inner in inside)
            work[part] = sum((w for inner, w in self.work.items() if inner.startswith(f"{part}/")), Work())
        work["total"] = sum(self.work.values(), Work())
        row: dict[str, float] = {f"seconds/{part}": value for part, value in seconds.items()}
        row |= {f"tokens/{part}": w.tokens for part, w in self.work.items()}
        row |= {f"padding/{part}": 1.0 - w.tokens / w.slots for part, w in work.items() if w.slots}
        for part, w in work.items():
            if w.flops and seconds[part] > 0:
                row |= {f"flops/{part}": w.flops, f"flops_per_second/{part}": w.flops / seconds[part]}
                if self.peak:
                    row[f"utilisation/{part}"] = w.flops / seconds[part] / self.peak
        if self.peak:
            row["peak_flops_per_second"] = self.peak
        return row

    def _now(self) -> float:
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def step_row(work: Work, seconds: float) -> dict[str, float]:
    """Keys of metrics.jsonl for an optimiser step of a run that only trains."""
    row: dict[str, float] = {"seconds": seconds, "tokens/read": work.tokens, "tokens_per_second": work.tokens / seconds}
    row["padding"] = 1.0 - work.tokens / work.slots
    return row | ({"flops": work.flops, "flops_per_second": work.flops / seconds} if work.flops else {})
