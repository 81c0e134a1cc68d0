"""Evaluations that are stopped, or whose disk is full: what was answered is kept, and the same command goes on."""

from __future__ import annotations

import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from ppomax.cli import main
from ppomax.config import EvaluateConfig
from ppomax.errors import SaveError
from ppomax.stages import evaluate as stage
from ppomax.stages import kept
from ppomax.stages.evaluate import evaluate
from ppomax.types import SetupError
from stages.conftest import Toys, Trained, evaluate_config
from stages.processes import Command
from stages.toy import file_hashes


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_a_signal_it_says_what_is_kept(
    number: signal.Signals, code: int, trained: Trained, toys: Toys, command: type[Command], tmp_path: Path
) -> None:
    words = [
        "evaluate", "--run-dir", str(tmp_path / "run"), "--policy", trained.sft, "--baseline", trained.sft,
        "--reward", "None", "--prompts", toys.prompts, "--max-prompts", "1", "--sampling.max-new-tokens", "4",
        "--judge", "stages.toy:slow_reward",
    ]  # fmt: skip
    running = command(words, tmp_path / "log")
    running.wait_for(lambda: "thinking" in running.said())
    assert running.stop(number) == code
    said = " ".join(running.said().split())
    assert "stopped at once; answers are kept in pieces of 512. To go on: the same command" in said
    assert "Traceback" not in said
    assert main([*words[:-1], "stages.toy:share_of_e", "--fresh"]) == 0


def interrupted_in(call: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ctrl-C in the so-many-th piece of 20 answers; how many answers were asked for in each piece."""
    asked, draw = [], kept.draw

    def interrupted(policy: Any, ids: Any, *given: Any, **options: Any) -> Any:
        asked.append(len(ids))
        if len(asked) == call:
            raise KeyboardInterrupt
        return draw(policy, ids, *given, **options)

    monkeypatch.setattr(kept, "PIECE", 20)
    monkeypatch.setattr(kept, "draw", interrupted)
    return asked


def outcome(run_dir: Path) -> dict[str, Any]:
    hashes = file_hashes(run_dir)
    return {name: hashes[name] for name in ("summary.json", "samples.jsonl", "samples.md")} | {"all": sorted(hashes)}


@pytest.mark.parametrize(("call", "left"), [(1, [20, 10, 20, 10]), (3, [20, 10]), (4, [10])])
def test_after_an_interruption_the_same_command_goes_on_with_the_answers_that_are_there(
    call: int, left: list[int], trained: Trained, toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(name: str) -> EvaluateConfig:
        return evaluate_config(
            tmp_path / name, trained.sft, trained, toys, max_prompts=15, best_of=(), samples_per_prompt=1
        )

    asked = interrupted_in(call, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config("run"))
    assert (tmp_path / "run").exists() == (call > 1)  # a run without any result leaves nothing
    del asked[:]
    monkeypatch.undo()
    asked = interrupted_in(0, monkeypatch)
    evaluate(config("run"))
    assert asked == left
    evaluate(config("whole"))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    # Done again, it is all done again.
    del asked[:]
    evaluate(config("run"))
    assert asked == [20, 10, 20, 10]


def test_an_evaluation_that_replaces_another_is_gone_on_with_too(
    trained: Trained, toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = evaluate_config(
        tmp_path / "run", trained.sft, trained, toys, max_prompts=15, best_of=(), samples_per_prompt=1
    )
    evaluate(config)
    other = config.model_copy(update={"seed": 1})
    interrupted_in(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        evaluate(other, fresh=True)
    monkeypatch.undo()
    asked = interrupted_in(0, monkeypatch)
    evaluate(other)
    assert asked == [10, 20, 10]


def test_a_full_disk_is_named(trained: Trained, toys: Toys, tmp_path: Path) -> None:
    config = evaluate_config(tmp_path / "run", trained.sft, trained, toys, best_of=(), reward=None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(SaveError, match=r"answers/baseline\.jsonl: cannot save"):
            evaluate(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert evaluate(config)["prompts"] == 45


def test_a_disk_that_is_nearly_full_is_found_before_anything_is_sampled(
    trained: Trained, toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "free_bytes", lambda path: 1_500_000)
    monkeypatch.setattr(stage, "Kept", None)
    with pytest.raises(SetupError, match=r"run: found 1.5 MB free, expected 2\.\d+ MB for [\d,]+ answers and a report"):
        evaluate(evaluate_config(tmp_path / "run", trained.sft, trained, toys, best_of=(), reward=None))
    assert not (tmp_path / "run").exists()
