"""Side by side in one run: ppomax against plain transformers on the same model, prompts and precision.

    make bench                      # SmolLM2-135M, bfloat16 where it is fast
    .venv/bin/python bench/run.py --model tiny --repeats 1

Every contender runs in turn, `repeats` times; the best time of each counts, and the spread is shown. The ratios are
what to look at: absolute times belong to one machine on one day. The table is printed and written to bench/results.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from ppomax.models.load import load_causal_lm, load_tokenizer, resolve_compute
from ppomax.models.players import Policy
from ppomax.rollout.sampler import Distribution, sample
from ppomax.types import token_batch

ROWS, NEW_TOKENS, PROMPT_WORDS = 32, 64, (8, 40)


def main() -> None:
    """Run both comparisons and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    compute = resolve_compute("auto", arguments.dtype)
    tokenizer = load_tokenizer(arguments.model)
    ours = Policy(load_causal_lm(arguments.model, compute), train_layers=None, trained=True)
    theirs = load_causal_lm(arguments.model, compute)
    theirs.set_attn_implementation("sdpa")  # transformers' own default
    prompts = _prompts(tokenizer)
    rows = [
        _compare(
            f"generate {ROWS} × {NEW_TOKENS} tokens", "generate()", ROWS * NEW_TOKENS, arguments.repeats,
            lambda: _our_generation(ours, prompts), lambda: _their_generation(theirs, prompts),
        ),
        _compare(
            "log-probs of the responses, forward + backward", "cross-entropy on full logits", ROWS * NEW_TOKENS,
            arguments.repeats, lambda: _our_training(ours, prompts), lambda: _their_training(theirs, prompts),
        ),
    ]  # fmt: skip
    heading = (
        f"{arguments.model}, {str(compute.dtype)[6:]}, {compute.device}, {os.cpu_count()} {platform.machine()} cores, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, best of {arguments.repeats}"
    )
    table = "\n".join(
        ["| work | peer | ppomax tok/s | peer tok/s | ratio | spread ours / peer |", "|---|---|---|---|---|---|", *rows]
    )
    text = f"# Benchmark\n\n{heading}\n\n{table}\n"
    Path(__file__).with_name("results.md").write_text(text, encoding="utf-8")
    print(text)


def _compare(
    work: str, peer: str, tokens: int, repeats: int, ours: Callable[[], None], theirs: Callable[[], None]
) -> str:
    ours(), theirs()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for run, kept in zip((ours, theirs), times, strict=True):
            began = time.perf_counter()
            run()
            kept.append(time.perf_counter() - began)
    best, peer_best = min(times[0]), min(times[1])
    spread = " / ".join(f"{max(t) / min(t):.2f}" for t in times)
    return (
        f"| {work} | {peer} | {tokens / best:,.0f} | {tokens / peer_best:,.0f} | {peer_best / best:.2f}× | {spread} |"
    )


def _prompts(tokenizer: object) -> list[list[int]]:
    low, high = PROMPT_WORDS
    texts = [
        " ".join(["tell me about rivers and lamps"] * 8).split()[: low + (high - low) * i // ROWS] for i in range(ROWS)
    ]
    return [tokenizer(" ".join(words))["input_ids"] for words in texts]  # type: ignore[operator]


def _our_generation(policy: Policy, prompts: list[list[int]]) -> None:
    uniforms = torch.rand(ROWS, NEW_TOKENS, generator=torch.Generator().manual_seed(0))
    sample(policy, prompts, uniforms, distribution=Distribution(), eos_ids=[], max_rows=ROWS)


@torch.inference_mode()
def _their_generation(model: torch.nn.Module, prompts: list[list[int]]) -> None:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    model.generate(  # type: ignore[operator]
        input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS, pad_token_id=0,
    )  # fmt: skip


def _our_training(policy: Policy, prompts: list[list[int]]) -> None:
    batch = token_batch(prompts, [[5] * NEW_TOKENS] * ROWS)
    policy(batch).logprobs_BT.sum().backward()
    policy.zero_grad()


def _their_training(model: torch.nn.Module, prompts: list[list[int]]) -> None:
    model.requires_grad_(True)
    width = max(map(len, prompts)) + NEW_TOKENS
    rows = [p + [5] * NEW_TOKENS for p in prompts]
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = torch.full_like(ids, -100)
    for i, prompt in enumerate(prompts):
        labels[i, len(prompt) : len(prompt) + NEW_TOKENS] = 5
    model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    model.zero_grad()


if __name__ == "__main__":
    main()
