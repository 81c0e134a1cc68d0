"""Trap 29: a run that was stopped or killed goes on as if it never had been, bit for bit, with real signals."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from ppomax.cli import main
from ppomax.engine.checkpoint import latest_checkpoint, save_checkpoint
from ppomax.errors import SaveError
from ppomax.stages import session
from stages.conftest import Toys, Trained
from stages.processes import Command, rows_in
from stages.toy import expect_equal, metrics, prompt_rows, weights, write_rows

Words = Callable[[str, Path], list[str]]
LAST_ROW = {"sft": 38, "reward": 39, "ppo": 13}


@pytest.fixture(scope="module")
def words(trained: Trained, toys: Toys, tmp_path_factory: pytest.TempPathFactory) -> Words:
    """The command line of a verb: small runs of several epochs that save every third step."""
    # 20 prompts and 8 an iteration: epochs of prompts end within iterations.
    prompts = write_rows(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", prompt_rows(20))
    common = "--compute.dtype float32 --compute.device cpu --optim.lr 5e-3 --save.every 3"
    own = {
        "sft": f"--model tiny --data {toys.dialogues} --heldout 0.1 --epochs 3 --eval-every 5",
        "reward": f"--model {trained.sft} --data {toys.pairs} --heldout 0.2 --epochs 5 --tokens-per-batch 2048",
        "ppo": f"--policy {trained.sft} --reward {trained.reward} --prompts {prompts} --ptx-data {toys.dialogues} "
        "--ptx-weight 0.1 --iterations 14 --rollout-batch 8 --minibatch 4 --sampling.max-new-tokens 8 "
        "--critic.optim.lr 5e-3 --judge stages.toy:length_reward",
    }
    return lambda verb, run_dir: [verb, "--run-dir", str(run_dir), *own[verb].split(), *common.split()]


@pytest.fixture(scope="module")
def uninterrupted(words: Words, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run directory of a verb that was never stopped."""
    done: dict[str, Path] = {}

    def run(verb: str) -> Path:
        if verb not in done:
            done[verb] = tmp_path_factory.mktemp("uninterrupted") / verb
            assert main(words(verb, done[verb])) == 0
            assert len(metrics(done[verb])) == LAST_ROW[verb] + 1
        return done[verb]

    return run


@pytest.mark.parametrize(("verb", "number"), [("sft", 2), ("reward", 2), ("ppo", 2), ("ppo", 15)])
def test_trap_22_and_29_stopped_by_a_signal_it_saves_says_how_to_go_on_and_does(
    verb: str, number: int, words: Words, uninterrupted: Callable[[str], Path], command: type[Command], tmp_path: Path
) -> None:
    stop_after = random.Random(f"{verb} {number}").randint(2, LAST_ROW[verb] - 3)
    run_dir = tmp_path / "run"
    running = command(words(verb, run_dir), tmp_path / "log")
    running.wait_for(lambda: rows_in(run_dir / "metrics.jsonl") >= stop_after)
    assert running.stop(signal.Signals(number)) == {signal.SIGINT: 130, signal.SIGTERM: 0}[number]
    unit = "iteration" if verb == "ppo" else "step"
    last = rows_in(run_dir / "metrics.jsonl") - 1
    assert f"stopped after {unit} {last} and saved in {run_dir / 'checkpoints'}" in running.said().replace("\n", " ")
    assert "To go on: the same command with --resume" in running.said()
    assert latest_checkpoint(run_dir / "checkpoints") == (run_dir / "checkpoints" / f"{unit}-{last}", [])
    assert not (run_dir / "summary.json").exists()
    assert main([*words(verb, run_dir), "--resume"]) == 0
    expect_equal(verb, run_dir, uninterrupted(verb))


