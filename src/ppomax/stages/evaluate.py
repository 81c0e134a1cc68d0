"""Evaluation: two systems answer the same prompts; a judge and the reward model compare them, per source."""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ppomax.config import EvaluateConfig
from ppomax.engine.durable import free_bytes, size_text, write_json_atomic, write_text_atomic
from ppomax.engine.rundir import Run
from ppomax.models.load import load_causal_lm, load_tokenizer, reads_alike, same_vocabulary
from ppomax.models.players import Policy, at_responses, expect_equal_rows
from ppomax.monitor.log import without_nan
from ppomax.monitor.progress import Advance, progress
from ppomax.monitor.report import write_report
from ppomax.monitor.statistics import correlation
from ppomax.monitor.text import text_health, top_closing_share, top_opening_share
from ppomax.rewards.callables import (
    TRIED,
    RewardFunction,
    expect_takes,
    judged,
    load_function,
    shared_columns,
    try_judge,
)
from ppomax.rewards.model import RewardModel
from ppomax.rl.kl import k1
from ppomax.rl.masked import masked_sum
from ppomax.rollout.collect import response_texts
from ppomax.stages.comparison import best_of, compare, mean, pair_accuracy
from ppomax.stages.inputs import (
    compute_of,
    context_limit,
    expect_native,
    fitted_prompts,
    one_of_each_roles,
    required,
    sampling_of,
)
from ppomax.stages.kept import Kept
from ppomax.stages.players import load_reward_model
from ppomax.stages.reward_report import write_samples
from ppomax.stages.session import NEUTRAL, opened_run
from ppomax.types import Prompt, Rollout, SetupError, token_batch

RANDOM_PURPOSE = 1_000_003
# On the disk: the page, an answer with its scores beside its prompt, and each of its tokens, as text or as ids.
PAGE_BYTES, ANSWER_BYTES, TOKEN_BYTES = 2_000_000, 500, 8


@dataclass(frozen=True)
class Answers:
    """What one system answered: rows in prompt order, every prompt `samples` times."""

    rollout: Rollout
    texts: list[str]

    @property
    def prompts(self) -> list[str]:
        """The last user turn of every row."""
        return [prompt.messages[-1]["content"] for prompt in self.rollout.prompts]


def evaluate(config: EvaluateConfig, *, fresh: bool = False) -> dict[str, Any]:
    """Compare `policy` with `baseline` on held-out prompts. Returns summary.json's content.

    A second call with the same settings does it again, and after an interruption goes on with the answers that are
    there; fresh: replace an evaluation with others. Raises SetupError and DataError, mostly before anything is sampled.
    """
    there = Run(config.run_dir, "evaluate")
    begun = any(there.answers.glob("*")) and not there.summary.exists()
    # Who judges changes no answer: where a judge failed, those that there are serve another.
    ignore = (*NEUTRAL, "judge", "judge_tie", "reward") if begun else ("run_dir",)
    with opened_run(
        config.run_dir, verb="evaluate", config=config, resume=not fresh, fresh=fresh, ignore=ignore
    ) as run:
        return _evaluate(run, config)


