"""The verdict of a run: its headline numbers, what they mean in a sentence, and how systems compare."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from ppomax.monitor.alarms import Limits, kl_scale
from ppomax.monitor.run_files import RunFiles, last_finite, number

Tone = Literal["good", "bad", "plain"]
_LIMITS = Limits()
_REWARD = "reward model"
_JUDGES = {
    "gold": "gold judge",
    "plain": "gold judge without guards",
    "gold_plain": "gold judge without guards",
    "gold_guarded": "gold judge with guards",
    "guarded": "gold judge with guards",
    "reward": _REWARD,
}


@dataclass(frozen=True)
class Number:
    """A big number of the headline."""

    label: str
    value: str
    note: str = ""
    tone: Tone = "plain"


@dataclass(frozen=True)
class Comparison:
    """Win, tie and lose shares of the policy against the baseline, by one judge or on one source."""

    name: str
    win: float
    tie: float
    lose: float
    win_rate: float
    ci95: tuple[float, float] | None

    @property
    def percent(self) -> str:
        """`85% (80 to 90%)`."""
        interval = f" ({self.ci95[0]:.0%} to {self.ci95[1]:.0%})" if self.ci95 else ""
        return f"{self.win_rate:.0%}{interval}"


@dataclass(frozen=True)
class Change:
    """A measure before and after training; `concern` says why the change is worrying, or is empty."""

    label: str
    before: str
    after: str
    concern: str = ""


def comparisons(root: RunFiles, chapters: Mapping[str, RunFiles]) -> list[Comparison]:
    """Every mapping with a `win_rate` in the summaries, the first judge first, without repetition."""
    summaries = [run.summary for run in (root, chapters.get("evaluate")) if run]
    judges = next((s["judges"] for s in summaries if isinstance(s.get("judges"), Mapping)), {})
    found: dict[str, Comparison] = {}
    for summary in summaries:
        for entry in _entries(summary, judges):
            found.setdefault(entry.name, entry)
    leading = ("gold judge", *(f"judge {name}" for name in list(judges)[:1]))
    return sorted(found.values(), key=lambda entry: not entry.name.startswith(leading))


def headline(root: RunFiles, chapters: Mapping[str, RunFiles]) -> list[Number]:
    """The big numbers for which the run has values."""
    find = partial(_find, root, chapters)
    numbers: list[Number] = []
    compared = comparisons(root, chapters)
    if compared:
        best = compared[0]
        interval = f"95% interval {best.ci95[0]:.0%} to {best.ci95[1]:.0%}" if best.ci95 else ""
        numbers.append(Number(f"win rate, {best.name}", f"{best.win_rate:.0%}", interval, _tone(best)))
    accuracy = _reward_accuracy(root, chapters)
    if math.isfinite(accuracy):
        tone: Tone = "good" if accuracy >= 0.75 else "bad" if accuracy < 0.6 else "plain"
        note = "of held-out pairs; guessing gives 50%"
        numbers.append(Number("reward model accuracy", f"{accuracy:.0%}", note, tone))
    before = find("length_before", first=("ppo", "response_length"))
    kl = find("kl_per_sequence", ("ppo", "kl_per_sequence"))
    if math.isfinite(kl):
        # Evaluation compares with its baseline, which need not be what PPO was held to.
        to_baseline = any(r and "kl_per_sequence" in r.summary for r in (root, chapters.get("evaluate")))
        tone = "bad" if kl > _LIMITS.kl_per_sequence * kl_scale(before) else "plain"
        name = "KL to the baseline" if to_baseline else "KL to the reference"
        numbers.append(Number(name, f"{kl:.1f}", "nats per response", tone))
    after = find("length_after", ("ppo", "response_length"))
    if math.isfinite(before) and math.isfinite(after):
        numbers.append(Number("response length", f"{before:.0f} \u2192 {after:.0f}", "tokens, before and after"))
    iterations = find("iterations")
    if not math.isfinite(iterations) and "ppo" in chapters:
        iterations = float(len(chapters["ppo"].metrics) or math.nan)
    wall = _wall_seconds(root, chapters)
    if math.isfinite(wall):
        note = f"{iterations:.0f} PPO iterations" if math.isfinite(iterations) else ""
        numbers.append(Number("wall time", duration(wall), note))
    elif math.isfinite(iterations):
        numbers.append(Number("PPO iterations", f"{iterations:.0f}"))
    return numbers


def _reward_accuracy(root: RunFiles, chapters: Mapping[str, RunFiles]) -> float:
    """On held-out pairs: the metric `accuracy` is that of a training batch."""
    reward = chapters.get("reward")
    known = [_find(root, chapters, "reward_accuracy")]
    known += [number(reward.summary.get("accuracy")), last_finite(reward.metrics, "heldout_accuracy")] if reward else []
    return next(filter(math.isfinite, known), math.nan)


def _wall_seconds(root: RunFiles, chapters: Mapping[str, RunFiles]) -> float:
    """Of the run itself; of its chapters together, where the root is but a folder of runs."""
    known = [number(run.summary.get("wall_seconds")) for run in ([root] if root.summary else chapters.values())]
    return sum(filter(math.isfinite, known)) or math.nan


def sentences(root: RunFiles, chapters: Mapping[str, RunFiles], alarms: int) -> list[str]:
    """The verdict in words, first what was gained, then what was paid for it."""
    words: list[str] = []
    compared = comparisons(root, chapters)
    if compared:
        best = compared[0]
        tone = _tone(best)
        if _is_reward(best):
            outcome = "Only the reward model compares policy and baseline"
        elif tone == "good":
            outcome = "The policy is better than the baseline that it is compared with"
        elif tone == "bad":
            outcome = "The policy is worse than the baseline that it is compared with"
        else:
            outcome = "No clear difference between the policy and the baseline that it is compared with"
        words.append(
            f"{outcome}: on the given prompts, the {best.name} prefers the policy's answer in {best.win:.0%} of the "
            f"comparisons, calls {best.tie:.0%} a tie, and prefers the baseline's answer in {best.lose:.0%}."
        )
        if _is_reward(best):
            words.append(
                "For a policy that was trained on this score it is no evidence: name a --judge that it has not seen."
            )
    concerns = [change.concern for change in changes(root, chapters) if change.concern]
    words.extend(concerns)
    if changes(root, chapters) and not concerns:
        words.append("The text has kept its variety and its topic, as far as the measures below can tell.")
    if alarms:
        words.append(f"{alarms} alarm{'s' if alarms > 1 else ''} went off during PPO: see that chapter.")
    return words


def changes(root: RunFiles, chapters: Mapping[str, RunFiles]) -> list[Change]:
    """Measures that the summaries hold as `<name>_before` and `<name>_after`, or inside `gold`."""
    find = partial(_find, root, chapters)
    rows: list[Change] = []
    for key, label, kind, worry in _MEASURES:
        before, after = find(f"{key}_before"), find(f"{key}_after")
        if key == "gold":
            before, after = find("gold.mean_before"), find("gold.mean_after")
        if math.isfinite(before) and math.isfinite(after):
            concern = worry.format(before=before, after=after) if _is_worrying(key, before, after) else ""
            rows.append(Change(label, format(before, kind), format(after, kind), concern))
    return rows


def stage_seconds(root: RunFiles) -> list[tuple[str, float]]:
    """Seconds of each stage, in the order of the summary."""
    stages = root.summary.get("stage_seconds")
    pairs = [(str(k), number(v)) for k, v in stages.items()] if isinstance(stages, Mapping) else []
    return [(name, seconds) for name, seconds in pairs if math.isfinite(seconds) and seconds > 0]


def duration(seconds: float) -> str:
    """`48 s`, `5 min 12 s` or `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


_MEASURES = (
    ("gold", "gold score, mean", ".2f", ""),
    ("reward", "score of the reward model, mean", ".2f", ""),
    ("length", "response length, tokens", ".1f",
     "Answers went from {before:.0f} to {after:.0f} tokens: look at the samples."),
    ("truncated", "answers cut by the length limit", ".1%",
     "The length limit cut {after:.0%} of the answers: raise sampling.max_new_tokens."),
    ("topic", "answers that mention something of their prompt", ".0%",
     "Fewer answers stay on their prompt's topic: {before:.0%} before, {after:.0%} after."),
    ("distinct2", "distinct pairs of words", ".2f",
     "The wording has become less varied: distinct word pairs went from {before:.2f} to {after:.2f}."),
    ("perplexity", "perplexity of the answers", ".2f", ""),
    ("opening", "share of the commonest opening", ".1%", "{after:.0%} of the answers open with the same words."),
    ("closing", "share of the commonest closing", ".1%", "{after:.0%} of the answers close with the same words."),
    ("degenerate", "degenerate answers", ".1%", "{after:.1%} of the answers are broken text."),
)  # fmt: skip


def _is_worrying(key: str, before: float, after: float) -> bool:
    phrase = max(_LIMITS.top_phrase_share, before + _LIMITS.top_phrase_rise)
    tests = {
        "length": after > _LIMITS.length_growth * before or after < _LIMITS.length_shrink * before,
        "truncated": after > min(_LIMITS.truncated_share, before + _LIMITS.truncated_rise),
        "topic": after < before - _LIMITS.on_topic_fall,
        "distinct2": after < _LIMITS.distinct_2_fall * before,
        "opening": after > phrase,
        "closing": after > phrase,
        "degenerate": after > 0.01,
    }
    return tests.get(key, False)


def _tone(entry: Comparison) -> Tone:
    low, high = entry.ci95 or (entry.win_rate, entry.win_rate)
    return "plain" if _is_reward(entry) else "good" if low > 0.5 else "bad" if high < 0.5 else "plain"


def _is_reward(entry: Comparison) -> bool:
    """Whether the score compares that a policy is usually trained on."""
    return entry.name.startswith(_REWARD)


def _entries(summary: Mapping[str, Any], judges: Mapping[str, Any], keys: Sequence[str] = ()) -> Iterator[Comparison]:
    """Depth-first over the summary; a mapping with a win rate is named after the keys that lead to it."""
    rate = number(summary.get("win_rate"))
    if math.isfinite(rate):
        known = {key: number(summary.get(key)) for key in ("win", "tie", "lose")}
        win, tie, lose = (known["win"], known["tie"], known["lose"]) if all(map(math.isfinite, known.values())) else (
            rate, 0.0, 1 - rate)  # fmt: skip
        interval = summary.get("ci95")
        pair = [number(v) for v in interval] if isinstance(interval, list | tuple) else []
        ci95 = (pair[0], pair[1]) if len(pair) == 2 and all(map(math.isfinite, pair)) else None
        yield Comparison(_comparison_name(keys), win, tie, lose, rate, ci95)
    for key, value in summary.items():
        if isinstance(value, Mapping):
            path = (*keys, key) if keys else _path(key, value, judges)
            yield from _entries(value, judges, path)


def _path(key: str, comparison: Mapping[str, Any], judges: Mapping[str, Any]) -> tuple[str, ...]:
    """`gold` and the like repeat the comparison by one of the `judges`, and are named after it."""
    same = [name for name, entry in judges.items() if key.startswith("gold") and entry == comparison]
    return ("judges", same[0]) if same else (key,)


def _comparison_name(keys: Sequence[str]) -> str:
    """Our own keys in words; names of judges and sources are the user's and stay as they are."""
    match list(keys):
        case ["best_of", n]:
            return f"best of {n} of the baseline"
        case ["judges", name, *rest]:
            start = f"judge {name}"
        case [key, *rest]:
            start = _JUDGES.get(key, key.replace("_", " "))
        case _:
            return "judge"
    return ", ".join([start, *(f"source {key}" for key in rest if key != "by_source")])


def _find(
    root: RunFiles,
    chapters: Mapping[str, RunFiles],
    key: str,
    *last: tuple[str, str],
    first: tuple[str, str] | None = None,
) -> float:
    """A number of the summaries (a dot enters a mapping), else of (stage, metric): its `last` or `first` row."""
    for summary in (root.summary, *(run.summary for run in reversed(list(chapters.values())))):
        value: Any = summary
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if math.isfinite(number(value)):
            return number(value)
    for stage, name in last:
        run = chapters.get(stage)
        for value in (number(run.summary.get(name)), last_finite(run.metrics, name)) if run else ():
            if math.isfinite(value):
                return value
    if first and first[0] in chapters:
        return last_finite(chapters[first[0]].metrics[:1], first[1])
    return math.nan