def test_stopped_while_nobody_reads_what_it_says_it_saves_all_the_same(words: Words, tmp_path: Path) -> None:
    """`ppomax ... 2>&1 | tee log`: Ctrl-C ends tee as well."""
    run_dir = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    running = subprocess.Popen(
        [sys.executable, "-m", "ppomax", *words("ppo", run_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
    )
    assert running.stdout is not None
    while rows_in(run_dir / "metrics.jsonl") < 1:
        assert running.poll() is None, running.stdout.read()
        time.sleep(0.002)
    running.stdout.close()
    running.send_signal(signal.SIGINT)
    assert running.wait(240) == 130
    path, problems = latest_checkpoint(run_dir / "checkpoints")
    assert path is not None and not problems and not (run_dir / "summary.json").exists()


@pytest.mark.parametrize(("verb", "save_every"), [("sft", None), ("reward", None), ("ppo", None), ("ppo", "5")])
def test_trap_29_killed_it_goes_on_from_the_last_checkpoint_without_repeating_a_row(
    verb: str, save_every: str | None, words: Words, uninterrupted: Callable[[str], Path], command: type[Command],
    tmp_path: Path,
) -> None:  # fmt: skip
    stop_after = random.Random(f"{verb} {save_every}").randint(4, LAST_ROW[verb] - 3)
    run_dir = tmp_path / "run"
    running = command(words(verb, run_dir), tmp_path / "log")
    running.wait_for(lambda: rows_in(run_dir / "metrics.jsonl") >= stop_after)
    assert running.stop(signal.SIGKILL) == -9
    # How often it saves may change: it does not change the result.
    other = ["--save.every", save_every] if save_every else []
    assert main([*words(verb, run_dir), *other, "--resume"]) == 0
    expect_equal(verb, run_dir, uninterrupted(verb))


@pytest.mark.parametrize("background", [False, True])
def test_trap_30_killed_again_and_again_at_any_moment_no_saved_work_is_lost(
    background: bool, words: Words, uninterrupted: Callable[[str], Path], command: type[Command], tmp_path: Path
) -> None:
    """With a save after every iteration, most moments are within a save."""
    draw, run_dir = random.Random(0), tmp_path / "run"
    options, reached = ["--save.every", "1", "--save.keep", "2", *["--save.background"] * background], -1
    for attempt, row in enumerate((1, 4, 8)):
        running = command([*words("ppo", run_dir), *options, "--resume"], tmp_path / f"log-{attempt}")
        running.wait_for(lambda row=row: rows_in(run_dir / "metrics.jsonl") >= row)
        time.sleep(draw.random() * 0.08)
        assert running.stop(signal.SIGKILL) == -9
        newest, problems = latest_checkpoint(run_dir / "checkpoints")
        assert problems == []
        saved = int(newest.name.rsplit("-", 1)[1]) if newest else -1
        assert saved >= max(row - 2 - background, reached)
        reached = saved
        assert len([p for p in (run_dir / "checkpoints").iterdir() if not p.name.startswith(".")]) <= 3
    assert main([*words("ppo", run_dir), *options, "--resume"]) == 0
    expect_equal("ppo", run_dir, uninterrupted("ppo"))
    kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert kept == ["iteration-12", "iteration-13"]


def test_training_goes_on_while_a_checkpoint_is_written_in_the_background(
    words: Words, uninterrupted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_dir, written = tmp_path / "run", []

    def slow(folder: Path, name: str, *args: Any, **options: Any) -> Path:
        """Begins when two more rows are there, which the last one does not get."""
        number, until = int(name.rsplit("-", 1)[1]), time.monotonic() + 20
        while rows_in(run_dir / "metrics.jsonl") < number + 3 and number < LAST_ROW["sft"]:
            assert time.monotonic() < until, "training waits"
            time.sleep(0.01)
        written.append(number)
        return save_checkpoint(folder, name, *args, **options)

    monkeypatch.setattr(session, "save_checkpoint", slow)
    assert main([*words("sft", run_dir), "--save.background"]) == 0
    assert written == [*range(2, LAST_ROW["sft"], 3), LAST_ROW["sft"]]
    expect_equal("sft", run_dir, uninterrupted("sft"))


def test_a_save_that_fails_in_the_background_ends_the_run_at_the_next_step(
    words: Words, uninterrupted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run_dir, options = tmp_path / "run", ["--save.background"]

    def full(folder: Path, name: str, *args: Any, **kwargs: Any) -> Path:
        if name == "step-11":
            raise SaveError(f"{folder / name}: no space left")
        return save_checkpoint(folder, name, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(session, "save_checkpoint", full)
        assert main([*words("sft", run_dir), *options]) != 0
    assert "step-11: no space left" in capsys.readouterr().err.replace("\n", " ")
    # Noticed at the next step whose turn it is, at the latest when the next save is due.
    assert 12 < rows_in(run_dir / "metrics.jsonl") <= 15
    assert latest_checkpoint(run_dir / "checkpoints") == (run_dir / "checkpoints" / "step-8", [])
    assert main([*words("sft", run_dir), *options, "--resume"]) == 0
    expect_equal("sft", run_dir, uninterrupted("sft"))


def test_killed_before_the_first_row_it_starts_over_without_being_asked(
    words: Words, uninterrupted: Callable[[str], Path], command: type[Command], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    running = command(words("sft", run_dir), tmp_path / "log")
    running.wait_for(lambda: (run_dir / "config.yaml").exists())
    assert running.stop(signal.SIGKILL) == -9
    resumed = ["--resume"] if (run_dir / "metrics.jsonl").exists() else []  # it may have been quick
    assert main([*words("sft", run_dir), *resumed]) == 0
    expect_equal("sft", run_dir, uninterrupted("sft"))


def test_a_second_interrupt_stops_at_once(
    words: Words, command: type[Command], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, slow = tmp_path / "run", ["--judge", "stages.toy:slow_reward"]
    running = command([*words("ppo", run_dir), *slow], tmp_path / "log")
    running.wait_for(lambda: rows_in(run_dir / "metrics.jsonl") >= 1)
    running.signal(signal.SIGINT)
    running.wait_for(lambda: "stopping: finishing this iteration, then saving" in running.said())
    began = time.monotonic()
    assert running.stop(signal.SIGINT) == 130
    assert "stopped at once; nothing after the last checkpoint is kept" in running.said()
    assert time.monotonic() - began < 20  # the judge would take 60
    assert latest_checkpoint(run_dir / "checkpoints") == (None, [])


@pytest.fixture(scope="module")
def stopped(
    words: Words, trained: Trained, one_thread: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A PPO run that was interrupted, with checkpoints of three iterations."""
    folder = tmp_path_factory.mktemp("stopped")
    running = Command([*words("ppo", folder / "run"), "--save.keep", "3"], folder / "log")
    running.wait_for(lambda: rows_in(folder / "run" / "metrics.jsonl") >= 8)
    assert running.stop(signal.SIGINT) == 130
    yield folder / "run"
    Command.end_all()


@pytest.fixture
def copied(stopped: Path, tmp_path: Path) -> Path:
    """A run directory may be moved: nothing in it says where it is."""
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_it_used(
    copied: Path, words: Words, uninterrupted: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    newest, _ = latest_checkpoint(copied / "checkpoints")
    assert newest is not None
    shard = next(newest.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    before, _ = latest_checkpoint(copied / "checkpoints")
    assert before is not None and before != newest
    assert main([*words("ppo", copied), "--resume"]) == 0
    said = capsys.readouterr().err.replace("\n", "")
    assert f"passed over a damaged checkpoint: {shard}: found SHA-256" in said
    assert f"going on from {before}" in said
    expect_equal("ppo", copied, uninterrupted("ppo"))


def test_where_no_checkpoint_is_intact_nothing_is_done(
    copied: Path, words: Words, capsys: pytest.CaptureFixture[str]
) -> None:
    for manifest in (copied / "checkpoints").glob("*/manifest.json"):
        manifest.write_text("{}")
    rows = (copied / "metrics.jsonl").read_bytes()
    assert main([*words("ppo", copied), "--resume"]) == 2
    assert "no checkpoint is intact; start over with --fresh" in capsys.readouterr().err.replace("\n", " ")
    assert (copied / "metrics.jsonl").read_bytes() == rows


def test_where_all_checkpoints_are_gone_the_log_stays(
    copied: Path, words: Words, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copied / "checkpoints")
    rows = (copied / "metrics.jsonl").read_bytes()
    assert main([*words("ppo", copied), "--resume"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"no checkpoint is left of a run with {len(rows.splitlines())} rows in its log; restore them or" in said
    assert (copied / "metrics.jsonl").read_bytes() == rows


@pytest.mark.parametrize("background", [False, True])
def test_a_run_killed_before_its_first_checkpoint_was_complete_begins_anew(
    background: bool, copied: Path, words: Words, uninterrupted: Callable[[str], Path]
) -> None:
    every, turns = 2, 2 if background else 1
    shutil.rmtree(copied / "checkpoints")
    keep_rows(copied, every * turns)
    written_with(copied, every=every, background=background)
    # How often it saves from now on says nothing of the rows that are there.
    assert main([*words("ppo", copied), "--save.every=1", "--save.no-background", "--resume"]) == 0
    expect_equal("ppo", copied, uninterrupted("ppo"))


@pytest.mark.parametrize("background", [False, True])
def test_a_row_more_says_that_checkpoints_were_lost(
    background: bool, copied: Path, words: Words, capsys: pytest.CaptureFixture[str]
) -> None:
    every, turns = 1, 2 if background else 1
    shutil.rmtree(copied / "checkpoints")
    keep_rows(copied, every * turns + 1)
    written_with(copied, every=every, background=background)
    assert main([*words("ppo", copied), "--save.every=9", "--save.background", "--resume"]) == 2
    assert f"no checkpoint is left of a run with {every * turns + 1} rows" in " ".join(capsys.readouterr().err.split())


def written_with(run: Path, **save: Any) -> None:
    """Let the run's settings say that it saved so."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["save"].update(save)
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def keep_rows(run: Path, count: int) -> None:
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert len(rows) >= count
    (run / "metrics.jsonl").write_text("".join(rows[:count]))


def test_a_torn_last_row_is_no_obstacle(copied: Path, words: Words, uninterrupted: Callable[[str], Path]) -> None:
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (copied / name).open("a") as file:
            file.write('{"iteration": 8, "score_')
    assert main([*words("ppo", copied), "--resume"]) == 0
    expect_equal("ppo", copied, uninterrupted("ppo"))


@pytest.mark.parametrize("role", ["sft", "reward"])
def test_a_frozen_model_that_changed_in_between_is_refused(
    role: str, copied: Path, words: Words, trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(getattr(trained, role))
    original = (folder / "model.safetensors").read_bytes()
    changed = {k: v + 1e-3 for k, v in weights(folder).items()}
    rows = (copied / "metrics.jsonl").read_bytes()
    try:
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        assert main([*words("ppo", copied), "--resume"]) == 2
    finally:
        (folder / "model.safetensors").write_bytes(original)
    said = capsys.readouterr().err.replace("\n", " ")
    assert f"frozen model {folder}: its weights changed since the run began; restore them or start with --fresh" in said
    assert (copied / "metrics.jsonl").read_bytes() == rows


@pytest.mark.parametrize("verb", ["sft", "reward"])
def test_a_base_model_that_changed_in_between_is_refused(
    verb: str,
    words: Words,
    trained: Trained,
    command: type[Command],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With frozen layers, the checkpoint holds the upper ones only: on another model they would be nonsense."""
    base, run_dir = tmp_path / "base", tmp_path / "run"
    shutil.copytree(trained.sft, base)
    arguments = [*words(verb, run_dir), "--model", str(base), "--compute.train-layers", "1"]
    running = command(arguments, tmp_path / "log")
    running.wait_for(lambda: rows_in(run_dir / "metrics.jsonl") >= 3)
    assert running.stop(signal.SIGINT) == 130
    other = weights(base)
    other["model.layers.0.mlp.up_proj.weight"] = torch.zeros_like(other["model.layers.0.mlp.up_proj.weight"])
    save_file(other, base / "model.safetensors", metadata={"format": "pt"})
    assert main([*arguments, "--resume"]) == 2
    assert f"frozen model {base}: its weights changed" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("flag", ["--prompts", "--ptx-data"])
def test_data_that_changed_in_between_is_refused(
    flag: str, copied: Path, words: Words, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their number and order decide what an iteration reads, and what a buffer's responses answer."""
    arguments = [*words("ppo", copied), "--resume"]
    file = Path(arguments[arguments.index(flag) + 1])
    original = file.read_bytes()
    kept = {name: (copied / name).read_bytes() for name in ("metrics.jsonl", "data.json")}
    try:
        file.write_bytes(b"".join(original.splitlines(keepends=True)[1:]))
        assert main(arguments) == 2
    finally:
        file.write_bytes(original)
    assert "data: found other rows than those that this run began with" in capsys.readouterr().err.replace("\n", " ")
    assert {name: (copied / name).read_bytes() for name in kept} == kept


def test_an_unknown_best_metric_is_found_on_resuming_too(
    copied: Path, words: Words, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words("ppo", copied), "--resume", "--save.keep-best", "gold_men"]) == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert "save.keep_best: found 'gold_men'; did you mean 'gold_mean'?" in said


def test_an_unfinished_run_is_not_gone_on_with_by_chance(
    copied: Path, words: Words, uninterrupted: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words("ppo", copied)) == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert "found an unfinished `ppomax ppo` run with these settings" in said
    assert "use --resume to go on with it, --fresh to delete it and start over" in said
    assert main([*words("ppo", copied), "--resume", "--seed", "1"]) == 2
    assert "with other settings: seed: found 0, expected 1" in capsys.readouterr().err.replace("\n", " ")
    assert main([*words("ppo", copied), "--fresh"]) == 0
    expect_equal("ppo", copied, uninterrupted("ppo"))
