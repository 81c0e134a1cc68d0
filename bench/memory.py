"""The planner beside what runs really take: peak memory and seconds by phase on this machine's processor.

    .venv/bin/python bench/memory.py                     # all cases, some minutes
    .venv/bin/python bench/memory.py --cases full lora   # some of them

Each case is a real `ppomax ppo` of two iterations in a process of its own, on a Llama with random weights (22 M
parameters, or 32 M with an unembedding of its own) or on SmolLM2-135M. Before it, the same process runs `tiny` with the
same settings, so that Python, torch and every library are there; what counts is how far the peak of the resident set
then rises. The planner is asked with the same settings. Temperature 3 keeps responses from ending by themselves. Files
hold bfloat16, so that weights in float32 are copies and not pages of the file. glibc is told to hand freed blocks of
64 KiB and more back at once: by default it keeps many of them, which the resident set shows and no planner can know
(--default-allocator).
"""

from __future__ import annotations

import argparse
import json
import os
import string
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ppomax
from ppomax.data.chat import render_prompt
from ppomax.models.load import export, export_scalar, load_scalar_lm, load_tokenizer, model_directory, resolve_compute

LLAMA = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8}
TIED = LlamaConfig(**LLAMA, num_key_value_heads=4, vocab_size=8192, tie_word_embeddings=True)
UNTIED = LlamaConfig(**LLAMA, num_key_value_heads=8, vocab_size=12288, tie_word_embeddings=False)
# Rows of a microbatch; the common settings have 4 of 8.
LARGE = {"tokens_per_microbatch": 8}
# name: the model, and what differs from the common settings.
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "full": (TIED, {}),
    "full, untied": (UNTIED, {}),
    "full, bfloat16": (TIED, {"compute": {"dtype": "bfloat16"}}),
    "full, large microbatches": (TIED, {"compute": LARGE}),
    "checkpointing, large microbatches": (TIED, {"compute": {**LARGE, "gradient_checkpointing": True}}),
    "lora 16": (TIED, {"compute": {"lora_rank": 16}}),
    "lora 16, large microbatches": (TIED, {"compute": {**LARGE, "lora_rank": 16}}),
    "upper 2 layers": (TIED, {"compute": {"train_layers": 2}}),
    "no critic, four samples a prompt": (
        TIED,
        {
            "critic": {"init": None, "pretrain_iterations": 0}, "advantage": "whole_return",
            "baseline": "leave_one_out", "samples_per_prompt": 4,
        },
    ),
    "long responses, 32 rows": (
        TIED,
        {
            "sampling": {"max_new_tokens": 192, "max_rows": 32}, "rollout_batch": 32, "minibatch": 8,
            "compute": {"lora_rank": 16},
        },
    ),
    "smollm2-135m, upper 10 layers": ("smollm2-135m", {"compute": {"train_layers": 10}}),
}  # fmt: skip
PHASES = ("generate", "score", "train")


