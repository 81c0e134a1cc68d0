"""What is written down about a trained reward model: its held-out pairs in numbers, and the notable ones in full."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ppomax.engine.durable import disk_errors
from ppomax.models.players import Scalar, at_responses
from ppomax.monitor.log import append_samples
from ppomax.monitor.preferences import JudgedPair, agreement, notable, summary_of
from ppomax.stages.inputs import RankedTokens
from ppomax.types import token_batch

EACH = 6

Scores = Sequence[Sequence[tuple[float, float]]]


def heldout_summary(rows: Sequence[RankedTokens], scores: Scores, other: tuple[str, Scores] | None) -> dict[str, Any]:
    """What summary.json says of the held-out pairs. `other`: a second reward model's name and scores, for agreement."""
    judged = judged_pairs(rows, scores)
    if other is None:
        return summary_of(judged)
    name, theirs = other[0], judged_pairs(rows, other[1])
    agreed = agreement(judged, theirs)
    compared = {"model": name, "agreement": agreed, "accuracy": summary_of(theirs)["accuracy"]}
    return {**summary_of(judged, agreed=agreed), "compared_with": compared}


def judged_pairs(rows: Sequence[RankedTokens], scores: Scores) -> list[JudgedPair]:
    """All pairs of all prompts, in their order."""
    return [
        JudgedPair(chosen, rejected, len(row.responses[better]), len(row.responses[worse]), row.source, number)
        for number, (row, of_row) in enumerate(zip(rows, scores, strict=True))
        for (better, worse), (chosen, rejected) in zip(row.pairs, of_row, strict=True)
    ]


def sample_rows(
    model: Scalar, rows: Sequence[RankedTokens], scores: Scores, tokenizer: Any, *, step: int
) -> list[dict[str, Any]]:
    """Rows of samples.jsonl: the most wrong, the surest and the closest held-out pairs, scored token by token."""
    judged = judged_pairs(rows, scores)
    places = [(row, better, worse) for row in rows for better, worse in row.pairs]
    written = []
    for kind, indices in notable(judged, EACH).items():
        for i in indices:
            row, better, worse = places[i]
            chosen, rejected = _along(model, row, (better, worse))
            written.append({
                "step": step, "kind": kind, "source": row.source, "prompt": list(row.messages),
                "chosen": _text(tokenizer, row.responses[better]), "rejected": _text(tokenizer, row.responses[worse]),
                "reward_chosen": judged[i].score_chosen, "reward_rejected": judged[i].score_rejected,
                "along_chosen": chosen, "along_rejected": rejected,
            })  # fmt: skip
    return written


def write_samples(path: Path, written: Sequence[dict[str, Any]]) -> None:
    """samples.jsonl anew."""
    with disk_errors(path):
        path.unlink(missing_ok=True)
        append_samples(path, written)


@torch.no_grad()
def _along(model: Scalar, row: RankedTokens, which: Sequence[int]) -> list[list[float]]:
    """The scalar at every token of the responses: what the score would be if they ended there."""
    responses = [row.responses[i] for i in which]
    batch = token_batch([row.prompt] * len(responses), responses, device=str(model.device))
    values_BR = at_responses(model(batch).values_BT, batch)
    return [values_BR[b, : len(response)].tolist() for b, response in enumerate(responses)]


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).strip()
