"""What else may befall a run: damaged files, a full disk, a reward that hangs, a scheduler that wants the machine."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stages.processes import Command, rows_in

from faults.conftest import Words, expect_equal
from ppomax.cli import main
from ppomax.engine.checkpoint import latest_checkpoint, save_checkpoint, verify_checkpoint

LENGTH = ("--iterations", "6")


@pytest.fixture(scope="module")
def stopped(words: Words, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that was stopped after some of its six iterations, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("stopped")
    running = Command(words("ppo", folder / "run", *LENGTH, "--save.keep", "9"), folder / "log")
    running.wait_for(lambda: (folder / "run" / "checkpoints" / "iteration-2").exists())
    running.stop(signal.SIGKILL)
    yield folder / "run"
    Command.end_all()


@pytest.fixture
def copied(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def flip(file: Path, at: int, bit: int = 1) -> None:
    content = bytearray(file.read_bytes())
    content[at % len(content)] ^= bit
    file.write_bytes(content)


def test_a_flipped_byte_in_any_file_of_a_checkpoint_is_reported_and_the_one_before_used(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest, _ = latest_checkpoint(copied / "checkpoints")
    assert newest is not None
    files = sorted(newest.iterdir())
    assert {file.name for file in files} >= {"state.json", "manifest.json"} and len(files) >= 3
    for file in files:
        content = file.read_bytes()
        for at in (0, len(content) // 3, len(content) - 1):
            flip(file, at)
            capsys.readouterr()
            assert main(["checkpoint", "verify", str(copied)]) == 1
            assert str(newest) in capsys.readouterr().err.replace("\n", "")
            found, problems = latest_checkpoint(copied / "checkpoints")
            assert found is not None and found != newest and problems
            file.write_bytes(content)
    assert main(["checkpoint", "verify", str(copied)]) == 0


def test_every_flipped_bit_of_a_manifest_is_found(tmp_path: Path) -> None:
    """The one file that no hash covers: no flip leaves a manifest that says the same or is believed."""
    path = save_checkpoint(tmp_path, "step-1", {}, {})
    manifest = path / "manifest.json"
    content = manifest.read_bytes()
    for at in range(len(content)):
        for bit in range(8):
            flip(manifest, at, 1 << bit)
            assert verify_checkpoint(path), f"byte {at}, bit {bit} of {content!r}"
            manifest.write_bytes(content)
    assert verify_checkpoint(path) == []


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_costs_its_work_and_nothing_else(
    copied: Path, words: Words, uninterrupted: Callable[..., Path]
) -> None:
    newest, _ = latest_checkpoint(copied / "checkpoints")
    assert newest is not None
    flip(newest / "state.json", 5)
    assert main([*words("ppo", copied, *LENGTH), "--resume"]) == 0
    expect_equal("ppo", copied, uninterrupted("ppo", *LENGTH))


@pytest.mark.slow
def test_a_log_that_lost_rows_sends_the_run_back_to_where_it_is_whole(
    copied: Path, words: Words, uninterrupted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    log = copied / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:2]) + lines[2][:40])
    assert main([*words("ppo", copied, *LENGTH), "--resume"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"{log}: found 2 rows, fewer than iteration-2" in said and "going on from" in said
    expect_equal("ppo", copied, uninterrupted("ppo", *LENGTH))


def test_a_log_that_is_gone_is_not_made_up(copied: Path, words: Words, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "metrics.jsonl").unlink()
    assert main([*words("ppo", copied, *LENGTH), "--resume"]) == 2
    assert "the log ends before any intact checkpoint; restore it or start over" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.slow
def test_a_disk_that_is_full_during_a_save_costs_nothing_that_was_saved(
    words: Words, uninterrupted: Callable[..., Path], command: type[Command], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can only be mounted by root")
    try:
        arguments = words("ppo", disk / "run", *LENGTH)
        running = command(arguments, tmp_path / "log")
        running.wait_for(lambda: rows_in(disk / "run" / "metrics.jsonl") >= 2)
        # Rows can still be written, a checkpoint cannot.
        (disk / "filler").write_bytes(b"x" * max(shutil.disk_usage(disk).free - 100_000, 0))
        assert running.end() == 1
        assert "cannot save (No space left on device" in running.said()
        newest, problems = latest_checkpoint(disk / "run" / "checkpoints")
        assert newest is not None and problems == []
        (disk / "filler").unlink()
        assert main([*arguments, "--resume"]) == 0
        expect_equal("ppo", disk / "run", uninterrupted("ppo", *LENGTH))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_reward_that_hangs_ends_the_run_after_its_time(
    words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = words("ppo", tmp_path / "run", "--critic.init", "policy", "--reward-timeout", "0.5")
    line[line.index("--reward") + 1] = "stages.toy:hanging_reward"
    began = time.monotonic()
    assert main(line) == 2
    assert time.monotonic() - began < 50  # it would hang for a minute
    said = " ".join(capsys.readouterr().err.split())
    assert "error: reward stages.toy:hanging_reward: no answer after 0.5 seconds (reward_timeout)" in said


@pytest.mark.slow
def test_after_sigterm_the_grace_is_kept_and_the_exit_code_is_0(
    words: Words, command: type[Command], tmp_path: Path
) -> None:
    """An iteration that takes longer than the grace is given up; what was saved before it stays."""
    slow = ["--judge", "stages.toy:slow_reward", "--save.grace", "0.5"]
    running = command(words("ppo", tmp_path / "run", *slow), tmp_path / "log")
    running.wait_for(lambda: "thinking" in running.said())
    began = time.monotonic()
    assert running.stop(signal.SIGTERM) == 0
    assert time.monotonic() - began < 40  # the judge takes a minute
    assert "stopped at once; nothing after the last checkpoint" in running.said().replace("\n", " ")
    assert latest_checkpoint(tmp_path / "run" / "checkpoints") == (tmp_path / "run" / "checkpoints" / "iteration-0", [])