def _evaluate(run: Run, config: EvaluateConfig) -> dict[str, Any]:
    expect_native(config.sampling)
    if config.best_of and (config.reward is None or not config.judge):
        raise SetupError(
            "best_of: found it without a reward model or without a judge, expected both: one picks, one judges"
        )
    if config.reward is None and not config.judge:
        raise SetupError("judge: found neither a judge nor a reward model, expected at least one to compare by")
    compute = compute_of(config.compute)
    names = [spec.rpartition(":")[2] for spec in config.judge]
    judges = {
        spec if names.count(name) > 1 else name: load_function(spec)
        for name, spec in zip(names, config.judge, strict=True)
    }
    tokenizer = load_tokenizer(config.policy, otherwise=config.compute.chat_template)
    of_baseline = load_tokenizer(config.baseline, otherwise=config.compute.chat_template)
    if not same_vocabulary(of_baseline, tokenizer):
        raise SetupError(
            f"baseline {config.baseline}: found another vocabulary than that of the policy {config.policy}, expected "
            "the same; compare models that share a tokenizer"
        )
    if not reads_alike(of_baseline, tokenizer):
        print(
            f"evaluate: the baseline {config.baseline} has another chat template or end of a turn than the policy "
            f"{config.policy}; both are given the policy's, so the baseline may answer worse than in its own"
        )
    specs = required(config.prompts, "prompts", "held-out prompts")
    read = fitted_prompts(tokenizer, specs, config.max_prompt_tokens)
    rows = _first_of_each(read.prompts, config.max_prompts)
    prompts, ids = [read.prompts[i] for i in rows], [read.ids[i] for i in rows]
    columns = shared_columns([prompt.columns for prompt in prompts])
    for name, judge in judges.items():
        expect_takes(judge, columns, what=f"judge {name}")
        try_judge(judge, prompts, name=name)
    print(f"evaluate: {read}; {len(prompts)} prompts × {config.samples_per_prompt} samples a system")
    # One more than n, so that the sample that a best of n is compared with is not among its candidates.
    most = max((config.samples_per_prompt, *(n + 1 for n in config.best_of)))
    _expect_room(run, prompts, config.samples_per_prompt, most, config.sampling.max_new_tokens)
    policy = Policy(load_causal_lm(config.policy, compute), train_layers=None, trained=False)
    baseline = Policy(load_causal_lm(config.baseline, compute), train_layers=None, trained=False)
    if config.sampling.warped:
        expect_equal_rows(
            policy, baseline, what=f"exact KL to the baseline {config.baseline}",
            instead="leave out top_p, top_k and repetition_penalty",
        )  # fmt: skip
    longest = max(map(len, ids)) + config.sampling.max_new_tokens
    for role, player in (("policy", policy), ("baseline", baseline)):
        context_limit(player.model, longest, f"{role}: longest prompt + response")
    model = None
    if config.reward:
        by_text = bool(config.sampling.stop)
        model = load_reward_model(config.reward, tokenizer, compute, config.compute, by_text=by_text)
        if model.reads_ids:
            context_limit(model.scalar.model, longest, "reward model: longest prompt + response")
        else:  # whether its chat template takes the prompts
            tried = [prompt.messages for prompt in one_of_each_roles(prompts)]
            model.score_text(tried, TRIED[:1] * len(tried))

    def kept_of(role: str, player: Policy, directory: str, samples: int) -> Kept:
        return Kept(
            run.answers / f"{role}.jsonl", player, directory, prompts, ids, samples=samples, iteration=RANDOM_PURPOSE,
            seed=config.seed, how=sampling_of(config.sampling, player, tokenizer), stop=config.sampling.stop,
        )  # fmt: skip

    kept = (
        kept_of("baseline", baseline, config.baseline, most),
        kept_of("policy", policy, config.policy, config.samples_per_prompt),
    )
    total, done = len(prompts) * (most + config.samples_per_prompt), sum(len(of_one.responses) for of_one in kept)
    with progress("evaluate", total, done=done, unit="responses") as advance:
        rollouts = [of_one.rollout(advance) for of_one in kept]
    pool, after = (Answers(rollout, response_texts(tokenizer, rollout)) for rollout in rollouts)
    # Both systems' answers are read for their likelihood, and what there is by the reward model.
    read_again = 2 * len(after.texts) + (len(after.texts) + len(pool.texts)) * (model is not None)
    with progress("evaluate, reading", read_again, unit="responses") as advance:
        return _report(run, config, Systems(policy, baseline, model, judges, advance), after, pool)


def _expect_room(run: Run, prompts: Sequence[Prompt], shown: int, most: int, limit: int) -> None:
    """Refuse a disk on which the answers would be found not to fit when they have been sampled.

    shown: samples of a prompt by each system that are compared; most: by the baseline, with those for the best of n.
    """
    asked = sum(len(prompt.messages[-1]["content"].encode()) for prompt in prompts)
    as_text = 2 * shown * (asked + len(prompts) * (ANSWER_BYTES + TOKEN_BYTES * limit))
    answers = len(prompts) * (shown + most)
    needed = PAGE_BYTES + as_text + answers * TOKEN_BYTES * limit
    replaced = run.samples, run.report, *run.answers.glob("*")
    written_anew = sum(file.stat().st_size for file in replaced if file.exists())
    free = free_bytes(run.path) + written_anew
    if free < needed:
        raise SetupError(
            f"{run.path}: found {size_text(free)} free, expected {size_text(needed)} for {answers:,} "
            "answers and a report. Free some space or choose another --run-dir"
        )


def _first_of_each(prompts: Sequence[Prompt], most: int | None) -> list[int]:
    """The first `most` prompts of every source, in the given order; all of them for None."""
    taken: Counter[str] = Counter()
    rows = []
    for i, prompt in enumerate(prompts):
        taken[prompt.source] += 1
        if most is None or taken[prompt.source] <= most:
            rows.append(i)
    return rows


