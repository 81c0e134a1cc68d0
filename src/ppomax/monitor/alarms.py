"""The watch for pattern collapse: rewards and losses do not show it, these measures do.

Source: "Secrets of RLHF in Large Language Models Part I: PPO", section 5.2 and figures 4 and 13.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Severity = Literal["warn", "stop"]


@dataclass(frozen=True)
class Limits:
    """When to raise which alarm. Every rule reads the mean of the newest `window` rows: a single batch is noisy.

    "Baseline" is the mean of the first `baseline_rows` rows: the text before PPO has changed it much. Rules against
    the baseline wait for one row more than that, and are silent where it is a spread of 0. A `*_stop` limit means that
    going on is a waste.
    """

    window: int = 3
    baseline_rows: int = 3
    kl_per_sequence: float = 15.0  # nats per response of at most 64 tokens; more for longer ones, see kl_scale
    kl_stop: float = 60.0
    kl_negative: float = -0.5  # an estimate may be a little below 0, by chance
    behaviour_gap: float = 0.1  # nats per token, on average: more than rounding
    length_growth: float = 1.8  # times the baseline
    length_shrink: float = 0.5
    perplexity_fall: float = 0.6
    entropy_fall: float = 0.5
    score_std_growth: float = 2.5
    score_std_fall: float = 0.25
    score_rise: float = 3.0  # baseline standard deviations
    top_phrase_share: float = 0.10
    top_phrase_rise: float = 0.05  # above the baseline, so that small batches do not alarm by their size alone
    on_topic_fall: float = 0.10
    distinct_2_fall: float = 0.8
    degenerate_share: float = 0.02  # and two responses at least
    degenerate_stop: float = 0.20
    truncated_rise: float = 0.25  # above the baseline
    truncated_share: float = 0.5  # whatever the baseline
    clip_fraction: float = 0.35
    explained_variance: float = -0.5  # policy rows only: a critic worse than a constant is normal at its start


@dataclass(frozen=True)
class Alarm:
    """`value` crossed `limit` in `iteration`; `message` says what that means and what to try."""

    name: str
    iteration: int
    value: float
    limit: float
    message: str
    severity: Severity


@dataclass(frozen=True)
class _Rule:
    """Fires where `value` is beyond `limit`; a NaN on either side, for what is not known, never fires."""

    name: str
    value: float
    limit: float
    form: str
    below: bool = False
    severity: Severity = "warn"

    def fires(self) -> bool:
        return self.value < self.limit if self.below else self.value > self.limit


_Measure = Callable[[str], float]
_DEFAULT_LIMITS = Limits()


def kl_scale(length: float) -> float:
    """By how much the KL limits grow with the baseline's response length in tokens: max(1, length / 64); 1 for NaN."""
    return max(1.0, length / 64)


def check(history: Sequence[Mapping[str, Any]], *, limits: Limits = _DEFAULT_LIMITS) -> list[Alarm]:
    """The alarms that hold at the newest row of `history` (metrics rows, oldest first; missing keys are skipped)."""
    if not history:
        return []
    newest = history[-1]
    iteration = int(newest.get("iteration", newest.get("step", len(history))))

    def recent(key: str) -> float:
        return _mean([_number(row.get(key)) for row in history[-limits.window :]])

    def baseline(key: str) -> float:
        known = len(history) > limits.baseline_rows
        return _mean([_number(row.get(key)) for row in history[: limits.baseline_rows]]) if known else math.nan

    rules = [
        *_kl_rules(
            recent, _mean([_number(row.get("response_length")) for row in history[: limits.baseline_rows]]), limits
        ),
        *_drift_rules(recent, baseline, limits),
        *_text_rules(recent, baseline, limits, responses=sum(map(_responses, history[-limits.window :]))),
    ]
    if all(row.get("phase", "policy") == "policy" for row in history[-limits.window :]):
        rules += _training_rules(recent, limits)
    # A rule that stops stands before the one that warns of the same thing, and hides it.
    fired = {rule.name: rule for rule in reversed(rules) if rule.fires()}
    alarms = [_alarm(rule, iteration) for rule in rules if fired.get(rule.name) is rule]
    return [*_nonfinite_alarms(newest, iteration), *alarms]


def _kl_rules(recent: _Measure, length_0: float, limits: Limits) -> list[_Rule]:
    """length_0: the baseline's response length as far as it is known; these rules do not wait for the whole of it."""
    kl, scale = recent("kl_per_sequence"), kl_scale(length_0)
    return [
        _Rule("kl_per_sequence", kl, scale * limits.kl_stop, "{:.1f} nats per response", severity="stop"),
        _Rule("kl_per_sequence", kl, scale * limits.kl_per_sequence, "{:.1f} nats per response"),
        _Rule("kl_negative", kl, limits.kl_negative, "{:.2f} nats per response", below=True),
    ]


