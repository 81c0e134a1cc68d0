"""The whole pipeline on a real model: SFT, labelled pairs, reward model, PPO-max, evaluation, one report."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from ppomax.config import (
    CriticConfig,
    EvaluateConfig,
    KLConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    QuickstartConfig,
    RewardConfig,
    SamplingConfig,
    SaveConfig,
    SFTConfig,
)
from ppomax.config.layers import plain
from ppomax.engine.durable import write_json_atomic
from ppomax.engine.rundir import Run, open_run
from ppomax.models.load import model_directory
from ppomax.monitor.report import write_report
from ppomax.rewards.callables import load_function
from ppomax.stages.evaluate import evaluate
from ppomax.stages.label import label
from ppomax.stages.ppo import ppo
from ppomax.stages.reward import reward
from ppomax.stages.sft import sft

DATA = files("ppomax.data") / "quickstart"
SAMPLING = SamplingConfig(max_new_tokens=40, temperature=0.75, top_p=None, repetition_penalty=None, max_rows=512)
TIE = 0.05
SAMPLES = 6
# Answers made worse, so that the reward model sees what PPO would find otherwise: loops of kind words, and kind words
# about something else, each for every prompt.
LOOP_EVERY, STRAY_EVERY = 1, 1
# The first judge counts wins; the last one labels the pairs and is logged.
JUDGES = ("ppomax.rewards.judge:sentiment", "ppomax.rewards.judge:gold")
# tiny writes random letters, which have no sentiment that could be learnt.
TINY_JUDGES = ("ppomax.rewards.judge:vowel_share",)


def quickstart(config: QuickstartConfig) -> dict[str, Any]:
    """Run what is not finished yet; returns summary.json's content. Raises what its stages do."""
    run = open_run(
        config.run_dir, verb="quickstart", config=plain(config), resume=not config.fresh, fresh=config.fresh,
        ignore=("run_dir", "fresh"),
    )  # fmt: skip
    try:
        return _quickstart(run, config)
    finally:
        run.close()


def _quickstart(run: Run, config: QuickstartConfig) -> dict[str, Any]:
    began, seconds = time.monotonic(), _Stopwatch(run.path / "stage_seconds.json")
    at = run.path
    try:
        seconds("model", lambda: model_directory(config.model))
    except BaseException:
        # A misspelt name, a full disk: what was there is there again, and the mended command needs nothing more.
        if not run.bring_back_previous() and not (at / "sft").exists():
            shutil.rmtree(at, ignore_errors=True)
        raise
    run.forget_previous()
    plan = stage_configs(config)
    seconds("sft", lambda: _unless_finished(at / "sft", "sft", lambda: sft(plan["sft"], resume=True)))
    if not (at / "pairs.json").exists():
        seconds("label", lambda: label(
            str(at / "sft" / "final"), [_data("prompts")], load_function(_judges(config)[-1]), at / "pairs.jsonl",
            samples=SAMPLES, tie=TIE, sampling=SAMPLING, compute=plan["sft"].compute, seed=config.seed,
            loop_every=LOOP_EVERY, stray_every=STRAY_EVERY,
        ))  # fmt: skip
    seconds("reward", lambda: _unless_finished(at / "reward", "reward", lambda: reward(plan["reward"], resume=True)))
    seconds("ppo", lambda: _unless_finished(at / "ppo", "ppo", lambda: ppo(plan["ppo"], resume=True)))
    seconds("evaluate", lambda: _unless_finished(at / "evaluate", "evaluate", lambda: evaluate(plan["evaluate"])))
    summary = _summary(run, config, seconds.seconds, time.monotonic() - began)
    write_json_atomic(run.summary, summary)
    write_report(run.path)
    return summary


def stage_configs(config: QuickstartConfig) -> dict[str, Any]:
    """What every stage of the quickstart is told; also the place to read the recipe from."""
    at = config.run_dir
    tiny = config.model == "tiny"
    compute = ModelConfig(
        train_layers=1 if tiny else 10, dtype="float32" if tiny else "auto", tokens_per_microbatch=2048
    )  # fmt: skip
    return {
        "sft": SFTConfig(
            run_dir=at / "sft", model=config.model, data=(_data("dialogues"),), heldout=0.05, epochs=2, batch_size=16,
            max_length=256, eval_every=20, seed=config.seed, compute=compute, optim=OptimConfig(lr=2e-4),
        ),
        "reward": RewardConfig(
            run_dir=at / "reward", model=str(at / "sft" / "final"), data=(str(at / "pairs.jsonl"),), heldout=0.06,
            epochs=2, tokens_per_batch=2560, max_length=256, lm_weight=0.1, margin=4.0, eval_every=25, seed=config.seed,
            compute=compute, optim=OptimConfig(lr=3e-4),
        ),
        "ppo": PPOConfig(
            run_dir=at / "ppo", policy=str(at / "sft" / "final"), reward=(str(at / "reward" / "final"),),
            prompts=(_data("prompts"),), ptx_data=(_data("dialogues"),), ptx_weight=0.05, ptx_batch=4,
            iterations=14, rollout_batch=64, samples_per_prompt=4, minibatch=16, max_prompt_tokens=160,
            gae_lambda=0.95, ema=0.9, sampling=SAMPLING, kl=KLConfig(coefficient=0.045),
            critic=CriticConfig(pretrain_iterations=2, optim=OptimConfig(lr=3e-4)),
            optim=OptimConfig(lr=1.5e-4), judge=_judges(config)[-1], seed=config.seed, compute=compute,
            save=SaveConfig(every=5, keep=1),
        ),
        "evaluate": EvaluateConfig(
            run_dir=at / "evaluate", policy=str(at / "ppo" / "final"), baseline=str(at / "sft" / "final"),
            prompts=(_data("heldout"),), reward=str(at / "reward" / "final"),
            judge=_judges(config), judge_tie=TIE, samples_per_prompt=4,
            best_of=(4, 16), max_prompts=54, sampling=SAMPLING, seed=config.seed, compute=compute,
        ),
    }  # fmt: skip


def _judges(config: QuickstartConfig) -> tuple[str, ...]:
    return TINY_JUDGES if config.model == "tiny" else JUDGES


class _Stopwatch:
    """Seconds by stage, kept in a file, so that a resumed quickstart adds up what it took in all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def __call__(self, stage: str, work: Callable[[], Any]) -> None:
        began = time.monotonic()
        try:
            work()
        finally:
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.monotonic() - began, 2)
            write_json_atomic(self.path, self.seconds)


def _unless_finished(path: Path, verb: str, work: Callable[[], Any]) -> None:
    if not Run(path, verb).finished:
        work()


def _data(name: str) -> str:
    return str(DATA / f"{name}.jsonl")


def _summary(run: Run, config: QuickstartConfig, seconds: dict[str, float], wall: float) -> dict[str, Any]:
    results = {
        name: json.loads((run.path / name / "summary.json").read_text()) for name in ("reward", "ppo", "evaluate")
    }
    compared = results["evaluate"]
    labelling = _judges(config)[-1].rpartition(":")[2]
    return {
        "wall_seconds": round(max(wall, sum(seconds.values())), 1),
        "stage_seconds": seconds,
        "reward_accuracy": compared["reward_model"][labelling]["accuracy"],
        "reward_correlation": compared["reward_model"][labelling]["correlation"],
        **{key: compared[key] for key in ("gold", "reward", "best_of", "kl_per_sequence")},
        "gold_guarded": compared["judges"][labelling],
        **{key: value for key, value in compared.items() if key.endswith(("_before", "_after"))},
        "iterations": results["ppo"]["iterations"],
        "seed": config.seed,
    }
