"""Run directories: who owns one, what is in it, and files in it that are never half written."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import yaml

from ppomax.engine.durable import (
    TEMPORARY,
    disk_errors,
    publish,
    settle,
    write_json_atomic,
    write_text_atomic,
)
from ppomax.types import SetupError

RUN_FORMAT = "ppomax-run-1"
TRAINING_VERBS = ("sft", "reward", "ppo")
_COMPLETE = ".complete"
# Where `fresh` puts the run that was there, until the new one has something to show for it.
PREVIOUS = ".previous"

_README = """This directory is one run of `ppomax {verb}`.

config.yaml      every setting of the run, defaults included
data.json        what was read, what was dropped and why, sources, lengths, repetitions, splits
metrics.jsonl    one JSON object per line: the measurements, in order; all plots are drawn from it
samples.jsonl    texts that the model wrote along the way, one JSON object per line
events.out.*     the same measurements for TensorBoard
samples.md       some of these texts side by side, as a table (evaluate)
answers/         what both systems answered so far, until they are compared (evaluate)
checkpoints/     what `--resume` goes on from: weights, optimiser and counters (safetensors and JSON, with hashes)
exported/        models that `ppomax checkpoint export` made of them
nonfinite/       the batch whose gradients were no numbers, where that ended the run; `ppomax replay` reads it again
final/           the trained model in Hugging Face layout; load it with transformers, vLLM or anything that reads it
critic/          the critic, and
last/            the policy as it was trained last, where final/ is its moving average (ppo); both as final/ is
pairs.jsonl      answers that the judge ordered, counted in pairs.json (quickstart); until it is there,
                 those sampled so far are in pairs.answers.jsonl
sft/ reward/ ... a directory like this one for each stage, whose times are in stage_seconds.json (quickstart)
report.html      plots and samples in one page; open it in a browser
summary.json     the result in a few numbers; only a run that is complete has it
run.json         marks this directory as a run of ppomax
.lock            held by the process that writes here

Not every run has every file. After an interruption give the same command again, for sft, reward and ppo with
`--resume`; to start over, `--fresh`.
"""
_CONFIG_HEADER = """# The settings of this run of `ppomax {verb}`, as resolved from recipe, file and flags.
# To repeat it elsewhere: ppomax {verb} --config this-file --run-dir another-directory
"""


@dataclass(frozen=True)
class Run:
    """The paths of one run directory. `lock` is the open lock file: held until `close()` or the end of the process.

    stored: the settings that its config.yaml held before it was opened.
    """

    path: Path
    verb: str
    lock: TextIO | None = field(default=None, repr=False, compare=False)
    stored: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def config(self) -> Path:
        """Every setting, YAML."""
        return self.path / "config.yaml"

    @property
    def data(self) -> Path:
        """The data card: what was read, dropped, split."""
        return self.path / "data.json"

    @property
    def metrics(self) -> Path:
        """Measurements, JSON lines: the source of truth."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Sampled texts, JSON lines."""
        return self.path / "samples.jsonl"

    @property
    def answers(self) -> Path:
        """Folder of the answers that an evaluation has so far, until they are compared."""
        return self.path / "answers"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        """The trained model in Hugging Face layout, written by `save_final`."""
        return self.path / "final"

    @property
    def report(self) -> Path:
        """One self-contained page."""
        return self.path / "report.html"

    @property
    def summary(self) -> Path:
        """The result in a few numbers, of a run that is complete."""
        return self.path / "summary.json"

    @property
    def finished(self) -> bool:
        """True when summary.json is there and, for a verb that trains, `final/` is complete."""
        return self.summary.is_file() and (self.verb not in TRAINING_VERBS or final_complete(self.final))

    def has_results(self) -> bool:
        """Whether there is anything that a model has written, or what came of it."""
        return any(p.exists() for p in (self.final, self.samples, self.summary, *self.answers.glob("*")))

    def previous_bytes(self) -> int:
        """Bytes of the run that `fresh` set aside."""
        return sum(p.lstat().st_size for p in (self.path / PREVIOUS).rglob("*"))

    def forget_previous(self) -> None:
        """Delete the run that `fresh` set aside, if there is one: from here on the new one counts."""
        previous = self.path / PREVIOUS
        if previous.exists():
            gone = self.path / f"{TEMPORARY}previous"  # by another name first: half a run must not be brought back
            with disk_errors(self.path):
                os.rename(previous, gone)
                shutil.rmtree(gone)

    def bring_back_previous(self) -> bool:
        """Undo `fresh`, where the new run came to nothing: the old one takes its place again. Whether there was one."""
        previous = self.path / PREVIOUS
        if not previous.is_dir():
            return False
        with disk_errors(self.path):
            if (self.path / "run.json").exists():  # else this was interrupted before, and what is here is the old run's
                _delete(_entries(self.path), last=("run.json",))
            _move(_entries(previous), self.path, last=("run.json",))
            previous.rmdir()
        return True

    def close(self) -> None:
        """Release the lock, so that another run may open the directory."""
        if self.lock is not None:
            self.lock.close()