def _drift_rules(recent: _Measure, baseline: _Measure, limits: Limits) -> list[_Rule]:
    length, spread = (recent(key) for key in ("response_length", "score_std"))
    # Nothing can be told by multiples of a spread of 0.
    length_0, spread_0 = baseline("response_length"), baseline("score_std") or math.nan
    ceiling = baseline("score_mean") + limits.score_rise * spread_0
    return [
        _Rule("behaviour_gap", recent("behaviour_gap"), limits.behaviour_gap, "{:.3f} nats per token"),
        _Rule("length_growth", length, limits.length_growth * length_0, "{:.0f} tokens"),
        _Rule("length_shrink", length, limits.length_shrink * length_0, "{:.0f} tokens", below=True),
        _Rule(
            "perplexity", recent("perplexity"), limits.perplexity_fall * baseline("perplexity"), "{:.2f}", below=True
        ),
        _Rule("entropy", recent("entropy"), limits.entropy_fall * baseline("entropy"), "{:.2f}", below=True),
        _Rule("score_std_growth", spread, limits.score_std_growth * spread_0, "{:.2f}"),
        _Rule("score_std_fall", spread, limits.score_std_fall * spread_0, "{:.2f}", below=True),
        _Rule("score_rise", recent("score_mean"), ceiling, "{:.2f}"),
    ]


def _text_rules(recent: _Measure, baseline: _Measure, limits: Limits, *, responses: float) -> list[_Rule]:
    """responses: how many the newest rows are of, NaN where they do not say; one broken response is none too many."""
    broken, cut = recent("degenerate_share"), recent("truncated_share")
    # Here the constant stands first: max() and min() keep it where the second argument is NaN.
    stop, warn = (max(limit, 1.5 / responses) for limit in (limits.degenerate_stop, limits.degenerate_share))
    cut_most = min(limits.truncated_share, baseline("truncated_share") + limits.truncated_rise)
    # The baseline stands first: max() keeps its NaN (not known yet) there, and would drop it as second argument.
    openings, closings = (
        max(baseline(key) + limits.top_phrase_rise, limits.top_phrase_share)
        for key in ("top_opening_share", "top_closing_share")
    )
    topic = baseline("on_topic_share") - limits.on_topic_fall
    return [
        _Rule("top_opening_share", recent("top_opening_share"), openings, "{:.0%} of the responses"),
        _Rule("top_closing_share", recent("top_closing_share"), closings, "{:.0%} of the responses"),
        _Rule("on_topic_share", recent("on_topic_share"), topic, "{:.0%} of the responses", below=True),
        _Rule(
            "distinct_2", recent("distinct_2"), limits.distinct_2_fall * baseline("distinct_2"), "{:.2f}", below=True
        ),
        _Rule("degenerate_share", broken, stop, "{:.1%} of the responses", severity="stop"),
        _Rule("degenerate_share", broken, warn, "{:.1%} of the responses"),
        _Rule("truncated_share", cut, cut_most, "{:.0%} of the responses"),
    ]


def _training_rules(recent: _Measure, limits: Limits) -> list[_Rule]:
    explained = recent("explained_variance")
    return [
        _Rule("clip_fraction", recent("clip_fraction"), limits.clip_fraction, "{:.0%} of the tokens"),
        _Rule("explained_variance", explained, limits.explained_variance, "{:.2f}", below=True),
    ]


def _alarm(rule: _Rule, iteration: int) -> Alarm:
    found = f"{rule.form.format(rule.value)}, limit {rule.form.split()[0].format(rule.limit)}."
    message = f"{_TITLES[rule.name]}: {found} {_ADVICE[rule.name]}"
    return Alarm(rule.name, iteration, rule.value, rule.limit, message, rule.severity)


def _nonfinite_alarms(newest: Mapping[str, Any], iteration: int) -> list[Alarm]:
    broken = [key for key in _WATCHED_KEYS if key in newest.get("nonfinite", ()) or _is_nonfinite(newest.get(key))]
    if not broken:
        return []
    message = f"{_TITLES['nonfinite']}: {', '.join(broken)} of the newest row. {_ADVICE['nonfinite']}"
    return [Alarm("nonfinite", iteration, math.nan, math.nan, message, "stop")]


