"""One contender of `make bench` in this process: some PPO iterations by ppomax, or by TRL's PPOTrainer.

Both do the same maths on the same models and prompts: PPO-clip, value clip, token KL (k1) in the reward, GAE, whitened
advantages, one epoch, AdamW at a constant rate, no gradient clip; reward model and critic start from the same weights.
Only iterations are timed, not loading and saving. What is reported of the work is counted while it is done: tokens that
the sampler returned, tokens that the advantages were whitened over, numbers that the optimisers changed.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoConfig

from bench.common import Run, peak_gib
from bench.materials import prompt_ids
from bench.plan import LORA_TOKENS, Contender, Workload
from ppomax.config import PPOConfig
from ppomax.config.layers import overlay
from ppomax.config.recipes import vanilla
from ppomax.models.attention import without_plans
from ppomax.models.load import load_tokenizer, model_directory
from ppomax.monitor.log import read_metrics
from ppomax.stages import inputs, update
from ppomax.stages.ppo import ppo

LEARNING_RATE, BETAS, KL, GAE_LAMBDA, CLIP = 1e-6, (0.9, 0.95), 0.05, 0.95, 0.2
LORA_RANK = 16


def contend(contender: Contender, arguments: argparse.Namespace, workload: Workload, work: Path, scratch: Path) -> Run:
    """What one contender needed and did; lists have an entry for each iteration."""
    steps: list[int] = []
    with _optimiser_steps(steps):
        run = {"ppomax": _ours, "TRL": _theirs}[contender.side](contender, arguments, workload, work, scratch)
    run.setdefault("minibatches", len(steps) / arguments.iterations)  # TRL: one optimiser, one step for a minibatch
    return {
        **run, "changed": _by_iteration(steps, arguments.iterations), "peak_gib": peak_gib(arguments.device),
        "prompt_tokens": sum(map(len, prompt_ids(workload, work))), "threads": torch.get_num_threads(),
    }  # fmt: skip


def _by_iteration(counts: list[int], iterations: int) -> list[int]:
    """Sums of as many equal parts as there were iterations."""
    each, rest = divmod(len(counts), iterations)
    assert not rest, f"{len(counts)} counts in {iterations} iterations"
    return [sum(counts[i : i + each]) for i in range(0, len(counts), each)]


@contextmanager
def _optimiser_steps(steps: list[int]) -> Iterator[None]:
    """Note for each step of any of torch's optimisers how many numbers it changed."""

    def note(optimiser: torch.optim.Optimizer, *_: Any) -> None:
        parameters = (p for group in optimiser.param_groups for p in group["params"])
        steps.append(sum(p.numel() for p in parameters if p.grad is not None))

    handle = register_optimizer_step_post_hook(note)
    yield
    handle.remove()


