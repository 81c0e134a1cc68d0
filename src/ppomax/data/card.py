"""The data card of a run: what was read, dropped, repeated and split, and how long it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppomax.data.readers import ReadReport, prompt_key
from ppomax.types import Dialogue, Pair, Prompt

BARS = 24

Rows = Sequence[Prompt] | Sequence[Dialogue] | Sequence[Pair]


@dataclass(frozen=True)
class Part:
    """One side of a split: its rows, and the tokens of each sequence that is read for them."""

    rows: Rows
    lengths: Sequence[int]


def data_card(
    report: ReadReport, parts: Mapping[str, Part], *, fitted: str, shared: int = 0, learnt_too: int = 0
) -> dict[str, Any]:
    """The content of data.json.

    fitted: what became of rows that were too long. shared: rows left out because a held-out row has their prompt.
    learnt_too: `heldout_learnt_too`.
    """
    rows = [row for part in parts.values() for row in part.rows]
    prompts = Counter(row.key for row in rows)
    contents = Counter(_content(row) for row in rows)
    return {
        "read": report.read,
        "kept": report.kept,
        "dropped": _reasons(report.dropped, report.first),
        "changed": _reasons(report.noted, report.first),
        "fitted": fitted,
        "share_a_heldout_prompt": shared,
        "heldout_learnt_too": learnt_too,
        "prompts": len(prompts),
        "repeated_rows": len(rows) - len(contents),
        "largest_prompt_group": max(prompts.values(), default=0),
        "sources": _sources(rows),
        "parts": {name: _part(part) for name, part in parts.items() if part.rows},
    }


def heldout_learnt_too(learn: Sequence[Dialogue], held: Sequence[Dialogue]) -> int:
    """How many held-out dialogues have a turn of which the answer is learnt, whole or in another wording: one dialogue
    that stands in the data cut at several turns, or two that begin with the same question."""
    learnt = {key for dialogue in learn for key in _asked(dialogue)} if held else set()
    return sum(not learnt.isdisjoint(_asked(dialogue)) for dialogue in held)


def _asked(dialogue: Dialogue) -> list[str]:
    """The keys of what stands before each answer that is learnt."""
    turns = enumerate(dialogue.messages)
    answers = [i for i, message in turns if message["role"] == "assistant" and message.get("learnt", True)]
    return [prompt_key(dialogue.messages[:i]) for i in answers]


def _part(part: Part) -> dict[str, Any]:
    return {"rows": len(part.rows), "prompts": len({row.key for row in part.rows}), "tokens": lengths(part.lengths)}


def lengths(values: Sequence[int]) -> dict[str, Any]:
    """Sum, quantiles and histogram of token counts; empty for none."""
    if not values:
        return {}
    counts, edges = np.histogram(values, bins=min(BARS, max(values)), range=(0, max(values)))
    median, high = np.quantile(values, (0.5, 0.95))
    return {
        "total": sum(values), "median": float(median), "p95": float(high), "longest": max(values),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }  # fmt: skip


def _sources(rows: Sequence[Prompt | Dialogue | Pair]) -> dict[str, dict[str, Any]]:
    by_source: dict[str, list[Prompt | Dialogue | Pair]] = {}
    for row in rows:
        by_source.setdefault(row.source, []).append(row)
    return {
        source: {
            "rows": len(its), "prompts": len({row.key for row in its}), "weights": sorted({row.weight for row in its})
        }
        for source, its in sorted(by_source.items())
    }  # fmt: skip


def _content(row: Prompt | Dialogue | Pair) -> tuple[str, ...]:
    """What two rows must share to be the same row."""
    if isinstance(row, Pair):
        return (row.key, row.chosen.strip(), row.rejected.strip())
    if isinstance(row, Dialogue) and row.text is None:
        return (row.key, row.messages[-1]["content"].strip())
    return (row.key,)


def _reasons(counts: Mapping[str, int], first: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    return {reason: {"rows": count, "first": first[reason]} for reason, count in counts.items()}
