"""Preference pairs without people: sample from a model, let a judge order the answers of each prompt."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppomax.config import ModelConfig, SamplingConfig
from ppomax.engine.durable import disk_errors, write_json_atomic, write_text_atomic
from ppomax.models.load import load_causal_lm, load_tokenizer
from ppomax.models.players import Policy
from ppomax.monitor.progress import progress
from ppomax.rewards.callables import RewardFunction, judged, try_judge
from ppomax.rollout.collect import response_texts
from ppomax.stages.inputs import (
    PromptRows,
    compute_of,
    context_limit,
    expect_native,
    fitted_prompts,
    sampling_of,
)
from ppomax.stages.kept import Kept
from ppomax.stages.spoilt import spoilt
from ppomax.types import SetupError

RANDOM_PURPOSE = 1_000_002


def label(
    policy: str, prompts: Sequence[str], judge: RewardFunction, out: Path, *, samples: int, tie: float,
    sampling: SamplingConfig, compute: ModelConfig, seed: int, loop_every: int | None = None,
    stray_every: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write `out`: all pairs of answers to a prompt whose judge scores differ by more than `tie`. Returns counts.

    Answers that have ended are kept beside it until it is written: who was interrupted goes on with the others.
    loop_every, stray_every: for one prompt in so many, the best answer made worse is one more answer: with its last
    words said again (every other time of something else), and with another prompt's words in the place of its own
    prompt's (stages/spoilt.py).
    """
    if out.suffix != ".jsonl":
        raise SetupError(f"{out}: found the ending {out.suffix!r}, expected .jsonl: pairs are written as JSON lines")
    with disk_errors(out), tempfile.TemporaryFile(dir=out.parent):  # else it would be found after the sampling
        pass
    expect_native(sampling)
    tokenizer = load_tokenizer(policy, compute.chat_template)
    read = fitted_prompts(tokenizer, prompts, 512)
    asked = read.prompts
    try_judge(judge, asked, name="judge")
    kept = out.with_suffix(".answers.jsonl")
    texts = _answers(policy, tokenizer, read, kept, samples=samples, sampling=sampling, compute=compute, seed=seed)
    scores = judged(judge, [prompt for prompt in asked for _ in range(samples)], texts, name="judge")
    answers = list(zip(scores, texts, strict=True))
    groups = [answers[first : first + samples] for first in range(0, len(answers), samples)]
    best = [max(group, key=lambda answer: answer[0])[1] for group in groups]
    made = spoilt([p.messages[-1]["content"] for p in asked], best, loop_every=loop_every, stray_every=stray_every)
    if made:
        of_made = judged(judge, [asked[number] for number, _ in made], [text for _, text in made], name="judge")
        for score, (number, text) in zip(of_made, made, strict=True):
            groups[number].append((score, text))
    lines, ties = [], 0
    for prompt, group in zip(asked, groups, strict=True):
        for (high, better), (low, worse) in itertools.combinations(sorted(group, key=lambda answer: -answer[0]), 2):
            ties += high - low <= tie
            if high - low > tie and worse:
                lines.append({
                    "prompt": list(prompt.messages), "chosen": better, "rejected": worse, "score_chosen": high,
                    "score_rejected": low, "source": prompt.source,
                })  # fmt: skip
    write_text_atomic(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    counts = {
        "prompts": len(asked),
        "responses": len(texts) + len(made),
        "pairs": len(lines),
        "ties": ties,
        "judge_mean": sum(scores) / len(scores),
        "read": str(read),
    }
    write_json_atomic(out.with_suffix(".json"), counts)
    kept.unlink()
    return counts


def _answers(
    policy: str, tokenizer: Any, read: PromptRows, kept: Path, *,
    samples: int, sampling: SamplingConfig, compute: ModelConfig, seed: int,
) -> list[str]:  # fmt: skip
    """`samples` answers to every prompt, in the prompts' order; those of the same work that `kept` has are taken."""
    model = Policy(load_causal_lm(policy, compute_of(compute)), train_layers=None, trained=False)
    context_limit(model.model, max(map(len, read.ids)) + sampling.max_new_tokens, "longest prompt + response")
    answers = Kept(
        kept, model, policy, read.prompts, read.ids, samples=samples, iteration=RANDOM_PURPOSE, seed=seed,
        how=sampling_of(sampling, model, tokenizer), stop=sampling.stop,
    )  # fmt: skip
    with progress("label", len(read.ids) * samples, done=len(answers.responses), unit="responses") as advance:
        return response_texts(tokenizer, answers.rollout(advance))
