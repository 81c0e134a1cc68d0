"""Who owns a run directory, and what is in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ppomax.engine.durable import TEMPORARY
from ppomax.engine.rundir import (
    Run,
    final_complete,
    open_run,
    save_final,
    write_json_atomic,
)
from ppomax.types import SetupError

CONFIG = {"seed": 1, "kl": {"coef": 0.05, "target": None}, "sources": ["a", "b"], "logging": {"every": 10}}


def work(run: Run) -> Run:
    """Leave a run as an interruption does: with a metric, and closed."""
    run.metrics.write_text('{"iteration": 1}\n')
    run.close()
    return run


def finish(run: Run) -> None:
    save_final(run.final, lambda folder: (folder / "config.json").write_text("{}"))
    write_json_atomic(run.summary, {"iterations": 1})
    run.close()


def test_a_new_run_explains_itself(tmp_path: Path) -> None:
    run = open_run(tmp_path / "a" / "run", verb="ppo", config=CONFIG)
    text = run.config.read_text()
    assert yaml.safe_load(text) == CONFIG
    assert text.startswith("#") and "ppomax ppo --config" in text
    readme = (run.path / "README.txt").read_text()
    for name in ("config", "metrics", "samples", "checkpoints", "final", "report", "summary"):
        assert getattr(run, name).name in readme
    for name in ("samples.md", "critic/", "last/", "exported/", "pairs.jsonl"):
        assert f"\n{name} " in readme
    assert "{" not in readme and not run.finished
    assert {p.name for p in run.path.iterdir()} == {".lock", "README.txt", "config.yaml", "run.json"}


def test_an_empty_directory_and_a_run_without_work_are_taken(tmp_path: Path) -> None:
    open_run(tmp_path, verb="ppo", config=CONFIG).close()
    open_run(tmp_path, verb="ppo", config=CONFIG).close()


def test_an_unfinished_run_needs_a_choice(tmp_path: Path) -> None:
    work(open_run(tmp_path, verb="ppo", config=CONFIG))
    with pytest.raises(SetupError) as caught:
        open_run(tmp_path, verb="ppo", config=CONFIG)
    for part in (str(tmp_path), "unfinished", "expected", "--resume", "--fresh", "another output directory"):
        assert part in str(caught.value)
    run = open_run(tmp_path, verb="ppo", config={**CONFIG, "sources": ("a", "b")}, resume=True)
    assert run.metrics.read_text() == '{"iteration": 1}\n'


def test_a_finished_run_is_reused(tmp_path: Path) -> None:
    finish(open_run(tmp_path, verb="ppo", config=CONFIG))
    run = open_run(tmp_path, verb="ppo", config=CONFIG)
    assert run.finished and (run.final / "config.json").read_text() == "{}"


def test_another_config_is_refused_with_its_differences(tmp_path: Path) -> None:
    work(open_run(tmp_path, verb="ppo", config=CONFIG))
    other = {"seed": 2, "kl": {"coef": 0.1, "target": None}, "sources": ["a", "b"], "logging": {"every": 1}, "new": 3}
    for resume in (False, True):
        with pytest.raises(SetupError) as caught:
            open_run(tmp_path, verb="ppo", config=other, resume=resume)
        message = str(caught.value)
        assert "kl.coef: found 0.05, expected 0.1" in message and "logging.every: found 10, expected 1" in message
        assert "new: found nothing, expected 3" in message and "and 1 more" in message and "target" not in message
        for part in (str(tmp_path / "config.yaml"), "--fresh", "another output directory"):
            assert part in message
        assert ("--resume" in message) == (not resume), (
            "who resumes, or evaluates, which has no such flag, needs no hint"
        )


def test_ignored_keys_may_differ_and_are_recorded(tmp_path: Path) -> None:
    work(open_run(tmp_path, verb="ppo", config=CONFIG))
    other = {**CONFIG, "logging": {"every": 1, "colour": True}}
    run = open_run(tmp_path, verb="ppo", config=other, resume=True, ignore=["logging"])
    assert yaml.safe_load(run.config.read_text()) == other
    run.close()
    with pytest.raises(SetupError, match=r"seed: found 1, expected 5"):
        open_run(tmp_path, verb="ppo", config={**other, "seed": 5}, resume=True, ignore=["logging", "see"])


def test_another_verb_is_refused(tmp_path: Path) -> None:
    work(open_run(tmp_path, verb="sft", config=CONFIG))
    with pytest.raises(SetupError, match=r"found a run of `ppomax sft`, expected one of `ppomax ppo`.*--fresh"):
        open_run(tmp_path, verb="ppo", config=CONFIG, resume=True)


def test_a_result_without_metrics_is_not_given_up_for_what_it_replaced(tmp_path: Path) -> None:
    """An evaluation that was killed when its summary was there, and the old one was still to be deleted."""
    old = open_run(tmp_path, verb="evaluate", config={"seed": 1})
    write_json_atomic(old.summary, {"seed": 1})
    old.close()
    new = open_run(tmp_path, verb="evaluate", config={"seed": 2}, fresh=True)
    write_json_atomic(new.summary, {"seed": 2})
    new.close()
    again = open_run(tmp_path, verb="evaluate", config={"seed": 2})
    assert again.summary.read_text() == '{\n  "seed": 2\n}\n' and again.finished
    again.close()


@pytest.mark.parametrize("fresh", [False, True])
def test_a_directory_that_is_not_a_run_is_never_touched(tmp_path: Path, fresh: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "run.json").write_text('{"verb": "ppo"}')
    with pytest.raises(SetupError, match=r"run\.json, thesis\.tex.*nothing is written or deleted there, choose"):
        open_run(tmp_path, verb="ppo", config=CONFIG, fresh=fresh)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.json", "thesis.tex"]


@pytest.mark.parametrize("name", [".tmp-cache", ".old-models"])
def test_names_like_those_of_our_leftovers_make_no_directory_ours(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(SetupError, match="nothing is written or deleted there, choose"):
        open_run(tmp_path, verb="ppo", config=CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_file_and_a_path_below_a_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(SetupError, match="found a file, expected a directory"):
        open_run(file, verb="ppo", config=CONFIG)
    with pytest.raises(SetupError, match=r"file/run: cannot write here \(Not a directory\).*choose another"):
        open_run(file / "run", verb="ppo", config=CONFIG)


def test_fresh_starts_over(tmp_path: Path) -> None:
    run = open_run(tmp_path, verb="sft", config=CONFIG)
    run.checkpoints.mkdir()
    finish(work(run))
    fresh = open_run(tmp_path, verb="ppo", config={"seed": 9}, fresh=True)
    fresh.forget_previous()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "README.txt", "config.yaml", "run.json"]
    assert fresh.verb == "ppo" and yaml.safe_load(fresh.config.read_text()) == {"seed": 9}
    with pytest.raises(SetupError, match="both --resume and --fresh"):
        open_run(tmp_path, verb="ppo", config=CONFIG, fresh=True, resume=True)


def contents(path: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file() and p.name != ".lock"
    }


def test_what_fresh_replaces_comes_back_until_it_is_forgotten(tmp_path: Path) -> None:
    run = open_run(tmp_path, verb="sft", config=CONFIG)
    run.checkpoints.mkdir()
    finish(work(run))
    before = contents(tmp_path)
    fresh = open_run(tmp_path, verb="ppo", config={"seed": 9}, fresh=True)
    assert not fresh.final.exists() and not fresh.finished
    assert fresh.bring_back_previous() and not fresh.bring_back_previous()
    fresh.close()
    assert contents(tmp_path) == before
    # A process that was killed before the new run had begun: whoever comes next finds the old run, and may say fresh.
    open_run(tmp_path, verb="ppo", config={"seed": 9}, fresh=True).close()
    with pytest.raises(SetupError, match=r"found a run of `ppomax sft`"):
        open_run(tmp_path, verb="ppo", config={"seed": 9}, resume=True)
    assert contents(tmp_path) == before
    # Nor is it begun while the disk is tried.
    new = open_run(tmp_path, verb="ppo", config={"seed": 9}, fresh=True)
    (new.checkpoints / f"{TEMPORARY}probe-1").mkdir(parents=True)
    new.close()
    with pytest.raises(SetupError, match=r"found a run of `ppomax sft`"):
        open_run(tmp_path, verb="ppo", config={"seed": 9}, resume=True)
    assert contents(tmp_path) == before
    # Once it has begun, the old one is gone.
    begun = open_run(tmp_path, verb="ppo", config={"seed": 9}, fresh=True)
    begun.forget_previous()
    work(begun)
    open_run(tmp_path, verb="ppo", config={"seed": 9}, resume=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".lock", "README.txt", "config.yaml", "metrics.jsonl", "run.json",
    ]  # fmt: skip


@pytest.mark.parametrize("moves", range(6))
@pytest.mark.parametrize("back", [False, True])
def test_fresh_killed_at_any_rename_loses_nothing(
    moves: int, back: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(work(open_run(tmp_path, verb="sft", config=CONFIG)))
    before = contents(tmp_path)
    if back:
        run = open_run(tmp_path, verb="ppo", config={}, fresh=True)
    rename, left = os.rename, [moves]

    def dying(*paths: Path) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        rename(*paths)

    monkeypatch.setattr("ppomax.engine.rundir.os.rename", dying)
    with pytest.raises(KeyboardInterrupt):
        run.bring_back_previous() if back else open_run(tmp_path, verb="ppo", config={}, fresh=True)
    monkeypatch.undo()
    if back:
        run.close()
    assert open_run(tmp_path, verb="sft", config=CONFIG).finished
    assert contents(tmp_path) == before


def test_a_deletion_that_was_cut_off_cannot_be_resumed(tmp_path: Path) -> None:
    run = work(open_run(tmp_path, verb="ppo", config=CONFIG))
    run.config.unlink()
    with pytest.raises(SetupError, match=r"config\.yaml: found nothing.*--fresh"):
        open_run(tmp_path, verb="ppo", config=CONFIG, resume=True)
    open_run(tmp_path, verb="ppo", config=CONFIG, fresh=True)


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    work(open_run(tmp_path, verb="ppo", config=CONFIG)).config.write_text("a: [1,\nb")
    with pytest.raises(SetupError, match=r"config\.yaml: found .*line 2.*expected YAML.*--fresh"):
        open_run(tmp_path, verb="ppo", config=CONFIG, resume=True)


def test_two_processes_never_write_one_run(tmp_path: Path) -> None:
    code = (
        "import sys; from ppomax.engine.rundir import open_run\n"
        "run = open_run(sys.argv[1], verb='ppo', config={}); print('ready', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        for fresh in (False, True):
            with pytest.raises(SetupError, match=rf"lock held by process {other.pid}, expected no other.*wait"):
                open_run(tmp_path, verb="ppo", config={}, fresh=fresh)
    finally:
        other.kill()
        other.communicate()
    # A killed process holds nothing.
    run = open_run(tmp_path, verb="ppo", config={})
    assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
    with pytest.raises(SetupError, match=f"process {os.getpid()}"):
        open_run(tmp_path, verb="ppo", config={})
    run.close()
    open_run(tmp_path, verb="ppo", config={}).close()


def test_finished_needs_a_whole_model_and_the_summary(tmp_path: Path) -> None:
    run = open_run(tmp_path, verb="ppo", config=CONFIG)
    write_json_atomic(run.summary, {})
    assert not run.finished
    run.final.mkdir()
    assert not run.finished
    save_final(run.final, lambda folder: (folder / "model.safetensors").write_bytes(b"12345") and None)
    assert run.finished and final_complete(run.final)
    (run.final / "model.safetensors").write_bytes(b"123")
    assert not run.finished
    (run.final / "model.safetensors").unlink()
    assert not run.finished
    assert Run(tmp_path, "evaluate").finished


def test_a_model_that_fails_half_way_leaves_the_old_one(tmp_path: Path) -> None:
    final = save_final(tmp_path / "final", lambda folder: (folder / "a").write_text("old") and None)

    def fail(folder: Path) -> None:
        (folder / "a").write_text("new")
        raise RuntimeError("model refused")

    with pytest.raises(RuntimeError, match="model refused"):
        save_final(final, fail)
    assert (final / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["final"]
