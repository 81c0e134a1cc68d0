"""Toy data, small configurations and rewards for whole runs of the stages on the embedded `tiny` model."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppomax.config import (
    CriticConfig,
    KLConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    RewardConfig,
    SamplingConfig,
    SaveConfig,
    SFTConfig,
)
from ppomax.config.recipes import PPO_RECIPES
from ppomax.models.embedded import embedded_directory
from ppomax.rewards.callables import RewardFunction
from ppomax.rollout.collect import response_texts
from ppomax.stages.estimate import History, estimate, seen
from ppomax.stages.ppo import ppo
from ppomax.stages.ppo_setup import Job, prepare
from ppomax.stages.scoring import Minibatch, TokenStatistics, plan_minibatches, score
from ppomax.stages.session import session
from ppomax.types import Experience, ScoredRollouts

WORDS = [
    "apple",
    "river",
    "stone",
    "cloud",
    "green",
    "tree",
    "lemon",
    "house",
    "music",
    "night",
    "bread",
    "glass",
    "wheel",
    "beach",
    "seven",
]
FLOAT32 = ModelConfig(dtype="float32", device="cpu")
TOP_LAYER = FLOAT32.model_copy(update={"train_layers": 1})
# Adam's first steps are about lr × sign(gradient), which magnifies rounding; an offset in its denominator does not.
CALM = OptimConfig(lr=1e-3, warmup=0.0, schedule="constant", eps=1e-3, max_grad_norm=None)
# What `ppo_config` takes to learn, in a second, something that shows.
LONGER: dict[str, Any] = {"iterations": 12, "rollout_batch": 32, "minibatch": 16}


def prompt_rows(count: int) -> list[dict[str, Any]]:
    """Distinct prompts of different lengths, with a column of their own and two sources."""
    texts = [f"{a} {b}?" if i % 2 else f"{a}, {b} and {a}?" for i, a in enumerate(WORDS) for b in WORDS]
    rows = [{"prompt": text, "wish": text[0], "source": "odd" if i % 2 else "even"} for i, text in enumerate(texts)]
    return rows[:: len(rows) // count][:count]


def dialogue_rows() -> list[dict[str, Any]]:
    """Every pair of words asked for, answered the other way round."""
    return [{"prompt": f"{a} {b}?", "response": f"{b} {a}."} for a in WORDS for b in WORDS]


def pair_rows() -> list[dict[str, Any]]:
    """Preferences that a byte model can learn: the answer with letters e wins, whatever its length."""
    draw = random.Random(0)

    def text(share: float) -> str:
        others = "abcdfghijklmnopqrstuvwxyz,."
        letters = ["e" if draw.random() < share else draw.choice(others) for _ in range(draw.randint(6, 14))]
        return "".join(letters)

    return [
        {"prompt": f"{a} {b}?", "chosen": f"e{text(0.3)}", "rejected": text(0.0), "source": a[0]}
        for a in WORDS
        for b in WORDS
    ]


def ranked_rows() -> list[dict[str, Any]]:
    """Up to four answers to a prompt, and every pair of them that differs in letters e."""
    draw = random.Random(1)
    rows = []
    for a in WORDS:
        answers = sorted({"e" * i + "".join(draw.choice("abcd") for _ in range(draw.randint(3, 9))) for i in range(4)})
        answers = answers[: draw.randint(2, 4)]
        pairs = [(x, y) for x in answers for y in answers if x.count("e") > y.count("e")]
        rows += [{"prompt": f"{a}?", "chosen": x, "rejected": y} for x, y in pairs]
    return rows


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """Rows as JSON lines; returns the path as a data spec."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def share_of_e(prompts: Sequence[Any], responses: Sequence[str], **columns: Any) -> list[float]:
    """A reward: the share of the response's characters that are the letter e."""
    return [text.count("e") / max(len(text), 1) for text in responses]


def length_reward(prompts: Sequence[Any], responses: Sequence[str], **columns: Any) -> list[float]:
    """A reward: characters of the response."""
    return [float(len(text)) for text in responses]


# The letter's id: three special tokens come first, then the bytes as characters in order.
E = 3 + sorted(pre_tokenizers.ByteLevel.alphabet()).index("e")


def dense_e(
    prompts: Sequence[Any], responses: Sequence[str], *, response_ids: list[list[int]], **columns: Any
) -> list[list[float]]:
    """A dense reward: 1 for every token that is the letter e."""
    return [[float(token == E) for token in ids] for ids in response_ids]


def broken_dense(prompts: Sequence[Any], responses: Sequence[str], **columns: Any) -> list[list[float]]:
    """A broken dense reward: one number per response, however long it is."""
    return [[0.0] for _ in responses]