def open_run(
    path: Path | str,
    *,
    verb: str,
    config: Mapping[str, Any],
    resume: bool = False,
    fresh: bool = False,
    ignore: Collection[str] = (),
) -> Run:
    """Create, reuse or refuse the run directory `path`, and lock it for this process.

    A new or empty directory becomes a run. A run of the same verb and config is returned if it is finished, has no
    work in it yet, or `resume` is set. All else is a SetupError. `fresh` sets aside what is in a directory of ours;
    `Run.forget_previous` deletes it for good.
    ignore: config keys (dotted: "logging.every") that do not change the result and may differ.
    """
    path = Path(path)
    if resume and fresh:
        raise SetupError(f"{path}: found both --resume and --fresh, expected at most one; --fresh deletes the old run")
    if path.exists() and not path.is_dir():
        raise SetupError(f"{path}: found a file, expected a directory; choose another output directory")
    foreign = _contents(path) and stored_verb(path) is None and stored_verb(path / PREVIOUS) is None
    if foreign:
        raise SetupError(
            f"{path}: found a directory with other files ({', '.join(_contents(path)[:3])}), expected a new or empty "
            "one or a run of ppomax; nothing is written or deleted there, choose another output directory"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        run = Run(path, verb, _take_lock(path))
    except OSError as error:
        raise SetupError(
            f"{path}: cannot write here ({error.strerror}), expected a directory that can be written; "
            "choose another output directory"
        ) from error
    try:
        if not (path / "run.json").exists() or not _has_work(run):  # a `fresh` that was killed before it had begun
            run.bring_back_previous()
        if fresh and (path / PREVIOUS).exists() and not run.finished:  # one that was to replace what is set aside
            _delete(_entries(path), last=("run.json",))
        elif fresh:
            run.forget_previous()
            _set_aside(path)
        run = replace(run, stored=_checked_settings(run, config, resume, ignore))
        settle(path)
        settle(run.checkpoints)
        if not run.finished:
            _describe(run, config)
    except BaseException:
        run.close()
        raise
    return run


def _describe(run: Run, config: Mapping[str, Any]) -> None:
    """Write what the directory is, config.yaml last: a run without it was never begun."""
    write_json_atomic(run.path / "run.json", {"format": RUN_FORMAT, "verb": run.verb})
    write_text_atomic(run.path / "README.txt", _README.format(verb=run.verb))
    text = yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)
    write_text_atomic(run.config, _CONFIG_HEADER.format(verb=run.verb) + text)


def _checked_settings(run: Run, config: Mapping[str, Any], resume: bool, ignore: Collection[str]) -> Mapping[str, Any]:
    """The settings that are stored there, if this run may go on with them; none where there is no run."""
    choices = "--fresh to delete it and start over, or choose another output directory"
    found_verb = stored_verb(run.path)
    if not run.config.exists() and _has_work(run):
        raise SetupError(
            f"{run.config}: found nothing, expected the settings of the run that is here; restore it, use {choices}"
        )
    if found_verb is None or not run.config.exists():
        return {}
    if found_verb != run.verb:
        raise SetupError(
            f"{run.path}: found a run of `ppomax {found_verb}`, expected one of `ppomax {run.verb}`; use {choices}"
        )
    stored = _read_yaml(run.config)
    found, expected = _flat(stored), _flat(_plain(config))
    skip = tuple(ignore)
    differing = [
        f"{key}: found {_show(found, key)}, expected {_show(expected, key)}"
        for key in sorted(found.keys() | expected.keys())
        if (key not in found or key not in expected or found[key] != expected[key])
        and not any(key == name or key.startswith(f"{name}.") for name in skip)
    ]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        flag = "" if resume else " and --resume"
        raise SetupError(
            f"{run.config}: this directory holds a `ppomax {run.verb}` run with other settings: "
            f"{'; '.join(differing[:3])}{more}. Give the same settings{flag} to go on with it, use {choices}"
        )
    if not resume and not run.finished and _has_work(run):
        raise SetupError(
            f"{run.path}: found an unfinished `ppomax {run.verb}` run with these settings, expected a new directory; "
            f"use --resume to go on with it, {choices}"
        )
    return stored