def main() -> None:
    """Run the cases one after the other and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--default-allocator", action="store_true", help="Leave glibc's allocator as it is.")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _measure(*(json.loads(Path(file).read_text()) for file in arguments.child))
        return
    print("| case | predicted MiB | measured MiB | predicted / measured | predicted s | measured s |")
    print("|---|---|---|---|---|---|")
    for name in arguments.cases:
        with tempfile.TemporaryDirectory(prefix="ppomax-plan-") as folder:
            print(_row(name, Path(folder), default=arguments.default_allocator), flush=True)


def _row(name: str, folder: Path, *, default: bool) -> str:
    """One case as a row of the table."""
    model, changes = CASES[name]
    files = []
    for run, of in (("warm-up", "tiny"), ("real", model)):
        (folder / run).mkdir()
        files.append(folder / run / "settings.json")
        files[-1].write_text(json.dumps(_settings(folder / run, of, changes)))
    found = ppomax.plan(ppomax.PlanConfig(**json.loads(files[1].read_text())))
    child = [sys.executable, __file__, "--child", *map(str, files)]
    environment = {**os.environ, **({} if default else {"MALLOC_MMAP_THRESHOLD_": "65536"})}
    done = subprocess.run(child, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    taken = json.loads(done.stdout.splitlines()[-1])
    layout = found["layouts"][0]
    if found["shown"] != layout["name"]:
        raise SystemExit(f"{name}: does not fit this machine")
    predicted, measured = layout["peak"], taken["peak"]
    times = (", ".join(f"{seconds[phase]:.1f}" for phase in PHASES) for seconds in (found["seconds"], taken["seconds"]))
    sizes = f"{predicted / 2**20:,.0f} | {measured / 2**20:,.0f} | {predicted / measured:.2f}"
    return f"| {name} | {sizes} | {' | '.join(times)} |"


def _settings(folder: Path, model: LlamaConfig | str, changes: dict[str, Any]) -> dict[str, Any]:
    """Make the models and prompts of one run; its settings."""
    tokenizer = load_tokenizer("tiny" if isinstance(model, LlamaConfig) else model)
    policy = str(folder / "policy") if isinstance(model, LlamaConfig) else model_directory(model)
    if isinstance(model, LlamaConfig):
        model.bos_token_id, model.eos_token_id, model.pad_token_id = 1, 2, 2
        export(LlamaForCausalLM(model).to(torch.bfloat16), tokenizer, Path(policy))
    as_stored = resolve_compute("cpu", "float32" if model == "tiny" else "bfloat16")
    scalar = load_scalar_lm(policy, as_stored, fresh_head_seed=0)
    export_scalar(scalar, tokenizer, folder / "reward")
    texts = [f"Write about {a} and {b}." for a in string.ascii_lowercase for b in string.ascii_lowercase]
    lengths = {t: len(render_prompt(tokenizer, [{"role": "user", "content": t}])) for t in texts}
    usual = max(set(lengths.values()), key=list(lengths.values()).count)
    prompts = [text for text in texts if lengths[text] == usual][:64]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    common: dict[str, Any] = {
        "run_dir": str(folder / "run"), "policy": policy, "reward": [str(folder / "reward")],
        "prompts": [str(folder / "prompts.jsonl")], "iterations": 2, "rollout_batch": 8, "minibatch": 8,
        "max_prompt_tokens": usual, "sampling": {"max_new_tokens": 64, "temperature": 3.0, "max_rows": 8},
        "critic": {"pretrain_iterations": 0}, "save": {"every": 100},
        "compute": {"device": "cpu", "dtype": "float32", "tokens_per_microbatch": 4},
    }  # fmt: skip
    for key, value in changes.items():
        common[key] = {**common.get(key, {}), **value} if isinstance(value, dict) else value
    if model == "tiny" and "train_layers" in common["compute"]:
        common["compute"]["train_layers"] = 1
    # Whole rows, so that a microbatch is as full as the planner takes it to be.
    common["compute"]["tokens_per_microbatch"] *= usual + common["sampling"]["max_new_tokens"]
    return common


def _measure(warm_up: dict[str, Any], real: dict[str, Any]) -> None:
    """In the child: run both, and print by how many bytes the peak rose and the last iteration's seconds."""
    ppomax.ppo(ppomax.PPOConfig(**warm_up))
    before = psutil.Process().memory_info().rss
    ppomax.ppo(ppomax.PPOConfig(**real))
    peak = _highest_resident() - before
    last = json.loads((Path(real["run_dir"]) / "metrics.jsonl").read_text().splitlines()[-1])
    print(json.dumps({"peak": peak, "seconds": {phase: last[f"seconds/{phase}"] for phase in PHASES}}))


def _highest_resident() -> int:
    """Bytes, of this program: what getrusage says begins with the size of the process that started it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


if __name__ == "__main__":
    main()