def other_vocabulary(folder: Path) -> str:
    """A model like `tiny` whose tokenizer has one token more."""
    model = AutoModelForCausalLM.from_pretrained(embedded_directory("tiny") or "")
    tokenizer = AutoTokenizer.from_pretrained(embedded_directory("tiny") or "")
    tokenizer.add_tokens(["<|extra|>"])
    with torch.random.fork_rng(devices=[]):
        model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def nan_reward(prompts: Sequence[Any], responses: Sequence[str], **columns: Any) -> list[float]:
    """A broken reward: its second score is no number."""
    return [0.0, math.nan, *[0.0] * (len(responses) - 2)]


def short_reward(prompts: Sequence[Any], responses: Sequence[str], **columns: Any) -> list[float]:
    """A broken reward: one score is missing."""
    return [0.0] * (len(responses) - 1)


def raising_reward(prompts: Sequence[Any], responses: Sequence[str], **columns: Any) -> list[float]:
    """A broken reward: it raises."""
    raise ZeroDivisionError("the reward's own message")


fails_at: int | None = None
at_call: tuple[int, Callable[[], Any]] | None = None


def failing_reward(prompts: Sequence[Any], responses: Sequence[str], **columns: Any) -> list[float]:
    """`length_reward`, until call `fails_at` (infinite scores); at call `at_call[0]` it also does `at_call[1]`."""
    call = next(calls)
    if at_call is not None and call == at_call[0]:
        at_call[1]()
    return [math.inf if call == fails_at else float(len(text)) for text in responses]


calls = itertools.count()


def slow_reward(prompts: Sequence[Any], responses: Sequence[str], **columns: Any) -> list[float]:
    """A reward that lets the first batch pass and then says so and thinks for a minute."""
    if next(calls) > 0:
        print("thinking", flush=True)
        time.sleep(60)
    return [0.0] * len(responses)


def hanging_reward(prompts: Sequence[Any], responses: Sequence[str], **columns: Any) -> list[float]:
    """A reward that waits for a minute, as for a server that is gone."""
    time.sleep(60)
    return [0.0] * len(responses)


def sft_config(run_dir: Path, data: str, **changes: Any) -> SFTConfig:
    """26 steps that visibly learn."""
    settings: dict[str, Any] = {
        "model": "tiny", "data": (data,), "heldout": 0.1, "optim": OptimConfig(lr=5e-3), "compute": FLOAT32,
    }  # fmt: skip
    return SFTConfig(run_dir=run_dir, **{**settings, **changes})


def reward_config(run_dir: Path, model: str, data: str, **changes: Any) -> RewardConfig:
    """32 steps that visibly learn."""
    settings: dict[str, Any] = {
        "heldout": 0.2, "epochs": 4, "lm_weight": 0.2, "tokens_per_batch": 2048, "optim": OptimConfig(lr=5e-3), "compute": FLOAT32,
    }  # fmt: skip
    return RewardConfig(run_dir=run_dir, model=model, data=(data,), **{**settings, **changes})


def ppo_config(run_dir: Path, policy: str, prompts: str, **changes: Any) -> PPOConfig:
    """Iterations of 16 short responses in two minibatches; the reward is a callable, the critic starts from policy."""
    settings: dict[str, Any] = {
        "policy": policy, "prompts": (prompts,), "reward": ("stages.toy:share_of_e",), "iterations": 3,
        "rollout_batch": 16, "minibatch": 8, "max_prompt_tokens": 96, "sampling": SamplingConfig(max_new_tokens=10),
        "critic": CriticConfig(init="policy", pretrain_iterations=1, optim=OptimConfig(lr=5e-3)),
        "optim": OptimConfig(lr=5e-3), "compute": FLOAT32, "kl": KLConfig(), "save": SaveConfig(every=100),
    }  # fmt: skip
    return PPOConfig(run_dir=run_dir, **{**settings, **changes})


def recipe_settings(name: str, optim: OptimConfig) -> dict[str, Any]:
    """What a PPO recipe says about the algorithm, with learning rates that a tiny model needs."""
    recipe = PPO_RECIPES[name]()
    critic = {"optim": optim, "init": "policy" if recipe.critic.init else None}
    names = (
        "objective",
        "advantage",
        "baseline",
        "score",
        "kl",
        "samples_per_prompt",
        "gae_lambda",
        "ema",
        "whiten_advantages",
    )
    return {
        **{field: getattr(recipe, field) for field in names},
        "critic": recipe.critic.model_copy(update=critic),
        "optim": optim,
    }