_WATCHED_KEYS = (
    "kl_per_sequence", "response_length", "perplexity", "entropy", "score_mean", "score_std", "policy_loss",
    "value_loss", "ptx_loss",
)  # fmt: skip

_TITLES = {
    "nonfinite": "Not a number",
    "kl_per_sequence": "Far from the reference (KL)",
    "kl_negative": "A KL below 0, which none is",
    "behaviour_gap": "Sampler and trainer disagree",
    "length_growth": "Responses grow",
    "length_shrink": "Responses shrink",
    "perplexity": "Perplexity of the responses has fallen",
    "entropy": "Entropy has fallen",
    "score_std_growth": "Scores spread out",
    "score_std_fall": "Scores all alike",
    "score_rise": "Scores beyond what the reward model has seen",
    "top_opening_share": "One opening phrase takes over",
    "top_closing_share": "One closing phrase takes over",
    "on_topic_share": "Responses leave the topic",
    "distinct_2": "Responses say the same things",
    "degenerate_share": "Degenerate responses",
    "truncated_share": "Responses cut by the length limit",
    "clip_fraction": "Updates are clipped",
    "explained_variance": "The critic does not predict the returns",
}

_ADVICE = {
    "nonfinite": "Training cannot recover from this. Go back to the last checkpoint and lower the learning rate.",
    "kl_per_sequence": "The policy is no longer the model that the reward model was trained on, so its scores mean "
    "less. Try a larger KL coefficient, a lower learning rate or fewer iterations.",
    "kl_negative": "The tokens do not come from the distribution that their log-probs are of, so KL, penalty and ratio "
    "mean nothing. Look at behaviour_gap, at the sampler's settings, and for a reference that is not frozen.",
    "behaviour_gap": "The sampler's log-probs are not those that the trainer reads for the same tokens, by more than "
    "rounding: other weights, another precision or another distribution. Try float32; with vLLM, see docs/vllm.md.",
    "length_growth": "Reward models often like long answers for their length. Read samples; try a larger KL "
    "coefficient or a reward model trained on pairs of equal length.",
    "length_shrink": "The policy has found that short answers score well. Read samples; check how the reward model "
    "scores very short answers.",
    "perplexity": "The policy repeats what it is sure of: an early sign of pattern collapse. Read samples; try a "
    "larger KL coefficient or a larger weight of the ptx loss.",
    "entropy": "The policy explores less and its answers become the same. Try a larger KL coefficient, a lower "
    "learning rate, or more prompts.",
    "score_std_growth": "The distribution of scores has grown a long tail, as in a collapse (figure 13 of the paper). "
    "Normalise and clip the scores; read the samples with the highest ones.",
    "score_std_fall": "All responses score the same, so there is little left to learn from, often because they are "
    "all the same text. Read samples.",
    "score_rise": "The reward model judges text unlike its training data here, and may be wrong about it. Check "
    "with another judge, and collect new pairs from this policy.",
    "top_opening_share": "A stock phrase at the start of many answers is reward hacking. Try a larger KL "
    "coefficient, the ptx loss, or pairs in which the phrase loses.",
    "top_closing_share": "A stock phrase at the end of many answers is reward hacking. Try a larger KL coefficient, "
    "the ptx loss, or pairs in which the phrase loses.",
    "on_topic_share": "Fewer answers share a content word with their prompt: the policy says what scores well "
    "whatever the question. Try a larger KL coefficient or pairs in which off-topic answers lose.",
    "distinct_2": "More pairs of neighbouring words are said again, in one answer or in several: often a drift towards "
    "a few phrases (longer answers lower it too). Read samples; try a larger KL coefficient or more prompts.",
    "degenerate_share": "Empty, looping or unprintable text. Go back to an earlier checkpoint; try a lower learning "
    "rate and a larger KL coefficient.",
    "truncated_share": "The policy forgets to stop, or the limit is too low for it. Raise sampling.max_new_tokens, or "
    "penalise answers that do not end.",
    "clip_fraction": "The policy moves too far within one iteration. Try a lower learning rate, larger minibatches or "
    "fewer epochs.",
    "explained_variance": "Advantages are noise while the critic is worse than a constant. Pre-train the critic "
    "longer, or start it from the reward model.",
}


def _responses(row: Mapping[str, Any]) -> float:
    """How many responses a row is of; NaN where it does not say."""
    generated, length = _number(row.get("tokens/generated")), _number(row.get("response_length"))
    return generated / length if generated > 0 and length > 0 else math.nan


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _is_nonfinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _mean(values: Sequence[float]) -> float:
    """The mean of the finite values; NaN, which crosses no limit, where there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