def _has_work(run: Run) -> bool:
    saved = run.checkpoints.iterdir() if run.checkpoints.is_dir() else ()
    return run.metrics.exists() or run.has_results() or any(not p.name.startswith(TEMPORARY) for p in saved)


def _contents(path: Path) -> list[str]:
    """Names in the directory, apart from what we leave where a run was never begun."""
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    return [name for name in names if name not in (".lock", PREVIOUS, f"{TEMPORARY}run.json")]


def stored_verb(path: Path) -> str | None:
    """The verb of a run directory of ours, None for any other directory."""
    try:
        marker = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker.get("verb") if isinstance(marker, dict) and marker.get("format") == RUN_FORMAT else None


def _take_lock(path: Path) -> TextIO:
    # "a+" neither truncates nor fails when the file is new; the pid is written only once the lock is ours.
    lock = open(path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115  held open for the life of the run
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        pid = lock.read().strip() or "unknown"
        lock.close()
        raise SetupError(
            f"{path}: found a lock held by process {pid}, expected no other process writing this run; "
            "wait for it, stop it, or choose another output directory"
        ) from None
    lock.seek(0)
    lock.truncate()
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    # A reward's worker processes would inherit it, and outlive a run that was killed.
    os.register_at_fork(after_in_child=lock.close)
    return lock


def _set_aside(path: Path) -> None:
    """Move a run out of the way. Without run.json, which goes first, what a kill leaves is the old run's."""
    with disk_errors(path):
        (path / PREVIOUS).mkdir()
        _move(_entries(path), path / PREVIOUS, first=("run.json",))


def _entries(path: Path) -> list[Path]:
    return [entry for entry in path.iterdir() if entry.name not in (".lock", PREVIOUS)]


def _move(entries: Iterable[Path], folder: Path, *, first: Collection[str] = (), last: Collection[str] = ()) -> None:
    for entry in sorted(entries, key=lambda e: (e.name in last, e.name not in first)):
        os.rename(entry, folder / entry.name)


def _delete(entries: Iterable[Path], *, last: Collection[str]) -> None:
    for entry in sorted(entries, key=lambda e: e.name in last):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as YAML gives it back, so that tuples and lists compare equal."""
    return yaml.safe_load(yaml.safe_dump(dict(config))) or {}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        where = str(error).replace("\n", " ")
        raise SetupError(f"{path}: found {where}, expected YAML; restore the file or start over with --fresh") from None
    return config if isinstance(config, dict) else {}


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, dict) or not config:
        return {prefix: config} if prefix else {}
    parts = (_flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in config.items())
    return {key: value for part in parts for key, value in part.items()}


def _show(flat: dict[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "nothing"


def save_final(folder: Path, write: Callable[[Path], None]) -> Path:
    """Write a model folder as a whole: `write` fills a temporary sibling, which then takes the name `folder`."""
    temporary = folder.parent / f"{TEMPORARY}{folder.name}"
    with disk_errors(folder, temporary=temporary):
        folder.parent.mkdir(parents=True, exist_ok=True)
        settle(folder.parent)
        temporary.mkdir()
        write(temporary)
        sizes = {str(f.relative_to(temporary)): f.stat().st_size for f in sorted(temporary.rglob("*")) if f.is_file()}
        write_json_atomic(temporary / _COMPLETE, sizes)
        publish(temporary, folder)
    return folder


def final_complete(folder: Path) -> bool:
    """True when `save_final` wrote the folder and every file still has the size it had then."""
    try:
        sizes = json.loads((folder / _COMPLETE).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False
