"""Side by side in one run: the native sampler against vLLM on the same model, prompts, precision and threads.

    make bench-vllm                          # SmolLM2-135M, bfloat16 where it is fast
    make bench-vllm ARGS="--repeats 1 --compiled"

The prompts are those of *fixed* in `make bench`: with prompts that begin alike vLLM would read the beginning once for
all. The two sample in turn, `repeats` times; the best time of each counts, and the spread is shown. vLLM's start is
left out and shown beside; the hand-over of the weights, which every iteration pays, is in its times and shown too.
The table is printed and written to bench/sampler.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from bench.common import processor, seconds, spread, table, versions
from bench.materials import fixed_prompts
from ppomax.data.chat import render_prompt
from ppomax.engine.randomness import seeds_for, uniforms_for
from ppomax.models.load import load_causal_lm, load_tokenizer, resolve_compute
from ppomax.models.players import Policy
from ppomax.rollout.sampler import Distribution, sample
from ppomax.rollout.vllm import VLLM


def main() -> None:
    """Run both and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each response")
    parser.add_argument("--compiled", action="store_true", help="vLLM with compiled graphs: minutes more to start")
    arguments = parser.parse_args()
    rows, tokens = arguments.rows, arguments.tokens
    compute = resolve_compute("auto", arguments.dtype)
    tokenizer = load_tokenizer(arguments.model)
    policy = Policy(load_causal_lm(arguments.model, compute), train_layers=None, trained=False)
    prompts = [render_prompt(tokenizer, prompt) for prompt in fixed_prompts(rows)]
    longest = max(map(len, prompts)) + tokens
    began = time.perf_counter()
    engine = VLLM(arguments.model, policy, compute, longest=longest, max_rows=rows, eager=not arguments.compiled)
    gap = engine.check(policy, prompts, 1.0)
    start = time.perf_counter() - began
    uniforms_BR = uniforms_for(0, 0, range(rows), [0] * rows, tokens)
    seeds = seeds_for(0, 0, range(rows), [0] * rows)

    def native() -> None:
        sample(policy, prompts, uniforms_BR, distribution=Distribution(), eos_ids=[], max_rows=rows)

    def by_vllm() -> None:
        engine.sample(policy, prompts, seeds, limit=tokens, distribution=Distribution(), eos_ids=[])

    native(), by_vllm()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(arguments.repeats):
        for run, kept in zip((native, by_vllm), times, strict=True):
            kept.append(seconds(run))
    sync = min(seconds(lambda: engine.load(policy)) for _ in range(3))
    ours, theirs = (rows * tokens / min(kept) for kept in times)
    spreads = " / ".join(map(spread, times))
    numbers = table(
        ("native tok/s", "vLLM tok/s", "vLLM / native", "spread native / vLLM", "weights handed over", "start",
         "log-prob gap"),
        [(f"{ours:,.0f}", f"{theirs:,.0f}", f"{theirs / ours:.2f}×", spreads, f"{sync:.2f} s", f"{start:.0f} s",
          f"{gap:.3f} nats")],
    )  # fmt: skip
    graphs = "compiled graphs" if arguments.compiled else "no compiled graphs"
    text = f"""# Native sampler and vLLM

command: `python -m bench.sampler {" ".join(sys.argv[1:])}` in the environment of `make bench-vllm`

{arguments.model}, {str(compute.dtype)[6:]}, {compute.device}, {processor()},
{torch.get_num_threads()} threads, {versions("torch")}, {engine.name} ({graphs}), {rows} × {tokens} tokens,
best of {arguments.repeats}

{numbers}
"""
    Path(__file__).with_name("sampler.md").write_text(text, encoding="utf-8")
    print(text)
    engine.close()


if __name__ == "__main__":
    main()
