"""Where the seconds and the memory of a PPO iteration go, by part, and what `ppomax plan` says of both beforehand.

    python -m bench.breakdown --size 1.7b --rows 128 --new-tokens 128        # the GPU if there is one
    python -m bench.breakdown --size 135m --rows 256 --ragged --profile build/profile

Four players of a published size with random weights (they change no time), prompts of one length (--ragged: from a
quarter of it on, so that attention needs masks in decoding), responses up to their limit. It is the real `ppo` stage;
the last iteration is shown, its numbers are those of metrics.jsonl. Memory is the peak of what torch allocated on a
GPU. Nothing is saved: checkpoints are several times as large as the weights and change no iteration. --profile writes
which operations the last sampling and the last update were made of; the seconds then contain the profiler's own.
"""

from __future__ import annotations

import argparse
import string
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaForCausalLM

import ppomax
from bench.common import processor, table, versions, write_rows
from ppomax.data.chat import render_prompt
from ppomax.models.load import Compute, export, export_scalar, load_scalar_lm, load_tokenizer
from ppomax.models.shapes import KNOWN, llama_config
from ppomax.monitor.log import read_metrics
from ppomax.stages import ppo as stage
from ppomax.stages.ppo_setup import Job
from ppomax.stages.session import Session
from ppomax.types import Message

LAYOUTS: dict[str, dict[str, Any]] = {
    "full": {}, "checkpointing": {"gradient_checkpointing": True}, "compiled": {"compiled": True},
    "lora": {"lora_rank": 16}, "lora checkpointing": {"lora_rank": 16, "gradient_checkpointing": True},
}  # fmt: skip

# The template's tokens, and a number that tells prompts apart.
SHORTEST_PROMPT = 64


def main() -> None:
    """Run the layouts one after the other and print a table each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.7b", choices=KNOWN)
    parser.add_argument("--layout", nargs="+", default=["full"], choices=LAYOUTS)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--minibatch", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--ragged", action="store_true", help="prompts of different lengths")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--tokens-per-microbatch", type=int, default=8192)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--profile", type=Path, help="a folder; each layout gets its own in it")
    options = parser.parse_args()
    if options.prompt_tokens < SHORTEST_PROMPT:
        parser.error(f"--prompt-tokens: found {options.prompt_tokens}, expected {SHORTEST_PROMPT} or more")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    print(
        f"{where}, {options.dtype}, {versions('ppomax', 'torch', 'transformers')}: {options.size}, {options.rows} rows "
        f"of {options.prompt_tokens} + {options.new_tokens} tokens, minibatches of {options.minibatch}, microbatches "
        f"of {options.tokens_per_microbatch} tokens\n"
    )
    with tempfile.TemporaryDirectory(prefix="ppomax-breakdown-") as folder:
        work = Path(folder)
        settings = _prepare(options, work, device)
        for layout in options.layout:
            print(_run(layout, {**settings, "run_dir": work / layout.replace(" ", "-")}, options, device), flush=True)


def _prepare(options: argparse.Namespace, work: Path, device: torch.device) -> dict[str, Any]:
    """Make the models and the prompts; the settings that all layouts have."""
    tokenizer = load_tokenizer("tiny")
    with device:
        model = LlamaForCausalLM(llama_config(KNOWN[options.size][1], eos_token_id=2, pad_token_id=2))
    export(model.to(torch.bfloat16), tokenizer, work / "policy")
    del model
    scalar = load_scalar_lm(str(work / "policy"), Compute(device, torch.bfloat16), fresh_head_seed=0)
    export_scalar(scalar, tokenizer, work / "reward")
    prompts = write_rows(work / "prompts.jsonl", [{"prompt": text} for text in _prompts(tokenizer, options)])
    return {
        "policy": str(work / "policy"), "reward": (str(work / "reward"),), "prompts": (prompts,),
        "iterations": options.iterations, "rollout_batch": options.rows, "minibatch": options.minibatch,
        "max_prompt_tokens": options.prompt_tokens, "critic": {"pretrain_iterations": 0}, "save": {"every": 10**9},
        "sampling": {"max_new_tokens": options.new_tokens, "max_rows": options.rows},
    }  # fmt: skip


def _prompts(tokenizer: Any, options: argparse.Namespace) -> list[str]:
    """Distinct prompts of `prompt_tokens` tokens or less, the template's included; the tokenizer's tokens are bytes."""
    most = options.prompt_tokens - len(render_prompt(tokenizer, [Message(role="user", content="")]))
    least = max(most // 4, 6) if options.ragged else most
    lengths = [most - (most - least) * i // max(options.rows - 1, 1) for i in range(options.rows)]
    letters = string.ascii_lowercase * (most // 26 + 1)
    return [f"{number:05d} {letters}"[:length] for number, length in enumerate(lengths)]


def _run(layout: str, settings: dict[str, Any], options: argparse.Namespace, device: torch.device) -> str:
    """One layout: predicted and measured, as a table."""
    compute = {"device": device.type, "dtype": options.dtype, "tokens_per_microbatch": options.tokens_per_microbatch}
    config = {**settings, "compute": {**compute, **LAYOUTS[layout]}}
    # As given, whether it fits or not: a layout further down would be another.
    plan = ppomax.plan(ppomax.PlanConfig(**config, reserve=0.0))
    given = plan["layouts"][0]
    planned_seconds = plan["seconds"] if plan["shown"] == given["name"] else None
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    saves = mock.patch.multiple(Session, rehearse=_nothing, checkpoint=_nothing, save_model=_nothing)
    with _profiled(options.profile and options.profile / layout.replace(" ", "-")), saves:
        ppomax.ppo(ppomax.PPOConfig(**config))
    row = read_metrics(Path(config["run_dir"]) / "metrics.jsonl")[-1]
    parts = [key.removeprefix("seconds/") for key in row if key.startswith("seconds/") and row[key] > 0.01]
    heading = ("part", "seconds", "planned", "TFLOP", "TFLOP/s", "of the peak", "padding")
    rows = [
        (
            part, f"{row[f'seconds/{part}']:.2f}", _number(planned_seconds, part, 1),
            _number(row, f"flops/{part}", 1e12), _number(row, f"flops_per_second/{part}", 1e12),
            _number(row, f"utilisation/{part}", 1), _number(row, f"padding/{part}", 1),
        )
        for part in sorted(parts)
    ]  # fmt: skip
    title = f"**{layout}**: peak {row['peak_memory_gib']:.2f} GiB, planned {given['peak'] / 2**30:.2f}"
    return f"{title}\n\n{table(heading, rows)}\n"


def _nothing(*_: Any) -> None:
    pass


def _number(of: dict[str, float] | None, key: str, unit: float) -> str:
    return f"{of[key] / unit:.3g}" if of and key in of else "–"


@contextmanager
def _profiled(folder: Path | None) -> Iterator[None]:
    """Write to a folder what the last sampling and the last update inside were made of."""
    if folder is None:
        yield
        return

    def watched(work: Any, file: Path) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
                result = work(*given, **options)
            orders = ("self_cuda_time_total", "self_cpu_time_total")
            tables = [seen.key_averages().table(sort_by=order, row_limit=30) for order in orders]
            file.write_text("\n".join(tables), encoding="utf-8")
            return result

        return call

    folder.mkdir(parents=True, exist_ok=True)
    with (
        mock.patch.object(Job, "roll_out", watched(Job.roll_out, folder / "generate.txt")),
        mock.patch.object(stage, "update", watched(stage.update, folder / "train.txt")),
    ):
        yield


if __name__ == "__main__":
    main()
