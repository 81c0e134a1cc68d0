"""Reward-model and SFT training beside TRL's trainers: equal rows, steps, learning rate, lengths and precision.

    make bench-reward                                         # against TRL's RewardTrainer
    make bench-sft                                            # against TRL's SFTTrainer, packed and not
    make bench-reward ARGS="--data pairs.jsonl --rows 1000 --heldout 200 --repeats 3"

Contenders run in turn, each in a process of its own, so that the peak of its memory is its own; the fastest of
`repeats` counts. Only the training loop is timed. Gradient checkpointing is off on both sides (TRL's default is on);
all layers are trained in both. Tokens are those of the rows, without padding, and equal on both sides. The table is
printed and written to bench/training-reward.md or bench/training-sft.md; with --device cuda both sides compute on the
GPU, whose memory counts, and the file ends with -cuda.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.common import DIALOGUES, Run, in_turn, peak_gib, processor, spread, table, versions, write_rows
from ppomax.config import ModelConfig, OptimConfig, RankConfig, RewardConfig, SaveConfig, SFTConfig
from ppomax.data.chat import render_prompt, render_response
from ppomax.data.readers import read_dialogues, read_pairs
from ppomax.data.split import split_by_key
from ppomax.models.load import load_tokenizer, pad_that_ends_no_turn, resolve_compute
from ppomax.monitor.log import read_metrics
from ppomax.stages.rank import rank
from ppomax.stages.reward import reward
from ppomax.stages.sft import sft
from ppomax.types import Pair

BATCH, LEARNING_RATE, WARMUP = 8, {"reward": 2e-5, "sft": 1e-4}, 0.1
CONTENDERS = {"reward": ("ppomax", "trl"), "sft": ("ppomax", "trl", "trl packed")}


def main() -> None:
    """Run the contenders in turn and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*CONTENDERS])
    parser.add_argument("--data", help="pairs or dialogues; default: the quickstart's dialogues")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where both sides compute")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--heldout", type=int, default=0, help="prompts whose pairs are ranked at the end (reward)")
    parser.add_argument("--heldout-data", help="pairs to rank at the end instead, from another file (reward)")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        print(json.dumps(_contend(arguments)))
        return
    contenders = {name: [*sys.argv[1:], "--contender", name] for name in CONTENDERS[arguments.stage]}
    runs = in_turn("bench.training", contenders, arguments.repeats)
    text = _table(arguments, runs)
    device = "" if arguments.device == "cpu" else f"-{arguments.device}"
    Path(__file__).with_name(f"training-{arguments.stage}{device}.md").write_text(text, encoding="utf-8")
    print(text)


def _table(arguments: argparse.Namespace, runs: dict[str, list[Run]]) -> str:
    best = {name: min(kept, key=lambda run: run["seconds"]) for name, kept in runs.items()}
    ours = best["ppomax"]
    where = processor() if arguments.device == "cpu" else torch.cuda.get_device_name()
    setting = [
        arguments.model, ours["dtype"], where, versions("torch", "transformers"), f"{ours['rows']} rows",
        f"{BATCH} a step", "one epoch", f"{ours['tokens']:,} tokens",
        f"data {Path(arguments.data or DIALOGUES.name).name}", f"seed {arguments.seed}",
        f"fastest of {arguments.repeats}",
    ]  # fmt: skip
    if ours["ranked"]:
        setting.append(f"accuracy on {ours['ranked']} held-out pairs")
    heading = ("contender", "seconds", "tokens/s", "ppomax is faster by", "peak GiB", "slowest / fastest", "accuracy")
    rows = [
        (
            name, f"{run['seconds']:.1f}", f"{ours['tokens'] / run['seconds']:,.0f}",
            f"{run['seconds'] / ours['seconds']:.2f}×", f"{run['peak_gib']:.2f}",
            spread(one["seconds"] for one in runs[name]),
            "–" if run["accuracy"] is None else f"{run['accuracy']:.3f}",
        )
        for name, run in best.items()
    ]  # fmt: skip
    title = f"# {arguments.stage} training against TRL {version('trl')}"
    return "\n".join([title, "", ", ".join(setting), "", table(heading, rows), ""])


def _contend(arguments: argparse.Namespace) -> Run:
    """One contender's training in this process."""
    compute = resolve_compute(arguments.device, arguments.dtype)
    dtype = str(compute.dtype)[6:]
    with tempfile.TemporaryDirectory() as folder:
        learn, held = _rows(arguments)
        tokenizer = load_tokenizer(arguments.model)
        tokens = _count(tokenizer, learn)
        config = ModelConfig.model_validate({"device": arguments.device, "dtype": dtype})
        train = {"reward": _reward, "sft": _sft}[arguments.stage]
        work = Path(folder)
        if arguments.contender == "ppomax":
            seconds = train(arguments, learn, work, config)
        else:
            theirs = {"reward": _trl_reward, "sft": _trl_sft}[arguments.stage]
            seconds = theirs(arguments, learn, work, tokenizer, dtype)
        peak = peak_gib(arguments.device)
        accuracy, ranked = None, 0
        if held:
            data = (write_rows(work / "heldout.jsonl", held),)
            summary = rank(
                RankConfig(run_dir=work / "rank", reward=str(work / "run" / "final"), data=data, compute=config)
            )
            accuracy, ranked = summary["accuracy"], summary["heldout_pairs"]
    return {
        "seconds": seconds, "tokens": tokens, "rows": len(learn), "dtype": dtype, "peak_gib": peak,
        "accuracy": accuracy, "ranked": ranked,
    }  # fmt: skip


