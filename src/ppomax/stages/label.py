"""Preference pairs without people: sample from a model, let a judge order the answers of each prompt."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppomax.config import ModelConfig, SamplingConfig
from ppomax.engine.durable import write_json_atomic, write_text_atomic
from ppomax.models.load import load_causal_lm, load_tokenizer
from ppomax.models.players import Policy
from ppomax.monitor.progress import progress
from ppomax.rewards.callables import RewardFunction, call, shared_columns
from ppomax.rollout.collect import collect, eos_token_ids, response_texts
from ppomax.rollout.sampler import Distribution
from ppomax.stages.inputs import compute_of, context_limit, fitted_prompts

RANDOM_PURPOSE = 1_000_002


def label(
    policy: str, prompts: Sequence[str], judge: RewardFunction, out: Path, *, samples: int, tie: float,
    sampling: SamplingConfig, compute: ModelConfig, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Write `out`: all pairs of answers to a prompt whose judge scores differ by more than `tie`. Returns counts."""
    tokenizer = load_tokenizer(policy, compute.chat_template)
    rows, ids, report = fitted_prompts(tokenizer, prompts, 512)
    model = Policy(load_causal_lm(policy, compute_of(compute)), train_layers=None, trained=False)
    context_limit(model.model, max(map(len, ids)) + sampling.max_new_tokens, "longest prompt + response")
    with progress("label", len(rows) * samples, unit="responses") as advance:
        rollout = collect(
            model, rows, ids, range(len(rows)), samples=samples, iteration=RANDOM_PURPOSE, seed=seed,
            limit=sampling.max_new_tokens, distribution=Distribution(sampling.temperature),
            eos_ids=eos_token_ids(model.model, tokenizer), max_rows=sampling.max_rows, progress=advance,
        )  # fmt: skip
    texts = response_texts(tokenizer, rollout)
    columns = shared_columns([p.columns for p in rollout.prompts])
    scores, _ = call(judge, [p.messages for p in rollout.prompts], texts, columns, name="judge")
    lines = []
    for start in range(0, len(texts), samples):
        group = sorted(range(start, start + samples), key=lambda i: -scores[i])
        for better, worse in itertools.combinations(group, 2):
            if scores[better] - scores[worse] > tie and texts[worse]:
                prompt = rollout.prompts[better]
                lines.append({
                    "prompt": list(prompt.messages), "chosen": texts[better], "rejected": texts[worse],
                    "score_chosen": scores[better], "score_rejected": scores[worse], "source": prompt.source,
                })  # fmt: skip
    write_text_atomic(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    counts = {
        "prompts": len(rows),
        "responses": len(texts),
        "pairs": len(lines),
        "judge_mean": sum(scores) / len(scores),
        "read": report,
    }
    write_json_atomic(out.with_suffix(".json"), counts)
    return counts
