"""Which samples a reader sees: spread over all qualities, not the best ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ppomax.monitor.run_files import number

_LONGEST = 1500


@dataclass(frozen=True)
class SamplePair:
    """A prompt with the answers of baseline (before) and policy (after); `notes_*` are their scores in words."""

    prompt: str
    before: str
    after: str
    notes_before: str
    notes_after: str


@dataclass(frozen=True)
class TrainingSample:
    """One answer sampled during training."""

    iteration: str
    prompt: str
    response: str
    notes: str


@dataclass(frozen=True)
class RankedPair:
    """A held-out pair of the reward model with its scores; `heading` says why it is shown."""

    heading: str
    prompt: str
    chosen: str
    rejected: str
    notes_chosen: str
    notes_rejected: str


_HEADINGS = {"wrong": "most wrong", "right": "surest of what is right", "close": "closest calls"}


def ranked_pairs(rows: Sequence[Mapping[str, Any]], *, each: int = 3) -> list[RankedPair]:
    """The first `each` pairs of every kind that the reward stage has written."""
    pairs = []
    for kind, heading in _HEADINGS.items():
        for row in [row for row in rows if row.get("kind") == kind and "chosen" in row and "rejected" in row][:each]:
            texts = (readable_prompt(row.get("prompt", "")), _shortened(row["chosen"]), _shortened(row["rejected"]))
            notes = (_notes(row, ((f"reward_{side}", "score"),)) for side in ("chosen", "rejected"))
            pairs.append(RankedPair(heading, *texts, *notes))
    return pairs


def chosen_pairs(
    rows: Sequence[Mapping[str, Any]], *, spread: int = 12, worst: int = 3
) -> tuple[list[SamplePair], list[SamplePair]]:
    """`spread` pairs at evenly spaced ranks of (after - before), and the `worst` ones among the others.

    Ranked by the gold score, by the reward model's where there is no gold score, else in file order.
    """
    usable = [row for row in rows if "before" in row and "after" in row]
    gains = [_gain(row) for row in usable]
    if not any(map(math.isfinite, gains)):
        ranked, worst = usable, 0
    else:
        known = [i for i, gain in enumerate(gains) if math.isfinite(gain)]
        ranked = [usable[i] for i in sorted(known, key=lambda i: gains[i])]
    lowest, rest = ranked[:worst], ranked[worst:]
    count = min(spread, len(rest))
    picked = [rest[int((i + 0.5) * len(rest) / count)] for i in range(count)]
    return [_pair(row) for row in picked], [_pair(row) for row in lowest]


def training_samples(rows: Sequence[Mapping[str, Any]], *, each: int = 3) -> list[TrainingSample]:
    """The first `each` samples of the first and of the last iteration that has any."""
    usable = [row for row in rows if "response" in row]
    if not usable:
        return []
    iterations = [row.get("iteration") for row in usable]
    ends = dict.fromkeys((iterations[0], iterations[-1]))
    picked = [row for end in ends for row in [r for r in usable if r.get("iteration") == end][:each]]
    return [
        TrainingSample(
            str(row.get("iteration", "")),
            readable_prompt(row.get("prompt", "")),
            _shortened(row["response"]),
            _notes(row, (("score", "score"), ("gold", "gold"))),
        )
        for row in picked
    ]


def readable_prompt(prompt: Any) -> str:
    """A prompt as text: a string as it is, messages as `role: content` lines, a single message without its role."""
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        turns = [turn for turn in prompt if isinstance(turn, Mapping)]
        if len(turns) == 1:
            return _shortened(turns[0].get("content", ""))
        return _shortened("\n".join(f"{turn.get('role', '?')}: {turn.get('content', '')}" for turn in turns))
    return _shortened(prompt)


def _gain(row: Mapping[str, Any]) -> float:
    gold = number(row.get("gold_after")) - number(row.get("gold_before"))
    return gold if math.isfinite(gold) else number(row.get("reward_after")) - number(row.get("reward_before"))


def _pair(row: Mapping[str, Any]) -> SamplePair:
    return SamplePair(
        readable_prompt(row.get("prompt", "")),
        _shortened(row["before"]),
        _shortened(row["after"]),
        _notes(row, (("gold_before", "gold"), ("reward_before", "reward model"))),
        _notes(row, (("gold_after", "gold"), ("reward_after", "reward model"))),
    )


def _notes(row: Mapping[str, Any], keys: Sequence[tuple[str, str]]) -> str:
    known = [(label, number(row.get(key))) for key, label in keys]
    return ", ".join(f"{label} {value:.2f}" for label, value in known if math.isfinite(value))


def _shortened(text: Any) -> str:
    whole = str(text)
    return whole if len(whole) <= _LONGEST else whole[:_LONGEST] + " \u2026"