def _watched(module: Any, name: str, note: Callable[[float, tuple[Any, ...], Any], None]) -> Any:
    """While this holds, `note` is told the seconds, arguments and result of each call of a module's function."""
    function = getattr(module, name)

    def call(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        result = function(*arguments, **options)
        note(time.perf_counter() - began, arguments, result)
        return result

    return mock.patch.object(module, name, call)


def _ours(contender: Contender, arguments: argparse.Namespace, workload: Workload, work: Path, scratch: Path) -> Run:
    config = our_config(contender, arguments, workload, work, scratch)
    counted: list[int] = []
    whitened = _watched(update, "normalise_advantages", lambda _, given, __: counted.append(int(given[1].sum())))
    # No id ends a response: eos is sampled like any other token, as in TRL without a stop token.
    endless = nullcontext() if workload.stops else mock.patch.object(inputs, "eos_token_ids", lambda *_: [])
    with whitened, endless:
        ppo(config)
    rows = read_metrics(config.run_dir / "metrics.jsonl")
    return {
        "seconds": [row["seconds/total"] for row in rows],
        "generation": [row["seconds/generate"] for row in rows],
        "generated": [row["tokens/generated"] for row in rows],
        "trained": _by_iteration(counted, len(rows)),
        "minibatches": len(counted) / len(rows),
    }


def our_config(
    contender: Contender, arguments: argparse.Namespace, workload: Workload, work: Path, scratch: Path
) -> PPOConfig:
    """The real `ppo` stage with the settings that both sides have."""
    layers = AutoConfig.from_pretrained(model_directory(arguments.model)).num_hidden_layers
    layouts = {"full": {}, "lora": {"lora_rank": LORA_RANK}, "trunk": {"train_layers": max(layers // 3, 1)}}
    # On a GPU minibatches of up to so many tokens are read whole, as TRL reads them on either. Who takes adapters to
    # save memory reads few at once.
    budget = {"tokens_per_microbatch": 32768} if arguments.device == "cuda" else {}
    if contender.layout == "lora" and arguments.device == "cpu":
        budget = {"tokens_per_microbatch": LORA_TOKENS}
    optim = {"lr": LEARNING_RATE, "betas": BETAS, "warmup": 0.0, "schedule": "constant"}
    values = {
        "run_dir": scratch / "run",
        "policy": arguments.model,
        "reward": (str(work / "reward"),),
        "prompts": (str(workload.prompts(work)),),
        "iterations": arguments.iterations,
        "rollout_batch": workload.rows,
        "minibatch": workload.rows // workload.minibatches,
        "gae_lambda": GAE_LAMBDA,
        "clip_ratio": CLIP,
        "whiten_advantages": True,
        "kl": {"coefficient": KL},
        "sampling": {"max_new_tokens": workload.new_tokens, "max_rows": workload.rows},
        "optim": optim,
        "critic": {"init": "reward", "value_clip": CLIP, "optim": optim},
        "compute": {"device": arguments.device, "dtype": contender.precision, **budget, **layouts[contender.layout]},
        "save": {"every": 10**9},
    }
    return overlay(vanilla(), values, origin="bench")


def _theirs(contender: Contender, arguments: argparse.Namespace, workload: Workload, work: Path, scratch: Path) -> Run:
    """TRL's trainer with everything off that costs time and is not the maths: checkpointing, samples, logs, saving."""
    autocast = contender.precision == "autocast"
    if autocast:  # beside transformers 5, bf16=True alone does not reach TRL's Accelerator
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig as Settings
    from trl.experimental.ppo import PPOTrainer, ppo_trainer

    without_plans(torch.device(arguments.device))  # as every model that ppomax loads

    # A pad id beyond the vocabulary, as in TRL's own example. One that can be sampled would hide tokens from it.
    tokenizer = load_tokenizer(arguments.model)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.padding_side = "left"
    eos = tokenizer.eos_token_id if workload.stops else None
    dtype = torch.bfloat16 if contender.precision == "bfloat16" else torch.float32
    policy = AutoModelForCausalLM.from_pretrained(model_directory(arguments.model), dtype=dtype)
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(work / "reward", num_labels=1, dtype=dtype) for _ in range(2)
    )
    settings = Settings(
        output_dir=str(scratch), total_episodes=workload.rows * arguments.iterations, num_ppo_epochs=1,
        per_device_train_batch_size=workload.rows, gradient_accumulation_steps=1,
        num_mini_batches=workload.minibatches, local_rollout_forward_batch_size=workload.rows,
        response_length=workload.new_tokens, temperature=1.0, stop_token="eos" if workload.stops else None,
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", adam_beta1=BETAS[0], adam_beta2=BETAS[1],
        kl_coef=KL, kl_estimator="k1", lam=GAE_LAMBDA, gamma=1.0, cliprange=CLIP, cliprange_value=CLIP,
        whiten_rewards=False, bf16=autocast, use_cpu=arguments.device == "cpu",
        gradient_checkpointing=False, num_sample_generations=0,
        save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=10**9,
    )  # fmt: skip
    seconds, generation, generated, trained = [], [], [], []

    def sampled(took: float, given: tuple[Any, ...], result: Any) -> None:
        generation.append(took)
        generated.append(_tokens_until(result[0][:, given[1].shape[1] :], eos))

    trainer = PPOTrainer(
        settings, tokenizer, policy, ref_model=None, reward_model=reward, value_model=value,
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in prompt_ids(workload, work)]),
        callbacks=[_stopwatch(seconds)],
    )  # fmt: skip
    assert trainer.accelerator.mixed_precision == ("bf16" if autocast else "no")
    with (
        _watched(ppo_trainer, "batch_generation", sampled),
        _watched(ppo_trainer, "masked_whiten", lambda _, given, __: trained.append(int(given[1].sum()))),
    ):
        trainer.train()
    return {
        "seconds": seconds, "generation": generation, "generated": generated, "trained": trained,
    }  # fmt: skip


def _stopwatch(seconds: list[float]) -> Any:
    """A callback of TRL's trainer that notes how long each iteration took."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            seconds.append(now - self.began)
            self.began = now

    return Stopwatch()


def _tokens_until(ids_BR: torch.Tensor, eos: int | None) -> int:
    """Tokens of all responses, each up to and with its first eos."""
    if eos is None:
        return ids_BR.numel()
    is_eos_BR = (ids_BR == eos).long()
    return int((is_eos_BR.cumsum(dim=1) - is_eos_BR == 0).sum())
