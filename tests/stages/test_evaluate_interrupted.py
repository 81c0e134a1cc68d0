"""Evaluations that are stopped, or whose disk is full: finished answers are kept, and the same command goes on."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from ppomax.cli import main
from ppomax.config import EvaluateConfig, SamplingConfig
from ppomax.errors import SaveError
from ppomax.stages import evaluate as stage
from ppomax.stages import kept
from ppomax.stages.evaluate import evaluate
from ppomax.types import DataError, SetupError
from stages import toy
from stages.conftest import Draws, Toys, Trained, evaluate_config
from stages.processes import Command
from stages.toy import file_hashes


def small(run_dir: Path, trained: Trained, toys: Toys, **changes: Any) -> EvaluateConfig:
    """30 answers by each of two equal systems."""
    settings = {"max_prompts": 15, "best_of": (), "samples_per_prompt": 1, **changes}
    return evaluate_config(run_dir, trained.sft, trained, toys, **settings)


def command_line(run_dir: Path, trained: Trained, toys: Toys, *, samples: int, tokens: int, judge: str) -> list[str]:
    """The judge comes last."""
    return [
        "evaluate", "--run-dir", str(run_dir), "--policy", trained.sft, "--baseline", trained.sft, "--reward", "None",
        "--prompts", toys.prompts, "--samples-per-prompt", str(samples), "--sampling.max-new-tokens", str(tokens),
        "--judge", f"stages.toy:{judge}",
    ]  # fmt: skip


def outcome(run_dir: Path) -> dict[str, Any]:
    hashes = file_hashes(run_dir)
    return {name: hashes[name] for name in ("summary.json", "samples.jsonl", "samples.md")} | {"all": sorted(hashes)}


@pytest.mark.parametrize("call", [1, 2])
def test_after_an_interruption_the_same_command_goes_on_with_the_answers_that_are_there(
    call: int, trained: Trained, toys: Toys, tmp_path: Path, draws: Draws
) -> None:
    draws.interrupt = call
    with pytest.raises(KeyboardInterrupt):
        evaluate(small(tmp_path / "run", trained, toys))
    assert draws.asked == [30] * call
    draws.interrupt = None
    evaluate(small(tmp_path / "run", trained, toys))
    again = draws.asked[call:]
    assert 0 < again[0] < 30 and again[1:] == [30] * (2 - call)
    del draws.asked[:]
    evaluate(small(tmp_path / "whole", trained, toys))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    # Done again, it is all done again.
    evaluate(small(tmp_path / "run", trained, toys))
    assert draws.asked == [30, 30] * 2


def test_interrupted_before_any_answer_it_leaves_nothing(
    trained: Trained, toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(kept, "draw_responses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(small(tmp_path / "run", trained, toys))
    assert not (tmp_path / "run").exists()


def test_killed_while_it_samples_it_goes_on(
    trained: Trained, toys: Toys, command: type[Command], tmp_path: Path, draws: Draws
) -> None:
    words = command_line(tmp_path / "run", trained, toys, samples=40, tokens=20, judge="share_of_e")
    answers = tmp_path / "run" / "answers" / "baseline.jsonl"
    running = command(words, tmp_path / "log")
    running.wait_for(lambda: answers.exists() and answers.stat().st_size > 10_000)
    running.stop(signal.SIGKILL)
    lines = answers.read_text().count("\n") - 1
    assert main(words) == 0
    assert lines > 0 and draws.asked[0] == 45 * 40 - lines
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["gold"]["win_rate"] == 0.5  # with itself


@pytest.mark.parametrize(
    "change",
    [{"judge": ("stages.toy:length_reward",)}, {"sampling": SamplingConfig(max_new_tokens=10, max_rows=4)}, {}],
)
def test_after_a_judge_that_failed_the_answers_serve_another_or_the_mended_one(
    change: dict[str, Any], trained: Trained, toys: Toys, tmp_path: Path, draws: Draws, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(toy, "share_of_e", lambda prompts, responses, **_: [0.0] * min(len(responses), 2))
        with pytest.raises(DataError, match="found 2 values for 30 responses"):
            evaluate(small(tmp_path / "run", trained, toys))
    evaluate(small(tmp_path / "run", trained, toys, **change))
    assert draws.asked == [30, 30]
    if change:  # what is finished is not replaced by what was judged, or decoded, in another way
        with pytest.raises(SetupError, match=f"with other settings: {next(iter(change))}"):
            evaluate(small(tmp_path / "run", trained, toys))


def test_one_that_replaces_another_is_gone_on_with_too(
    trained: Trained, toys: Toys, tmp_path: Path, draws: Draws
) -> None:
    evaluate(small(tmp_path / "run", trained, toys))
    other = small(tmp_path / "run", trained, toys, seed=1)
    draws.interrupt = 4
    with pytest.raises(KeyboardInterrupt):
        evaluate(other, fresh=True)
    no_judge = other.model_copy(update={"judge": ("stages.toy:nobody",)})
    for refused in (small(tmp_path / "run", trained, toys), no_judge):
        with pytest.raises(SetupError, match="with other settings: seed|nobody"):
            evaluate(refused)
        assert (tmp_path / "run" / ".previous" / "summary.json").exists()  # a refused command costs nothing
    evaluate(other)
    assert draws.asked[:4] == [30] * 4 and len(draws.asked) == 5 and draws.asked[4] < 30
    assert not (tmp_path / "run" / ".previous").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_a_signal_it_says_what_is_kept(
    number: signal.Signals, code: int, trained: Trained, toys: Toys, command: type[Command], tmp_path: Path
) -> None:
    words = command_line(tmp_path / "run", trained, toys, samples=1, tokens=4, judge="slow_reward")
    running = command(words, tmp_path / "log")
    running.wait_for(lambda: "thinking" in running.said())
    assert running.stop(number) == code
    said = " ".join(running.said().split())
    assert "stopped at once; finished answers are kept. To go on: the same command, without --fresh" in said
    assert "Traceback" not in said
    assert main([*words[:-1], "stages.toy:share_of_e"]) == 0


def test_a_second_replacement_that_is_refused_brings_back_what_was_there(
    trained: Trained, toys: Toys, tmp_path: Path, draws: Draws
) -> None:
    evaluate(small(tmp_path / "run", trained, toys))
    before = outcome(tmp_path / "run")
    draws.interrupt = 3
    with pytest.raises(KeyboardInterrupt):
        evaluate(small(tmp_path / "run", trained, toys, seed=1), fresh=True)
    with pytest.raises(SetupError, match="nobody"):
        evaluate(small(tmp_path / "run", trained, toys, seed=2, judge=("stages.toy:nobody",)), fresh=True)
    assert outcome(tmp_path / "run") == before


def test_a_replacement_that_comes_to_no_answer_leaves_what_was_there(
    trained: Trained, toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(small(tmp_path / "run", trained, toys))
    before = outcome(tmp_path / "run")
    monkeypatch.setattr(kept, "draw_responses", lambda *given, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(small(tmp_path / "run", trained, toys, seed=1), fresh=True)
    assert outcome(tmp_path / "run") == before


@pytest.mark.parametrize(("best_of", "file"), [((), "samples"), ((16,), "answers/baseline")])
def test_a_full_disk_is_named(
    best_of: tuple[int, ...], file: str, trained: Trained, toys: Toys, tmp_path: Path
) -> None:
    config = evaluate_config(tmp_path / "run", trained.sft, trained, toys, best_of=best_of)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(SaveError, match=rf"run/{file}\.jsonl: cannot save"):
            evaluate(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert evaluate(config)["prompts"] == 45


@pytest.mark.parametrize(("best_of", "answers"), [((), 45 * 4), ((16,), 45 * (2 + 17))])
def test_a_disk_that_is_nearly_full_is_found_before_anything_is_sampled(
    best_of: tuple[int, ...], answers: int, trained: Trained, toys: Toys, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(stage, "free_bytes", lambda path: 1_500_000)
    monkeypatch.setattr(stage, "Kept", None)
    message = rf"run: found 1.5 MB free, expected 2\.\d+ MB for {answers} answers and a report"
    with pytest.raises(SetupError, match=message):
        evaluate(evaluate_config(tmp_path / "run", trained.sft, trained, toys, best_of=best_of))
    assert not (tmp_path / "run").exists()
