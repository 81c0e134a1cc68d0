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
from ppomax.rollout.collect import collect, response_texts
from ppomax.stages.inputs import compute_of, context_limit, expect_native, fitted_prompts, sampling_of
from ppomax.types import Prompt

RANDOM_PURPOSE = 1_000_002


def label(
    policy: str, prompts: Sequence[str], judge: RewardFunction, out: Path, *, samples: int, tie: float,
    sampling: SamplingConfig, compute: ModelConfig, seed: int, loop_every: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write `out`: all pairs of answers to a prompt whose judge scores differ by more than `tie`. Returns counts.

    loop_every: for one prompt in so many, the best answer with its last words said again is one more answer. Sampled
    answers hardly ever loop, so that without it the reward model never learns what the judge thinks of that.
    """
    expect_native(sampling)
    tokenizer = load_tokenizer(policy, compute.chat_template)
    read = fitted_prompts(tokenizer, prompts, 512)
    rows, ids = read.prompts, read.ids
    model = Policy(load_causal_lm(policy, compute_of(compute)), train_layers=None, trained=False)
    context_limit(model.model, max(map(len, ids)) + sampling.max_new_tokens, "longest prompt + response")
    with progress("label", len(rows) * samples, unit="responses") as advance:
        rollout = collect(
            model, rows, ids, range(len(rows)), samples=samples, iteration=RANDOM_PURPOSE, seed=seed,
            how=sampling_of(sampling, model, tokenizer), progress=advance,
        )  # fmt: skip
    texts = response_texts(tokenizer, rollout)
    scores = _judged(judge, rollout.prompts, texts)
    groups = [range(first, first + samples) for first in range(0, len(texts), samples)]
    best = {number: max(group, key=lambda i: scores[i]) for number, group in enumerate(groups)}
    spoilt = {number: i for number, i in best.items() if loop_every and number % loop_every == 0 and texts[i]}
    loops = {number: looped(texts[i], 3 + n % 6) for n, (number, i) in enumerate(spoilt.items())}
    of_loops = _judged(judge, [rollout.prompts[i] for i in spoilt.values()], list(loops.values())) if loops else []
    extra = dict(zip(loops, zip(of_loops, loops.values(), strict=True), strict=True))
    lines = []
    for number, group in enumerate(groups):
        answers = [(scores[i], texts[i]) for i in group]
        if number in extra:
            answers.append(extra[number])
        prompt = rollout.prompts[group[0]]
        for (high, better), (low, worse) in itertools.combinations(sorted(answers, key=lambda a: -a[0]), 2):
            if high - low > tie and worse:
                lines.append({
                    "prompt": list(prompt.messages), "chosen": better, "rejected": worse, "score_chosen": high,
                    "score_rejected": low, "source": prompt.source,
                })  # fmt: skip
    write_text_atomic(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    counts = {
        "prompts": len(rows),
        "responses": len(texts) + len(loops),
        "pairs": len(lines),
        "judge_mean": sum(scores) / len(scores),
        "read": str(read),
    }
    write_json_atomic(out.with_suffix(".json"), counts)
    return counts


def looped(text: str, words: int) -> str:
    """The text, and its last `words` words again (at most half of it)."""
    said = text.rstrip(" .!?").split()
    tail = said[-min(words, max(len(said) // 2, 1)) :]
    return f"{' '.join(said)}, and {' '.join(tail)}."


def _judged(judge: RewardFunction, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    messages, columns = [p.messages for p in prompts], shared_columns([p.columns for p in prompts])
    return call(judge, messages, list(texts), columns, name="judge")[0]
