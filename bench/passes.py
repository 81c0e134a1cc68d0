"""Generation and log-probs beside plain transformers, in one process: the same model, prompts and precision."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from bench.common import Run
from bench.materials import prompt_ids
from bench.plan import Workload
from ppomax.models.load import Compute, load_causal_lm
from ppomax.models.players import Policy
from ppomax.rollout.sampler import Distribution, sample
from ppomax.types import token_batch

ANSWER = 5  # the token that all responses of the log-prob pass are made of
WARM_UP_TOKENS = 4


def measure(model: str, dtype: str, workload: Workload, work: Path, *, repeats: int, device: str) -> Run:
    """Seconds of each of `repeats` turns, ours and theirs, after a short turn of both to warm up."""
    compute = Compute(torch.device(device), getattr(torch, dtype))
    ours = Policy(load_causal_lm(model, compute), train_layers=None, trained=True)
    theirs: Any = load_causal_lm(model, compute)
    theirs.set_attn_implementation("sdpa")  # transformers' own default
    theirs.generation_config.eos_token_id = None  # as with ours: nothing ends a response
    prompts, new = prompt_ids(workload, work), workload.new_tokens
    sides = {
        "generation | `generate`": ((_our_generation, ours), (_their_generation, theirs)),
        "log-probs of the responses, forward and backward | loss of the causal LM": (
            (_our_training, ours), (_their_training, theirs)
        ),
    }  # fmt: skip
    seconds = {}
    for name, both in sides.items():
        seconds[name] = [[], []]
        for turn in range(-1, repeats):
            for (run, player), kept in zip(both, seconds[name], strict=True):
                began = time.perf_counter()
                run(player, prompts, WARM_UP_TOKENS if turn < 0 else new)
                if device == "cuda":
                    torch.cuda.synchronize()
                if turn >= 0:
                    kept.append(time.perf_counter() - began)
    return {"seconds": seconds, "tokens": len(prompts) * new}


def _our_generation(policy: Policy, prompts: list[list[int]], new: int) -> None:
    uniforms = torch.rand(len(prompts), new, generator=torch.Generator().manual_seed(0))
    sampled = sample(policy, prompts, uniforms, distribution=Distribution(), eos_ids=[], max_rows=len(prompts))
    assert all(len(response.ids) == new for response in sampled)


@torch.inference_mode()
def _their_generation(model: Any, prompts: list[list[int]], new: int) -> None:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    sequences = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=new, pad_token_id=0
    )
    assert sequences.shape[1] == width + new


def _our_training(policy: Policy, prompts: list[list[int]], new: int) -> None:
    batch = token_batch(prompts, [[ANSWER] * new] * len(prompts), device=str(policy.device))
    policy(batch).logprobs_BT.sum().backward()
    policy.zero_grad()


def _their_training(model: Any, prompts: list[list[int]], new: int) -> None:
    model.requires_grad_(True)
    width = max(map(len, prompts)) + new
    rows = [p + [ANSWER] * new for p in prompts]
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    labels = torch.full_like(ids, -100)
    for i, prompt in enumerate(prompts):
        labels[i, len(prompt) : len(prompt) + new] = ANSWER
    model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    model.zero_grad()
