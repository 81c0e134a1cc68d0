"""What the contenders of `make bench` are given, written once to a folder: the same prompts, the same reward model."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from bench.common import PROMPTS, Run, write_rows
from bench.plan import FIXED_WORDS, REALISTIC_TOKENS, Workload
from ppomax.config import DoctorConfig
from ppomax.data.chat import render_prompt
from ppomax.data.readers import read_prompts
from ppomax.models.load import Compute, export_scalar, load_scalar_lm, load_tokenizer
from ppomax.stages.doctor import doctor
from ppomax.types import Message, SetupError


def prepare(model: str, data: str | None, workloads: Sequence[Workload], work: Path) -> Run:
    """Write the prompts of each workload and the reward model; returns what `doctor` measures of this machine.

    data: the realistic workload's prompts, in any of the data formats; None: the quickstart's.
    """
    tokenizer = load_tokenizer(model)
    for workload in workloads:
        if workload.stops:
            prompts = realistic_prompts(tokenizer, data or str(PROMPTS), workload.rows)
        else:
            prompts = fixed_prompts(workload.rows)
        rows = [{"prompt": list(prompt), "ids": render_prompt(tokenizer, prompt)} for prompt in prompts]
        write_rows(workload.prompts(work), rows)
    # The policy's own weights under a random head: what a response earns does not matter for time.
    scalar = load_scalar_lm(model, Compute(torch.device("cpu"), torch.float32), fresh_head_seed=0)
    export_scalar(scalar, tokenizer, work / "reward")
    found = doctor(DoctorConfig(measure=True))
    return {"bfloat16": found["numbers"]["dtype"] == "bfloat16", "load": found["numbers"]["load"], **found["machine"]}


def prompt_ids(workload: Workload, work: Path) -> list[list[int]]:
    """The prompts of a workload as token ids."""
    return [json.loads(line)["ids"] for line in workload.prompts(work).read_text(encoding="utf-8").splitlines()]


def fixed_prompts(count: int) -> list[list[Message]]:
    """`count` prompts of 8 to 40 words: consecutive words of the quickstart's prompts."""
    prompts, _ = read_prompts(str(PROMPTS))
    words = cycle(" ".join(prompt.messages[-1]["content"] for prompt in prompts).split())
    low, high = FIXED_WORDS
    lengths = [low + (high - low) * i // max(count - 1, 1) for i in range(count)]
    return [[Message(role="user", content=" ".join(islice(words, length)))] for length in lengths]


def realistic_prompts(tokenizer: Any, data: str, count: int) -> list[tuple[Message, ...]]:
    """`count` distinct prompts that fit whole, drawn with seed 0."""
    prompts, _ = read_prompts(data)
    fitting = {p.key: p.messages for p in prompts if len(render_prompt(tokenizer, p.messages)) <= REALISTIC_TOKENS}
    if len(fitting) < count:
        raise SetupError(
            f"{data}: found {len(fitting)} distinct prompts of at most {REALISTIC_TOKENS} tokens, expected {count}; "
            "give --data another file or lower --rows"
        )
    return random.Random(0).sample(list(fitting.values()), count)