@dataclass(frozen=True)
class Systems:
    """Who is compared, and who judges."""

    policy: Policy
    baseline: Policy
    reward: RewardModel | None
    judges: dict[str, RewardFunction]
    advance: Advance

    def rewards(self, answers: Answers) -> list[float] | None:
        """The reward model's scores."""
        if self.reward is None:
            return None
        rollout = answers.rollout
        if self.reward.reads_ids:
            scores = self.reward.score_rows(rollout.pairs())
        else:
            scores = self.reward.score_text(
                [p.messages for p in rollout.prompts], answers.texts, truncated=rollout.truncated_B.tolist()
            )
        self.advance(len(answers.texts))
        return scores

    def judged(self, answers: Answers) -> dict[str, list[float]]:
        """Every judge's scores."""
        prompts, ids = answers.rollout.prompts, answers.rollout.responses()
        return {name: judged(f, prompts, answers.texts, name=name, ids=ids) for name, f in self.judges.items()}


@torch.no_grad()
def _read(
    policy: Policy, reference: Policy | None, rollout: Rollout, config: EvaluateConfig, advance: Advance
) -> tuple[float, float]:
    """Mean NLL per response token at temperature 1, and KL to `reference` per sequence at the sampling temperature.

    The KL is k1 at the sampled tokens; where these come from a warped distribution (top-p and the like), of which that
    would be no estimate, it is the exact KL at every state that they went through.
    """
    responses, temperature = rollout.responses(), config.sampling.temperature
    nll = kl = 0.0
    for rows in policy.microbatches(rollout.prompt_ids, responses, budget=config.compute.tokens_per_microbatch):
        device = str(policy.device)
        batch = token_batch([rollout.prompt_ids[i] for i in rows], [responses[i] for i in rows], device=device)
        against = reference if config.sampling.warped else None
        scores = policy(batch, temperature=temperature, statistics=True, against=against)
        mask = batch.mask_BR
        nll -= float(masked_sum(at_responses(scores.plain_logprobs_BT, batch), mask))
        if against is not None:
            kl += float(masked_sum(at_responses(scores.kl_BT, batch), mask))
        elif reference is not None:
            other = reference(batch, temperature=temperature).logprobs_BT
            kl += float(masked_sum(k1(at_responses(scores.logprobs_BT, batch), at_responses(other, batch)), mask))
        advance(len(rows))
    return nll / int(rollout.length_B.sum()), kl / len(rollout)


def _take(answers: Answers, rows: list[int]) -> Answers:
    return Answers(answers.rollout.take(rows), [answers.texts[i] for i in rows])


def _report(run: Run, config: EvaluateConfig, systems: Systems, after: Answers, pool: Answers) -> dict[str, Any]:
    """Write what is found out, and return the summary. pool: the baseline's answers, those that are compared with
    `after` and more for the best of n."""
    compared_rows = [i for i, n in enumerate(pool.rollout.sample_B.tolist()) if n < config.samples_per_prompt]
    before = _take(pool, compared_rows)
    # What was sampled is kept if a judge fails.
    write_samples(run.samples, _sample_rows(before, after, (None, None), (None, None)))
    groups = [prompt.key for prompt in after.rollout.prompts]
    sources = [prompt.source for prompt in after.rollout.prompts]
    nll_before, _ = _read(systems.baseline, None, before.rollout, config, systems.advance)
    nll_after, kl = _read(systems.policy, systems.baseline, after.rollout, config, systems.advance)
    summary: dict[str, Any] = {
        "prompts": len(set(groups)),
        "samples_per_prompt": config.samples_per_prompt,
        "kl_per_sequence": kl,
        "kl_estimator": "full" if config.sampling.warped else "k1",
        "kl_per_token": kl * len(after.rollout) / int(after.rollout.length_B.sum()),
        "perplexity_before": math.exp(nll_before),
        "perplexity_after": math.exp(nll_after),
        **_texts(before, "before"),
        **_texts(after, "after"),
    }
    judged = systems.judged(before), systems.judged(after)
    compared = {
        name: compare(judged[1][name], judged[0][name], config.judge_tie, groups, sources) for name in systems.judges
    }
    if compared:
        summary["gold"] = next(iter(compared.values()))
        summary["judges"] = compared
    rewards = systems.rewards(before), systems.rewards(after)
    if rewards[0] is not None and rewards[1] is not None:
        # Rounding depends on the pass that reads an answer: the same one has one score, else it would win or lose.
        asked = before.rollout.pairs()
        known = dict(zip(asked, rewards[0], strict=True))
        same = [known.get(pair, x) for pair, x in zip(after.rollout.pairs(), rewards[1], strict=True)]
        rewards = [known[pair] for pair in asked], same
        summary["reward"] = compare(rewards[1], rewards[0], 0.0, groups, sources)
        summary |= {"reward_before": mean(rewards[0]), "reward_after": mean(rewards[1])}
    if rewards[0] is not None and systems.judges:
        summary |= _against_pool(systems, pool, compared_rows, rewards[0], judged[0], groups, config)
    summary = without_nan(summary)
    first = next(iter(systems.judges), None)
    rows = _sample_rows(before, after, (judged[0].get(first or ""), judged[1].get(first or "")), rewards)
    write_samples(run.samples, rows)
    _write_table(run, rows)
    write_json_atomic(run.summary, summary)
    write_report(run.path)
    shutil.rmtree(run.answers)
    return summary


