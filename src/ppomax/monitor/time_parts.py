"""The seconds of iterations by their innermost parts, with a colour for each, ready to be drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppomax.monitor.plots import BLUE, GREEN, GREY, PURPLE, shades
from ppomax.monitor.run_files import series

# The outer parts in their order, and the order of what is in them; reward terms have names of their own.
GROUPS = {
    "generate": (BLUE, ("prefill", "decode")),
    "score": (GREEN, ("trunk", "policy", "reference", "critic")),
    "train": (PURPLE, ("policy", "critic", "ptx", "step")),
}
# Parts below this share of the whole time are drawn with the rest of their group.
TINY = 0.01


def time_parts(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, Sequence[float], str]]:
    """(label, seconds of every row, colour): together they are the whole time; rows that lack a part count 0."""
    names = {key.removeprefix("seconds/") for row in rows for key in row if key.startswith("seconds/")}
    spent = {name: np.nan_to_num(np.array(series(rows, f"seconds/{name}"))) for name in names - {"total"}}
    outer = [*GROUPS, *sorted(name for name in spent if "/" not in name and name not in GROUPS)]
    whole = sum(spent[name].sum() for name in outer if name in spent)
    parts: list[tuple[str, Sequence[float], str]] = []
    for group in (name for name in outer if name in spent):
        colour, order = GROUPS.get(group, (GREY, ()))
        inner = {name.partition("/")[2]: x for name, x in spent.items() if name.startswith(f"{group}/")}
        large = [name for name, x in inner.items() if name != "other" and x.sum() > TINY * whole]
        large.sort(key=lambda name: (order.index(name) if name in order else len(order), name))
        drawn = {f"{group}: {name}": inner[name] for name in large}
        drawn[f"{group}: rest" if inner else group] = spent[group] - sum(drawn.values())
        colours = shades(colour, len(drawn))
        parts += [(label, x.tolist(), c) for (label, x), c in zip(drawn.items(), colours, strict=True)]
    return parts