def prepared(config: PPOConfig, reward: RewardFunction | None = None, *, resume: bool = False) -> Job:
    """The job of a PPO run before its first iteration, or before the one that it goes on with."""
    with session("ppo", config, unit="iteration", resume=resume, fresh=False) as run:
        return prepare(run, config, reward)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what may differ between two equal runs."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    volatile = ("seconds", "tokens_per_second", "peak_", "flops_per_second", "utilisation")
    return [{k: v for k, v in row.items() if not k.startswith(volatile)} for row in rows]


def column(config: PPOConfig, name: str) -> list[float]:
    """One measure of every iteration of a run."""
    return [row[name] for row in metrics(config.run_dir)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model directory."""
    return load_file(folder / "model.safetensors")


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are equal, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest relative difference, in norm, of two sets of tensors."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).norm() / a[k].norm().clamp(min=1e-12)) for k in a)


# Differences of numbers that are 0 but for rounding say nothing, and every process has its own padding.
ROUNDING = ("behaviour_gap", "approx_kl", "grad_norm", "skipped", "padding")


def expect_alike(one: Path, other: Path, *, rel: float, abs: float, but: tuple[str, ...] = ROUNDING) -> None:
    """Metrics (those that begin like one of `but` aside) and exported weights of two runs, to rounding."""
    rows, others = metrics(one), metrics(other)
    assert len(rows) == len(others)
    for row, found in zip(rows, others, strict=True):
        assert row.keys() == found.keys()
        for key, value in row.items():
            if isinstance(value, float) and not key.startswith(but):
                assert found[key] == pytest.approx(value, rel=rel, abs=abs), key
    for folder in ("final", "critic", "last"):
        if (one / folder).exists():
            assert distance(weights(one / folder), weights(other / folder)) < rel, folder


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder but the locks, which hold a process id."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@dataclass(frozen=True)
class FirstIteration:
    """What iteration 0 of a run is made of, up to the update."""

    texts: list[str]
    plan: list[Minibatch]
    scored: ScoredRollouts
    statistics: TokenStatistics
    seen: History
    experience: Experience
    rewards_BR: torch.Tensor


def first_iteration(job: Job) -> FirstIteration:
    """Iteration 0 by the stage's own steps; nothing is updated but the head of a critic that came from the reward."""
    config = job.config
    rollout = job.roll_out(0)
    texts = response_texts(job.players.tokenizer, rollout)
    plan = plan_minibatches(
        rollout, job.players, minibatch=config.minibatch, budget=config.compute.tokens_per_microbatch, seed=config.seed,
        iteration=0,
    )  # fmt: skip
    scored, statistics = score(
        job.players, rollout, plan, texts, temperature=config.sampling.temperature,
        bootstrap=config.score.truncated == "bootstrap",
    )  # fmt: skip
    job.seen = seen(scored, job.seen, config)
    scored = job.scale_critic(scored)
    experience, rewards_BR = estimate(scored, job.seen, config)
    return FirstIteration(texts, plan, scored, statistics, job.seen, experience, rewards_BR)


# What a verb exports.
FINALS = {"sft": ("final",), "reward": ("final",), "ppo": ("final", "critic")}


def expect_equal(verb: str, a: Path, b: Path, *more: str) -> None:
    """Metrics (timings aside), samples and exported weights of two runs, bit for bit; `more`: further exports."""
    assert metrics(a) == metrics(b)
    for folder in (*FINALS[verb], *more):
        assert same_bits(weights(a / folder), weights(b / folder)), folder
    if verb == "ppo":
        assert (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()


def stopping_after(iterations: int) -> RewardFunction:
    """`share_of_e`, by that name, which interrupts the run when it is called once more than that."""
    seen = []

    def reward(prompts: list[Any], responses: list[str], **columns: Any) -> list[float]:
        seen.append(1)
        if len(seen) > iterations:
            raise KeyboardInterrupt
        return share_of_e(prompts, responses)

    reward.__module__, reward.__qualname__ = "stages.toy", "share_of_e"
    return reward


def expect_exact_resume(whole: PPOConfig, folders: Sequence[str]) -> None:
    """A run that an error of the reward ends after its second iteration goes on as if it never had been."""
    parts = whole.model_copy(update={"run_dir": whole.run_dir.with_name("parts")})
    ppo(whole)
    with pytest.raises(KeyboardInterrupt):
        ppo(parts, reward=stopping_after(2))
    ppo(parts, resume=True)
    assert metrics(whole.run_dir) == metrics(parts.run_dir)
    for folder in folders:
        assert same_bits(weights(whole.run_dir / folder), weights(parts.run_dir / folder))
