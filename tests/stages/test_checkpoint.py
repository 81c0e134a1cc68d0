"""`ppomax checkpoint`: what a run has saved is listed, judged and exported without resuming the run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from ppomax.cli import main
from ppomax.config import CheckpointConfig, CriticConfig, OptimConfig, PPOConfig, SaveConfig
from ppomax.engine import checkpoint as engine
from ppomax.engine.checkpoint import checkpoints, latest_checkpoint
from ppomax.errors import SetupError
from ppomax.stages.checkpoint import checkpoint
from ppomax.stages.ppo import ppo
from ppomax.stages.reward import reward
from ppomax.stages.sft import sft
from stages.conftest import Toys, Trained
from stages.toy import (
    FLOAT32,
    TOP_LAYER,
    file_hashes,
    metrics,
    ppo_config,
    reward_config,
    same_bits,
    sft_config,
    stopping_after,
    weights,
)

LORA = FLOAT32.model_copy(update={"lora_rank": 2})


@pytest.fixture(scope="module")
def saved(trained: Trained, toys: Toys, tmp_path_factory: pytest.TempPathFactory) -> PPOConfig:
    """A finished PPO run with a moving average and a critic, and all checkpoints."""
    config = ppo_config(
        tmp_path_factory.mktemp("saved") / "run", trained.sft, toys.prompts, ema=0.9, save=SaveConfig(every=1, keep=9)
    )
    ppo(config)
    return config


@pytest.fixture
def copied(saved: PPOConfig, tmp_path: Path) -> Path:
    shutil.copytree(saved.run_dir, tmp_path / "run")
    return tmp_path / "run"


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def same_model(exported: Path, final: Path) -> bool:
    """All files but the list of sizes that a run's final/ has."""
    left, right = file_hashes(exported), file_hashes(final)
    return left == {name: found for name, found in right.items() if name != ".complete"} and len(left) > 3


def test_list_says_which_there_are_and_what_is_damaged(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(copied / "checkpoints" / "iteration-1" / "state.json")
    assert main(["checkpoint", "list", str(copied)]) == 0
    lines = " ".join(capsys.readouterr().out.split()).split("iteration-")
    assert [line.split()[0] for line in lines[1:]][:2] == ["0", "1"]
    assert "kB" in lines[1] and lines[1].rstrip().endswith("intact")
    assert lines[2].rstrip().endswith("damaged")
    assert lines[3].split("intact")[1].startswith(f" {copied / 'checkpoints'}/") and "found SHA-256" in lines[4]
    rows = checkpoint(CheckpointConfig(run_dir=copied))
    assert isinstance(rows, list)
    assert [(row["name"], bool(row["problems"])) for row in rows] == [
        ("iteration-0", False), ("iteration-1", True), ("iteration-2", False)
    ]  # fmt: skip
    assert rows[0]["age"].split()[1] in ("s", "min")


def test_verify_names_the_damaged_file_and_ends_with_1(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(copied)]) == 0
    capsys.readouterr()
    damaged = next((copied / "checkpoints" / "iteration-2").glob("*.safetensors"))
    flip(damaged)
    assert main(["checkpoint", "verify", str(copied)]) == 1
    assert f"error: {damaged}: found SHA-256" in capsys.readouterr().err.replace("\n", "")
    assert main(["checkpoint", "verify", str(copied), "--number", "1"]) == 0


