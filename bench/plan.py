"""Who runs what in `make bench`. No torch here: a process that only starts others should stay small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PRECISIONS = ("float32", "autocast", "bfloat16")
# Ours beside each of TRL's: in bfloat16 ppomax computes in it and keeps float32 masters, as autocast does.
OUR_PRECISION = {"float32": "float32", "autocast": "bfloat16", "bfloat16": "bfloat16"}
LORA_TOKENS = 512
LAYOUTS = {
    "lora": f"low-rank adapters, on a processor {LORA_TOKENS} tokens at once", "trunk": "the upper third of the layers",
}  # fmt: skip
FIXED_WORDS, REALISTIC_TOKENS, MINIBATCHES = (8, 40), 128, 4
SCALES, LONG_SCALE = (0.5, 2, 8), 32


@dataclass(frozen=True)
class Workload:
    """One batch of prompts, used whole in every iteration, and how long its responses may be."""

    name: str
    rows: int
    new_tokens: int
    minibatches: int = MINIBATCHES
    stops: bool = False

    def __str__(self) -> str:
        low, high = FIXED_WORDS
        if self.stops:
            return f"{self.rows} prompts of at most {REALISTIC_TOKENS} tokens, up to {self.new_tokens} new, stop at eos"
        return f"{self.rows} prompts of {low} to {high} words, {self.new_tokens} new tokens each, nothing stops early"

    def prompts(self, work: Path) -> Path:
        """Where its prompts are: a line of JSON each, with `prompt` (messages) and `ids`."""
        return work / f"{self.name}.jsonl"


@dataclass(frozen=True)
class Contender:
    """Who runs, in which precision; `layout` is what ppomax trains: full (everything), or one of LAYOUTS."""

    side: str
    precision: str
    layout: str = "full"

    def __str__(self) -> str:
        return f"{self.side} {self.precision}" + ("" if self.layout == "full" else f" {self.layout}")

    @property
    def rival(self) -> Contender:
        """Our side of the comparison."""
        return Contender("ppomax", OUR_PRECISION[self.precision])


def workloads(rows: int, new_tokens: int, scales: Sequence[float] = ()) -> dict[str, Workload]:
    """By name: fixed, realistic (room for twice `new_tokens`), and fixed at each scale: so many times the rows."""
    known = [Workload("fixed", rows, new_tokens), Workload("realistic", rows, 2 * new_tokens, stops=True)]
    for scale in scales:
        size, steps = int(rows * scale), int(MINIBATCHES * scale)
        known.append(Workload(f"{size * new_tokens} tokens", size, new_tokens, minibatches=steps))
    return {workload.name: workload for workload in known}


def contenders(precisions: Sequence[str], *, trl: bool, layouts: bool) -> list[Contender]:
    """Ours and theirs side by side for every precision; then ours in the layouts that train less."""
    pairs = [one for p in precisions for one in (Contender("TRL", p).rival, Contender("TRL", p))]
    ours = [one for one in dict.fromkeys(pairs) if one.side == "ppomax"]
    more = [Contender("ppomax", one.precision, layout) for one in ours for layout in LAYOUTS] if layouts else []
    return [*dict.fromkeys(pairs if trl else ours), *more]
