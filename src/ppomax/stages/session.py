"""What every training verb shares around its algorithm: run directory, plan, log, checkpoints, interruption."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from ppomax.config import PPOConfig, RewardConfig, SaveConfig, Schema, SFTConfig
from ppomax.config.layers import nearest, plain
from ppomax.engine import world
from ppomax.engine.background import Background, copied
from ppomax.engine.checkpoint import (
    checkpoint_number,
    checkpoints,
    dry_run,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from ppomax.engine.durable import disk_errors, sync_folder, write_json_atomic
from ppomax.engine.rundir import Run, open_run, save_final
from ppomax.errors import NonFiniteError, SaveError, first_line
from ppomax.monitor.log import MetricsLog, drop_rows_after, read_metrics, unbroken_rows
from ppomax.monitor.progress import Advance, LastingConsole, progress
from ppomax.monitor.report import write_report
from ppomax.stages.inputs import expect_same_weights, weights_hash
from ppomax.stages.stopping import Stop, asking_to_stop, interrupted
from ppomax.types import DataError, SetupError

# Settings that may differ between a run and its resumption: they do not change the result, beyond rounding.
NEUTRAL = (
    "run_dir", "save", "fresh", "reward_timeout", "compare",
    "compute.device", "compute.shard", "compute.offload", "compute.wait_minutes",
    # What bounds memory changes rounding alone; after running out of it there must be a way on.
    "compute.tokens_per_microbatch", "compute.gradient_checkpointing", "sampling.max_rows", "sampling.max_cache_tokens",
)  # fmt: skip
NONFINITE = "nonfinite"

TrainingConfig: TypeAlias = SFTConfig | RewardConfig | PPOConfig
# Measures that PPO has none of while the critic learns alone.
OF_POLICY_UPDATES = ("policy_loss", "clip_fraction", "approx_kl", "ratio_max", "ptx_loss", "grad_norm_policy")


@dataclass
class Session:
    """One training run in progress. Of several processes the first one writes and prints; all call the same methods."""

    run: Run
    save: SaveConfig
    unit: str
    started: float = field(default_factory=time.monotonic)
    stop: Stop = field(default_factory=Stop)
    earlier_seconds: float = 0.0
    frozen: dict[str, str] = field(default_factory=dict)
    data: str = ""
    console: LastingConsole = field(
        default_factory=lambda: LastingConsole(stderr=True, highlight=False, quiet=not world.is_first())
    )
    log: MetricsLog | None = None
    wait_minutes: float = 30
    at_end: ExitStack = field(default_factory=ExitStack)
    # What `save.keep_best` was at its best, larger being better, and in which row.
    best: tuple[float, int] = (-math.inf, -1)
    best_is_known: bool = False
    # Checkpoints that nothing will go on from: damaged ones, and those after the one that this run went on from.
    abandoned: set[str] = field(default_factory=set)
    saving: Background = field(default_factory=Background)

    def finished(self) -> dict[str, Any] | None:
        """The summary of a run that was finished before, said so; nothing of it is done or written again."""
        if not world.first(lambda: self.run.finished):
            return None
        self.console.print(f"{self.run.path}: already finished; --fresh starts over", markup=False, soft_wrap=True)
        try:
            return json.loads(self.run.summary.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{self.run.summary}: damaged ({first_line(error)}); restore it, or --fresh") from error

    def plan(self, title: str, facts: Mapping[str, str]) -> None:
        """Print what is about to happen, before it does."""
        self.console.print(title, style="bold", markup=False, soft_wrap=True)
        for name, fact in facts.items():
            self.console.print(f"  {name:<12} {fact}", markup=False, soft_wrap=True)

    def describe(self, card: Mapping[str, Any]) -> None:
        """Write data.json, the data card."""
        world.first(lambda: write_json_atomic(self.run.data, card))

    def rehearse(self, bytes_needed: int) -> None:
        """Dry-run the save: a disk that cannot hold the checkpoints is found before step 1.

        All that was given has been read by now, so a run that `fresh` is to replace goes; its space counts as free.
        """
        dry_run(self.run.checkpoints, bytes_needed, copies=self._room(), freed=world.first(self.run.previous_bytes))
        world.first(self.run.forget_previous)

    def _room(self) -> int:
        """Checkpoints that the disk must still hold: a new one is complete before an old one goes."""
        most = self.save.keep + 1 + (self.save.keep_best is not None)
        return max(most - len(checkpoints(self.run.checkpoints)), 1)

    def restore(
        self, frozen: Sequence[str], data: str, empty: Callable[[], Mapping[str, Tensor]]
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and state of the newest intact checkpoint, if the run goes on from one.

        frozen: the models whose weights the run reads but no checkpoint holds; they must be those it began with.
        data: what identifies the rows that it reads, which must be the same as well.
        empty: tensors, sharded as the run has them, that several processes read the checkpoint's into.
        """
        self.frozen, self.data = world.first(lambda: {name: weights_hash(name) for name in frozen}), data
        path, self.abandoned = world.first(self._newest)
        last = -1
        restored = None
        if path is not None:
            restored = load_checkpoint(path, like=empty() if world.size() > 1 else None, verified=True)
            for name, fingerprint in restored[1]["frozen"].items():
                world.first(partial(expect_same_weights, "frozen model", name, fingerprint))
            if restored[1].get("data", data) != data:
                raise SetupError(
                    "data: found other rows than those that this run began with, expected the same: their order and "
                    "number decide what each step reads. Restore the files, or begin anew with --fresh"
                )
            last = int(restored[1][self.unit])
            self.earlier_seconds = float(restored[1].get("seconds", 0.0))
            self.console.print(f"going on from {path}", markup=False)
        if world.is_first():
            drop_rows_after(self.run.samples, last)
            self.log = MetricsLog(self.run.metrics, self.run.path, last=last)
        for row in world.first(lambda: read_metrics(self.run.metrics)) if self.save.keep_best and last >= 0 else ():
            before = self.best
            self._compare(row)
            if f"{self.unit}-{row[self.unit]}" in self.abandoned:  # its checkpoint is damaged: others may be the best
                self.best = before
        self.meet("start")
        return restored

    def meet(self, where: str) -> None:
        """Wait for all processes; an error names those that do not come."""
        world.meet(f"{self.run.verb}, {where}", minutes=self.wait_minutes)

    def progress(
        self, total: int, *, done: int = 0, unit: str = "steps", what: str = ""
    ) -> AbstractContextManager[Advance]:
        """The run's progress bar; `what`: of something beside its steps."""
        label = f"{self.run.verb}, {what}" if what else self.run.verb
        return progress(label, total, done=done, unit=unit, quiet=not world.is_first())

    def reading(self, rows: int) -> AbstractContextManager[Advance]:
        """The progress of frozen layers that read all rows before the first step."""
        return self.progress(rows, unit="rows", what="frozen layers")

    def _newest(self) -> tuple[Path | None, set[str]]:
        """The newest intact checkpoint up to which the log is whole, and `abandoned`; what is passed over is said."""
        rows = unbroken_rows(self.run.metrics)
        beyond = [p.name for p in checkpoints(self.run.checkpoints) if checkpoint_number(p) >= rows]
        path, problems = latest_checkpoint(self.run.checkpoints, at_most=rows - 1)
        if beyond:
            problems = [f"{self.run.metrics}: found {rows} rows, fewer than {', '.join(beyond)} had", *problems]
        self._say_damaged(problems)
        if path is not None:
            number = checkpoint_number(path)
            abandoned = {p.name for p in checkpoints(path.parent) if checkpoint_number(p) > number}
            while (best := self._best([], abandoned)) and best != [path.name]:
                if not (problems := verify_checkpoint(path.parent / best[0])):
                    break
                self._say_damaged(problems)
                abandoned.update(best)
            return path, abandoned
        cause = ""
        if beyond:
            cause = "the log ends before any intact checkpoint; restore it or"
        elif problems:
            cause = "no checkpoint is intact;"
        elif rows > self._rows_unsaved or self.run.summary.exists():
            cause = f"no checkpoint is left of a run with {rows} rows in its log; restore them or"
        if cause:
            raise SetupError(f"{self.run.checkpoints}: {cause} start over with --fresh")
        return None, set()

    def _say_damaged(self, problems: Sequence[str]) -> None:
        for problem in problems:
            said = f"passed over a damaged checkpoint: {problem}"
            self.console.print(said, style="yellow", markup=False, soft_wrap=True)

    @property
    def _rows_unsaved(self) -> int:
        """As many rows may be in the log before the first checkpoint is complete, by the settings that they had."""
        given = {**self.save.model_dump(), **self.run.stored.get("save", {})}
        return given["every"] * (2 if given["background"] else 1)

    def seconds(self) -> float:
        """Seconds of work so far, earlier parts of a resumed run included."""
        return self.earlier_seconds + time.monotonic() - self.started

    def checkpoint(
        self, number: int, last: bool, state: Callable[[], tuple[Mapping[str, Tensor], dict[str, Any]]]
    ) -> None:
        """Save after `number` if it is due or the best so far; after an interruption, save and raise Interrupted.

        A save in the background that failed raises here, one step after it did.
        """
        self.saving.settle(wait=False)
        due = (number + 1) % self.save.every == 0 or last or self.best[1] == number
        stop = int(world.largest(self.stop.by or 0))
        if not due and not stop:
            return
        self.meet(f"checkpoint of {self.unit} {number}")
        tensors, values = state()
        values = {**values, self.unit: number, "seconds": self.seconds(), "frozen": self.frozen, "data": self.data}
        name = f"{self.unit}-{number}"
        spare: list[str] = []
        self.saving.settle()
        if world.is_first():
            self._sync_rows()
            self.abandoned.discard(name)
            spare = self._best([name], self.abandoned)
        in_background = self.save.background and not (stop or last)
        save = partial(
            save_checkpoint, self.run.checkpoints, name, copied(tensors) if in_background else tensors, values,
            keep=self.save.keep, spare=spare, superseded=set(self.abandoned),
        )  # fmt: skip
        if in_background:
            self.saving.start(save)
        else:
            save()
        if stop and not last:
            raise interrupted(stop, f"stopped after {self.unit} {number} and saved in {self.run.checkpoints}")

    def _sync_rows(self) -> None:
        if self.log is not None:
            with disk_errors(self.run.metrics):
                self.log.sync()
        if self.run.samples.exists():
            with disk_errors(self.run.samples):
                sync_folder(self.run.samples)
        # Their names too: a log that was made or replaced since must not be the old one again after a power cut.
        with disk_errors(self.run.path):
            sync_folder(self.run.path)

    def _best(self, new: Sequence[str], abandoned: Collection[str]) -> list[str]:
        """The checkpoint with the best `save.keep_best`, of those on the disk and the new one, less the abandoned."""
        if self.save.keep_best is None:
            return []
        rows = {row[self.unit]: self._goodness(row) for row in read_metrics(self.run.metrics)}
        names = {*new, *(path.name for path in checkpoints(self.run.checkpoints))} - {*abandoned}
        judged = [(good, name) for name in names if (good := rows.get(checkpoint_number(Path(name)))) is not None]
        return [max(judged)[1]] if judged else []

    def _goodness(self, row: Mapping[str, Any]) -> float | None:
        """What `save.keep_best` says of a row, larger being better; None where it says nothing."""
        key = self.save.keep_best or ""
        value = row.get(self._best_metric)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return -value if key.startswith("-") else value

    @property
    def _best_metric(self) -> str:
        return (self.save.keep_best or "").removeprefix("-")

    def _compare(self, row: Mapping[str, Any]) -> None:
        self.best_is_known |= isinstance(row.get(self._best_metric), int | float)
        good = self._goodness(row)
        if good is not None and good > self.best[0]:
            self.best = good, row[self.unit]

    def say_stopping(self) -> None:
        """Tell that Ctrl-C or SIGTERM was heard."""
        warning = f"\nstopping: finishing this {self.unit}, then saving (again: stop at once)"
        self.console.print(warning, style="yellow")

    def finish(self, export: Callable[[Path], None], summary: Mapping[str, Any]) -> dict[str, Any]:
        """Write final/, summary.json and report.html."""
        self.save_model(self.run.final, export)
        result = {**summary, "wall_seconds": round(self.seconds(), 2)}
        world.first(lambda: self._conclude(result))
        return result

    def save_model(self, folder: Path, export: Callable[[Path], None]) -> None:
        """Write a model's directory, whole or not at all; where processes share it, all of them give their part."""
        if world.is_first():
            save_final(folder, export)
        else:
            export(folder)
        self.meet(f"export of {folder.name}")

    def _conclude(self, result: Mapping[str, Any]) -> None:
        write_json_atomic(self.run.summary, result)
        with disk_errors(self.run.report):
            write_report(self.run.path)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row of measurements; `restore` has opened the log."""
        if self.save.keep_best:  # when to save is decided alike everywhere
            row = world.of_first(row)
        self._compare(row)
        best, early = self._best_metric, row.get("phase") == "critic"
        if best and not self.best_is_known and not (early and best in OF_POLICY_UPDATES):
            known = sorted(key for key in row if isinstance(row[key], int | float))
            raise SetupError(f"save.keep_best: found {best!r}{nearest(best, known)} Known here: {', '.join(known)}")
        if not world.is_first():
            return
        assert self.log is not None
        with disk_errors(self.run.metrics):
            self.log.append(row)

    def close(self) -> None:
        """Finish a save that is being written; close the log, if it was opened, and what asked for it by `at_end`."""
        with self.at_end, suppress(Exception):  # of two failures the first one is on its way
            try:
                self.saving.settle()
            finally:
                # Every row was flushed: what is left to write has failed before.
                if self.log is not None:
                    self.log.close()


@contextmanager
def opened_run(
    path: Path, *, verb: str, config: Schema, resume: bool, fresh: bool, ignore: Collection[str]
) -> Iterator[Run]:
    """`open_run` for the time of a block. A run that fails before its first result leaves nothing in a directory that
    was empty, so that the mended command needs no --fresh; one that was to replace another leaves that as it was."""
    was_there = os.path.isdir(path)  # Path.is_dir raises where the folder above cannot be read
    with disk_errors(path):
        was_empty = not was_there or not any(path.iterdir())
    opened: list[Run] = []
    # The first process holds the lock for all; an open file cannot be handed on.
    world.first(
        lambda: opened.append(
            open_run(path, verb=verb, config=plain(config), resume=resume, fresh=fresh, ignore=ignore)
        )
    )
    run = opened[0] if opened else Run(path, verb)
    try:
        yield run
        world.first(run.forget_previous)
    except BaseException:
        if world.is_first() and not _begun(run) and not run.bring_back_previous() and was_empty:
            shutil.rmtree(path.resolve(), ignore_errors=True)
            if was_there:
                path.resolve().mkdir(exist_ok=True)
        raise
    finally:
        run.close()


def _begun(run: Run) -> bool:
    measured = run.metrics.exists() and run.metrics.stat().st_size > 0
    saved = run.checkpoints.is_dir() and any(run.checkpoints.iterdir())
    return measured or saved or run.has_results() or (run.path / NONFINITE).exists()


@contextmanager
def session(verb: str, config: TrainingConfig, *, unit: str, resume: bool, fresh: bool) -> Iterator[Session]:
    """Open the run directory and watch for Ctrl-C and SIGTERM: the first asks for a save, a second stops at once."""
    minutes = config.compute.wait_minutes
    with (
        world.joined(minutes=minutes, device=config.compute.device),
        opened_run(config.run_dir, verb=verb, config=config, resume=resume, fresh=fresh, ignore=NEUTRAL) as run,
    ):
        current = Session(run, config.save, unit, wait_minutes=minutes, saving=Background(minutes=minutes))
        try:
            with asking_to_stop(
                current.stop, say=current.say_stopping, grace=config.save.grace, kept=str(run.checkpoints)
            ):
                yield current
        except NonFiniteError as error:
            raise _kept(current, error) from error
        finally:
            current.close()


def _kept(current: Session, error: NonFiniteError) -> NonFiniteError:
    """Save the batch beside the run for `ppomax replay`; returns the error that says so."""
    number = int(error.state[current.unit])
    try:
        path = save_checkpoint(
            current.run.path / NONFINITE, f"{current.unit}-{number}", error.tensors, error.state, keep=1
        )  # fmt: skip
        said = f"The batch is in {path}; to look into it: ppomax replay {current.run.path}"
    except SaveError as failure:
        said = f"The batch could not be kept: {failure}"
    return NonFiniteError(f"{error}. {said}", error.tensors, error.state)