@pytest.mark.parametrize("model", ["final", "critic", "last"])
def test_an_exported_checkpoint_of_ppo_is_what_the_run_wrote_at_its_end(
    model: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = file_hashes(copied)
    assert main(["checkpoint", "export", str(copied), "--model", model]) == 0
    out = Path(capsys.readouterr().out.strip())
    assert out == copied / "exported" / f"iteration-2-{model}"
    assert same_model(out, copied / model)
    shutil.rmtree(copied / "exported")
    assert file_hashes(copied) == before


def test_an_export_that_was_killed_is_no_obstacle_and_leaves_nothing(copied: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / ".tmp-mine"
    (tmp_path / ".tmp-out").mkdir()
    (tmp_path / ".tmp-out" / "stray.safetensors").write_text("half a model")
    other.mkdir()
    checkpoint(CheckpointConfig(action="export", run_dir=copied, out=out))
    assert same_model(out, copied / "final")
    assert not (tmp_path / ".tmp-out").exists() and other.exists()


@pytest.mark.parametrize("action", ["list", "verify"])
@pytest.mark.parametrize("at", [0, 3, 5])
def test_a_checkpoint_that_the_run_deletes_meanwhile_is_left_out(
    action: Any, at: int, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, calls, file_problem = copied / "checkpoints", [], engine._file_problem

    def deleting(path: Path, size: int, digest: str) -> str | None:
        calls.append(path)
        if len(calls) == at + 1:
            engine._delete(path.parent)
        return file_problem(path, size, digest)

    monkeypatch.setattr(engine, "_file_problem", deleting)
    before = {path.name for path in checkpoints(folder)}
    rows = checkpoint(CheckpointConfig(action=action, run_dir=copied))
    assert isinstance(rows, list) and not any(row["problems"] for row in rows)
    assert {row["name"] for row in rows} == {path.name for path in checkpoints(folder)} != before


def test_an_export_of_one_that_the_run_deletes_says_so(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, gone = engine._saved, []

    def deleting(path: Path) -> Any:
        if path.name != "iteration-0":
            gone.append(path.name)
            engine._delete(path)
        return saved(path)

    monkeypatch.setattr(engine, "_saved", deleting)
    with pytest.raises(SetupError, match="iteration-1: the run deleted it while it was read"):
        checkpoint(CheckpointConfig(action="export", run_dir=copied, number=1))
    assert not (copied / "exported").exists()
    # The newest is whichever is there in the end.
    out = checkpoint(CheckpointConfig(action="export", run_dir=copied))
    assert isinstance(out, Path) and out.name == "iteration-0-final"
    assert gone == ["iteration-1", "iteration-2"]


def test_an_earlier_checkpoint_is_an_earlier_model(copied: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    checkpoint(CheckpointConfig(action="export", run_dir=copied, number=1, out=out))
    assert not same_bits(weights(out), weights(copied / "final"))
    with pytest.raises(SetupError, match="out: found something there, expected a new or empty directory"):
        checkpoint(CheckpointConfig(action="export", run_dir=copied, number=1, out=out))


@pytest.mark.parametrize("compute", [TOP_LAYER, LORA], ids=["top", "lora"])
def test_with_frozen_layers_or_adapters_too(compute: Any, trained: Trained, toys: Toys, tmp_path: Path) -> None:
    sft(sft_config(tmp_path / "sft", toys.dialogues, compute=compute, epochs=0.3))
    reward(reward_config(tmp_path / "reward", trained.sft, toys.pairs, compute=compute, max_steps=3))
    critic = CriticConfig(init=trained.reward, pretrain_iterations=1, optim=OptimConfig(lr=5e-3))
    spec = ppo_config(tmp_path / "ppo", trained.sft, toys.prompts, compute=compute, critic=critic, iterations=2)
    # A critic from elsewhere has other lower layers: only adapters can stand on them.
    ppo(spec if compute is LORA else spec.model_copy(update={"critic": critic.model_copy(update={"init": "policy"})}))
    for verb in ("sft", "reward", "ppo"):
        out = checkpoint(CheckpointConfig(action="export", run_dir=tmp_path / verb))
        assert isinstance(out, Path) and same_model(out, tmp_path / verb / "final")
    out = checkpoint(CheckpointConfig(action="export", run_dir=tmp_path / "ppo", model="critic"))
    assert isinstance(out, Path) and same_model(out, tmp_path / "ppo" / "critic")


def test_a_start_model_that_changed_is_refused(toys: Toys, trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.sft, tmp_path / "base")
    sft(sft_config(tmp_path / "run", toys.dialogues, model=str(tmp_path / "base"), epochs=0.1, compute=TOP_LAYER))
    flip(tmp_path / "base" / "model.safetensors")
    with pytest.raises(SetupError, match="base: its weights changed since the run began"):
        checkpoint(CheckpointConfig(action="export", run_dir=tmp_path / "run"))


def test_what_is_not_there_is_said(copied: Path, trained: Trained, tmp_path: Path) -> None:
    def refused(**settings: Any) -> str:
        with pytest.raises(SetupError) as caught:
            checkpoint(CheckpointConfig(**settings))
        return str(caught.value)

    assert "found no run of ppomax, expected a run directory of sft, reward, ppo" in refused(run_dir=tmp_path)
    assert "found iteration-0, iteration-1, iteration-2, expected number 7" in refused(run_dir=copied, number=7)
    assert "only ppo has a critic" in refused(run_dir=trained.sft_run, action="export", model="critic")
    assert "only ppo has a last" in refused(run_dir=trained.reward_run, action="export", model="last")


@pytest.mark.parametrize(("metric", "pick"), [("gold_mean", max), ("-gold_mean", min)])
def test_the_best_checkpoint_stays_beside_the_newest(
    metric: str, pick: Any, trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    config = ppo_config(
        tmp_path / "run", trained.sft, toys.prompts, iterations=7, judge="stages.toy:length_reward",
        save=SaveConfig(every=1, keep=1, keep_best=metric),
    )  # fmt: skip
    ppo(config)
    rows = metrics(config.run_dir)
    best = pick(rows, key=lambda row: row["gold_mean"])["iteration"]
    assert 0 <= best < 6, "the seed makes the last iteration the best: no proof"
    names = [path.name for path in checkpoints(config.run_dir / "checkpoints")]
    assert names == [f"iteration-{best}", "iteration-6"]
    ppo(config.model_copy(update={"run_dir": tmp_path / "plain", "save": SaveConfig(every=100)}))
    assert metrics(tmp_path / "plain") == rows


def test_names_of_the_log_are_on_the_disk_before_a_checkpoint_is(
    toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut could leave a checkpoint beside the log of a run that went back before it, or beside none."""
    run_dir, done, fsync, rename = tmp_path / "run", [], os.fsync, os.rename

    def synced(descriptor: int) -> None:
        if run_dir.exists() and os.fstat(descriptor).st_ino == run_dir.stat().st_ino:
            done.append("folder")
        fsync(descriptor)

    def renamed(old: Any, new: Any) -> None:
        if Path(new).parent == run_dir / "checkpoints":
            done.append("checkpoint")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    sft(sft_config(run_dir, toys.dialogues, epochs=0.3, save=SaveConfig(every=1, keep=99)))
    saves = [i for i, what in enumerate(done) if what == "checkpoint"]
    assert len(saves) > 2 and all(done[i - 1] == "folder" for i in saves)


def resumed(config: PPOConfig, damaged: int, save: SaveConfig) -> list[str]:
    """Names of the checkpoints of a run that was ended in iteration 5, one checkpoint damaged, and gone on with."""
    every = config.save.model_copy(update={"every": 1, "keep": 9})
    with pytest.raises(KeyboardInterrupt):
        ppo(config.model_copy(update={"save": every}), reward=stopping_after(5))
    flip(config.run_dir / "checkpoints" / f"iteration-{damaged}" / "state.json")
    ppo(config.model_copy(update={"save": save}), resume=True)
    return [path.name for path in checkpoints(config.run_dir / "checkpoints")]


def test_a_link_to_nothing_is_a_damaged_checkpoint(copied: Path, tmp_path: Path) -> None:
    intact = checkpoints(copied / "checkpoints")
    (copied / "checkpoints" / "iteration-99").symlink_to(tmp_path / "purged")
    found, problems = latest_checkpoint(copied / "checkpoints")
    assert found == intact[-1] and "iteration-99" in problems[0]
    rows = checkpoint(CheckpointConfig(run_dir=copied, number=99))
    assert isinstance(rows, list) and [row["name"] for row in rows] == ["iteration-99"]
    assert "found a link to nothing" in rows[0]["problems"][0]


def test_a_damaged_checkpoint_that_was_passed_over_takes_no_place(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:  # fmt: skip
    config = ppo_config(tmp_path / "run", trained.sft, toys.prompts, iterations=7)
    assert resumed(config, 4, SaveConfig(every=100, keep=2)) == ["iteration-3", "iteration-6"]
    assert not list((config.run_dir / "checkpoints").glob(".*"))


def test_a_damaged_checkpoint_is_not_the_best_one(
    trained: Trained, toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"iterations": 7, "judge": "stages.toy:length_reward"}
    ppo(ppo_config(tmp_path / "whole", trained.sft, toys.prompts, **settings))
    gold = [row["gold_mean"] for row in metrics(tmp_path / "whole")]
    sign = "-" if gold.index(min(gold)) < 4 else ""
    order = sorted(range(7), key=lambda i: gold[i] if sign else -gold[i])
    assert order[0] < 4, "the seed makes a late iteration the best: no proof"
    save = SaveConfig(every=100, keep=1, keep_best=f"{sign}gold_mean")
    config = ppo_config(tmp_path / "run", trained.sft, toys.prompts, **settings, save=save)
    assert resumed(config, order[0], save) == sorted({f"iteration-{order[1]}", "iteration-6"})
    said = capsys.readouterr().err.replace("\n", "")
    assert f"passed over a damaged checkpoint: {config.run_dir / 'checkpoints' / f'iteration-{order[0]}'}" in said


@pytest.mark.parametrize("verb", ["sft", "reward"])
def test_trap_30_the_best_is_saved_when_it_is_best(verb: str, trained: Trained, toys: Toys, tmp_path: Path) -> None:
    """Whatever `save.every` says."""
    settings: dict[str, Any] = {
        "save": SaveConfig(every=1000, keep=1, keep_best="-heldout_loss"), "eval_every": 2, "epochs": 2,
        "optim": OptimConfig(lr=3.0, schedule="constant", warmup=0.6),  # it learns, then far too much is asked of it
    }  # fmt: skip
    make = {"sft": (sft_config, toys.dialogues), "reward": (reward_config, trained.sft, toys.pairs)}[verb]
    config = make[0](tmp_path / "run", *make[1:], **settings)
    (sft if verb == "sft" else reward)(config)
    judged = {row["step"]: row["heldout_loss"] for row in metrics(config.run_dir) if "heldout_loss" in row}
    best, last = min(judged, key=lambda step: judged[step]), max(judged)
    assert best < last - 1
    names = [path.name for path in checkpoints(config.run_dir / "checkpoints")]
    assert names == [f"step-{best}", f"step-{last}"]


def test_an_unknown_metric_is_found_at_the_first_row(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    config = ppo_config(tmp_path / "run", trained.sft, toys.prompts, save=SaveConfig(keep_best="-kl_per_sequenc"))
    with pytest.raises(SetupError, match="save.keep_best: found 'kl_per_sequenc'; did you mean 'kl_per_sequence'?"):
        ppo(config)
    assert not config.run_dir.exists()


def test_a_measure_of_the_policy_may_be_named_although_the_critic_learns_first(
    trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    config = ppo_config(tmp_path / "run", trained.sft, toys.prompts, save=SaveConfig(every=1, keep_best="-policy_loss"))
    ppo(config)
    assert "policy_loss" not in metrics(config.run_dir)[0]
