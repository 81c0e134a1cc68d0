"""Preference pairs for a reward model: read, split by prompt, tokenised, and described in a data card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ppomax.config import RewardConfig
from ppomax.data.card import Part, data_card
from ppomax.data.readers import read_pairs
from ppomax.data.split import by_weight, split_by_key
from ppomax.stages.inputs import RankedTokens, ranked_tokens, required
from ppomax.types import DataError, Pair


@dataclass(frozen=True)
class RewardRows:
    """Prompts with their ranked responses. `learn` is one epoch: rows of heavy files stand in it several times.

    heldout: watched during training. test: looked at once, at the end; empty unless it was asked for.
    """

    learn: list[RankedTokens]
    heldout: list[RankedTokens]
    test: list[RankedTokens]
    report: str
    card: dict[str, Any]

    @property
    def judged(self) -> list[RankedTokens]:
        """The rows that the final numbers come from."""
        return self.test or self.heldout

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt + response."""
        return max(max(_lengths(rows)) for rows in (self.learn, self.heldout, self.test) if rows)


def reward_rows(config: RewardConfig, tokenizer: Any) -> RewardRows:
    """The pairs of a configuration, no prompt on two sides."""
    pairs, report = read_pairs(required(config.data, "data", "preference pairs"), tokenizer)
    said, held, shared = str(report), [], 0
    if config.heldout_data:
        held, held_report = read_pairs(list(config.heldout_data), tokenizer)
        pairs, shared = _without(held, pairs)
        said += f"; held out: {held_report}; {shared} pairs share a held-out prompt"
    test: list[Pair] = []
    if config.test:
        pairs, test = split_by_key(pairs, config.test, config.seed, purpose="test:")
    if config.heldout and not config.heldout_data:
        pairs, held = split_by_key(pairs, config.heldout, config.seed)
    parts = {"learn": pairs, "heldout": held, "test": test}
    watched = "pairs of heldout_data" if config.heldout_data else "pairs that heldout sets aside"
    what = {"learn": "pairs", "heldout": watched, "test": "pairs that test sets aside"}
    tokens = {
        name: ranked_tokens(tokenizer, part, config.max_length, what=what[name]) if part else ([], "")
        for name, part in parts.items()
    }
    fitted = "; ".join(f"{name}: {cut}" for name, (_, cut) in tokens.items() if cut)
    described = {name: Part(part, _lengths(tokens[name][0])) for name, part in parts.items()}
    card = data_card(report, described, fitted=fitted, shared=shared)
    learn, heldout, tested = (rows for rows, _ in tokens.values())
    return RewardRows(by_weight(learn, config.seed), heldout, tested, f"{said}; {tokens['learn'][1]}", card)


def _without(held: Sequence[Pair], pairs: Sequence[Pair]) -> tuple[list[Pair], int]:
    """The pairs that share no prompt with `held`, and how many do."""
    keys = {pair.key for pair in held}
    learn = [pair for pair in pairs if pair.key not in keys]
    if not learn:
        raise DataError(
            f"data: each of the {len(pairs)} pairs shares its prompt with heldout_data, so none is left to learn; "
            "give other held-out pairs"
        )
    return learn, len(pairs) - len(learn)


def _lengths(rows: Sequence[RankedTokens]) -> list[int]:
    return [len(row.prompt) + len(response) for row in rows for response in row.responses]