def _against_pool(
    systems: Systems, pool: Answers, compared: Sequence[int], rewards_before: Sequence[float],
    judged_before: Mapping[str, Sequence[float]], groups: Sequence[str], config: EvaluateConfig,
) -> dict[str, Any]:  # fmt: skip
    """What the reward model is worth on the baseline's answers: agreement with each judge, and best-of-n.

    The `compared` rows of the pool are scored and judged already; the others are here.
    """
    others = sorted({*range(len(pool.texts))} - {*compared})
    more = _take(pool, others) if others else None

    def whole(known: Sequence[float], of_others: Sequence[float]) -> list[float]:
        by_row = dict(zip([*compared, *others], [*known, *of_others], strict=True))
        return [by_row[i] for i in range(len(by_row))]

    rewards = whole(rewards_before, (systems.rewards(more) if more else None) or [])
    of_others = systems.judged(more) if more else {}
    judged = {name: whole(known, of_others.get(name, [])) for name, known in judged_before.items()}
    before = next(iter(judged_before.values()))
    by_prompt: dict[str, list[int]] = {}
    for i, prompt in enumerate(pool.rollout.prompts):
        by_prompt.setdefault(prompt.key, []).append(i)
    first = next(iter(judged.values()))
    return {
        "reward_model": {
            name: {
                "accuracy": pair_accuracy(rewards, scores, list(by_prompt.values()), config.judge_tie),
                "correlation": correlation(rewards, scores),
            }
            for name, scores in judged.items()
        },
        "best_of": {
            str(n): best_of(rewards, first, by_prompt, before, groups, compared, n, config.judge_tie)
            for n in config.best_of
        },
    }


def _texts(answers: Answers, when: str) -> dict[str, float]:
    health = text_health(answers.prompts, answers.texts)
    return {
        f"length_{when}": float(answers.rollout.length_B.float().mean()),
        f"truncated_{when}": float(answers.rollout.truncated_B.float().mean()),
        f"distinct2_{when}": health["distinct_2"],
        f"topic_{when}": health["on_topic_share"],
        f"opening_{when}": top_opening_share(answers.texts)[1],
        f"closing_{when}": top_closing_share(answers.texts)[1],
        f"degenerate_{when}": health["degenerate_share"],
    }


def _sample_rows(
    before: Answers, after: Answers, judged: Sequence[list[float] | None], rewards: Sequence[list[float] | None]
) -> list[dict[str, Any]]:
    rows = []
    for i, prompt in enumerate(after.rollout.prompts):
        row: dict[str, Any] = {"prompt": prompt.messages[-1]["content"], "source": prompt.source}
        row |= {"before": before.texts[i], "after": after.texts[i]}
        for name, pair in (("gold", judged), ("reward", rewards)):
            if pair[0] is not None and pair[1] is not None:
                row |= {f"{name}_before": pair[0][i], f"{name}_after": pair[1][i]}
        rows.append(row)
    return rows


def _write_table(run: Run, rows: Sequence[Mapping[str, Any]]) -> None:
    """samples.md: answers side by side, evenly spaced through all of them (24 to 47), to read without a browser."""
    lines = ["| prompt | before | after |", "|---|---|---|"]
    for row in rows[:: max(1, len(rows) // 24)]:
        cells = [_plain(str(row[k])) for k in ("prompt", "before", "after")]
        lines.append(f"| {cells[0]} | {cells[1]} | {cells[2]} |")
    write_text_atomic(run.path / "samples.md", "\n".join(lines) + "\n")


def _plain(text: str) -> str:
    """One line of Markdown that shows the text and makes neither cells, tags, links nor pictures of it."""
    return re.sub(r"[\\|<\[]", r"\\\g<0>", " ".join(text.split()))