def _rows(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows to learn from and to rank; messages, so that both sides render the same dialogues."""
    if arguments.stage == "sft":
        dialogues, _ = read_dialogues(arguments.data or str(DIALOGUES))
        rows = [{"prompt": list(d.messages[:-1]), "completion": list(d.messages[-1:])} for d in dialogues if d.messages]
        return rows[: arguments.rows], []
    if arguments.data:
        pairs, _ = read_pairs(arguments.data)
        learn, held = split_by_key(pairs, arguments.heldout, arguments.seed) if arguments.heldout else (pairs, [])
        if arguments.heldout_data:
            held, _ = read_pairs(arguments.heldout_data)
        return _pair_rows(learn)[: arguments.rows], _pair_rows(held)
    dialogues, _ = read_dialogues(str(DIALOGUES))
    answers = [d.messages[-1]["content"] for d in dialogues]
    rows = [
        {"prompt": list(d.messages[:-1]), "chosen": _answer(answers[i]), "rejected": _answer(answers[i - 1])}
        for i, d in enumerate(dialogues)
    ]
    learn = len(rows) - arguments.heldout
    return rows[:learn][: arguments.rows], rows[learn:]


def _pair_rows(pairs: Iterable[Pair]) -> list[dict[str, Any]]:
    return [{"prompt": list(p.prompt), "chosen": _answer(p.chosen), "rejected": _answer(p.rejected)} for p in pairs]


def _answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _count(tokenizer: Any, rows: list[dict[str, Any]]) -> int:
    """Tokens of all sequences, prompts as often as they are in one."""
    sides = [side for side in ("chosen", "rejected", "completion") if side in rows[0]]
    return sum(
        len(render_prompt(tokenizer, row["prompt"])) + len(render_response(tokenizer, row[side][0]["content"]))
        for row in rows
        for side in sides
    )


def _reward(arguments: argparse.Namespace, rows: list[dict[str, Any]], work: Path, compute: ModelConfig) -> float:
    run = work / "run"
    reward(RewardConfig(
        run_dir=run, model=arguments.model, data=(write_rows(work / "data.jsonl", rows),), heldout=0, lm_weight=None,
        min_prompts=BATCH, max_prompts=BATCH, max_length=arguments.max_length, seed=arguments.seed, compute=compute,
        optim=OptimConfig(lr=LEARNING_RATE["reward"], warmup=WARMUP), save=SaveConfig(every=10**9),
    ))  # fmt: skip
    return sum(row["seconds"] for row in read_metrics(run / "metrics.jsonl"))


def _sft(arguments: argparse.Namespace, rows: list[dict[str, Any]], work: Path, compute: ModelConfig) -> float:
    run = work / "run"
    data = [{"messages": [*row["prompt"], *row["completion"]]} for row in rows]
    sft(SFTConfig(
        run_dir=run, model=arguments.model, data=(write_rows(work / "data.jsonl", data),), heldout=0, epochs=1,
        batch_size=BATCH, max_length=arguments.max_length, seed=arguments.seed, compute=compute,
        optim=OptimConfig(lr=LEARNING_RATE["sft"], warmup=WARMUP), save=SaveConfig(every=10**9),
    ))  # fmt: skip
    return sum(row["seconds"] for row in read_metrics(run / "metrics.jsonl"))


def _trl_arguments(arguments: argparse.Namespace, work: Path, dtype: str) -> dict[str, Any]:
    return {
        "output_dir": str(work / "trl"), "per_device_train_batch_size": BATCH, "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE[arguments.stage], "lr_scheduler_type": "cosine", "warmup_steps": WARMUP,
        "adam_beta2": 0.95, "max_length": arguments.max_length, "gradient_checkpointing": False, "report_to": [],
        "bf16": dtype == "bfloat16", "use_cpu": arguments.device == "cpu", "seed": arguments.seed,
        "save_strategy": "no", "disable_tqdm": True, "logging_steps": 10**9,
    }  # fmt: skip


def _trl_reward(
    arguments: argparse.Namespace, rows: list[dict[str, Any]], work: Path, tokenizer: Any, dtype: str
) -> float:
    import trl
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        tokenizer.name_or_path, num_labels=1, dtype=torch.float32
    )
    pad = pad_that_ends_no_turn(tokenizer, model.get_input_embeddings().num_embeddings)
    model.config.pad_token_id, tokenizer.pad_token = pad, tokenizer.convert_ids_to_tokens(pad)
    settings = trl.RewardConfig(**_trl_arguments(arguments, work, dtype))
    trainer = trl.RewardTrainer(model, settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    seconds = trainer.train().metrics["train_runtime"]
    trainer.save_model(str(work / "run" / "final"))
    return seconds


def _trl_sft(
    arguments: argparse.Namespace, rows: list[dict[str, Any]], work: Path, tokenizer: Any, dtype: str
) -> float:
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tokenizer.name_or_path, dtype=torch.float32)
    settings = _trl_arguments(arguments, work, dtype)
    if arguments.contender == "trl packed":
        # About as many tokens a step as the other contenders have.
        per_row = sum(
            len(tokenizer.apply_chat_template(r["prompt"] + r["completion"], return_dict=False)) for r in rows
        )
        settings |= {"packing": True, "per_device_train_batch_size": 1, "max_length": BATCH * per_row // len(rows)}
    trainer = trl.SFTTrainer(
        model, trl.SFTConfig(**settings), train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    return trainer.train().metrics["train_runtime"]


if __name__ == "__main__":
    main()
