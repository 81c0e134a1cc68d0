"""A run's data card (data.json) as the rows of a table and a picture of the lengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ppomax.monitor.plots import histogram_bars

_PARTS = {"learn": "to learn from", "heldout": "held out", "test": "for the test", "prompts": "to answer"}


def card_rows(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, how many) of a data card, in words; empty for an empty card."""
    if not card:
        return []
    rows: list[tuple[str, str]] = [("rows read", f"{card['read']:,}, of which {card['kept']:,} kept")]
    for verb in ("dropped", "changed"):
        for reason, found in card[verb].items():
            rows.append((f"{verb}: {reason}", f"{found['rows']:,} (first {found['first']})"))
    rows.append(("lengths", card["fitted"]))
    if card["share_a_heldout_prompt"]:
        rows.append(("left out: prompt is held out too", f"{card['share_a_heldout_prompt']:,}"))
    if card.get("heldout_learnt_too"):
        rows.append(("held out, with an answer that is learnt too", f"{card['heldout_learnt_too']:,}"))
    groups = f"{card['prompts']:,}, at most {card['largest_prompt_group']:,} rows with the same"
    rows += [("different prompts", groups), ("rows that repeat another", f"{card['repeated_rows']:,}")]
    rows += [(f"source {name}", _source(found)) for name, found in card["sources"].items()]
    rows += [(_PARTS.get(name) or name, _part(found)) for name, found in card["parts"].items()]
    return rows


def length_picture(card: Mapping[str, Any], *, unit: str) -> str:
    """Histogram of the first part's token counts; "" without one."""
    part = next(iter(card.get("parts", {}).values()), {})
    histogram = part.get("tokens", {}).get("histogram", {"edges": [], "counts": []})
    return histogram_bars(histogram, xlabel=f"tokens of {unit}", ylabel="how many") if histogram["counts"] else ""


def _source(found: Mapping[str, Any]) -> str:
    weights = ", ".join(f"{weight:g}" for weight in found["weights"])
    weighed = "" if found["weights"] == [1.0] else f", weight {weights}"
    return f"{found['rows']:,} rows, {found['prompts']:,} prompts{weighed}"


def _part(found: Mapping[str, Any]) -> str:
    words = f"{found['rows']:,} rows, {found['prompts']:,} prompts"
    tokens = found["tokens"]
    if not tokens:
        return words
    return (
        f"{words}; {tokens['total']:,} tokens, median {tokens['median']:,.0f}, 95% below {tokens['p95']:,.0f}, "
        f"longest {tokens['longest']:,}"
    )
