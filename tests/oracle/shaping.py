"""From scores to token rewards: history moments, normalise and clip, penalties, KL, reward scaling.

A history is the plain list of all numbers ever seen: its moments are computed anew from all of it, never updated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .kl import k1
from .masked import Row, mean, place_on_last_token, squared_deviations


class Moments(NamedTuple):
    """Number, mean and sum of squared deviations of a history; the standard deviation is biased (trap 16)."""

    count: int
    mean: float
    m2: float

    @property
    def std(self) -> float:
        return math.sqrt(self.m2 / self.count) if self.count else 0.0


def moments(history: Row) -> Moments:
    """count = n, mean = sum x / n, m2 = sum (x - mean)^2, over all scores ever seen, the current batch included."""
    return Moments(len(history), mean(history), squared_deviations(history))


def normalise_and_clip(scores: Row, history: Row, *, clip: float | None) -> list[float]:
    """clip((score - mean) / std, -delta, delta); 0 where the history has fewer than two scores or no spread.

    Source: "Secrets of RLHF I", eq. 18. No epsilon: it would change small deviations (trap 16).
    """
    seen, limit = moments(history), math.inf if clip is None else clip
    if seen.count < 2 or seen.std == 0:
        return [0.0] * len(scores)
    return [min(max((x - seen.mean) / seen.std, -limit), limit) for x in scores]


def update_by_source(histories: Mapping[str, Row], scores: Row, sources: Sequence[str]) -> dict[str, list[float]]:
    """The histories with each score appended to that of its own source; new sources begin a history."""
    longer = {source: list(history) for source, history in histories.items()}
    for score, source in zip(scores, sources, strict=True):
        longer.setdefault(source, []).append(score)
    return longer


def normalise_by_source(
    scores: Row, sources: Sequence[str], histories: Mapping[str, Row], *, clip: float | None
) -> list[float]:
    """eq. 18 with each score against the history of its own source (an unknown source: KeyError)."""
    return [
        normalise_and_clip([score], histories[source], clip=clip)[0]
        for score, source in zip(scores, sources, strict=True)
    ]


def missing_eos_penalty(truncated: Sequence[bool], *, penalty: float) -> list[float]:
    """-penalty for a response that did not end by itself, 0 for one that did; added to the shaped score."""
    return [-penalty if cut else 0.0 for cut in truncated]


def length_penalty(lengths: Sequence[int], *, coefficient: float, free: int) -> list[float]:
    """-coefficient max(0, length - free), in units of the shaped score."""
    return [-coefficient * (length - free) if length > free else 0.0 for length in lengths]


def token_rewards(
    score: float, old_logprobs: Row, reference_logprobs: Row, *, kl_coefficient: float, dense: Row | None = None
) -> list[float]:
    """r_t = [t = last] score + dense_t - eta (log pi_old,t - log pi_ref,t).

    Source: "Secrets of RLHF I", r_total; the KL is estimated at each sampled token (k1), detached.
    """
    pairs = list(zip(old_logprobs, reference_logprobs, strict=True))
    placed = place_on_last_token(score, len(pairs))
    extra = dense if dense is not None else [0.0] * len(pairs)
    return [placed[t] + extra[t] - kl_coefficient * k1(*pair) for t, pair in enumerate(pairs)]


def rolling_returns(rewards: Row, *, gamma: float) -> list[float]:
    """R_t = sum_{j <= t} gamma^{t-j} r_j, from the start of the response: forward, not rewards-to-go.

    Source: Engstrom et al. 2020 (arXiv 2005.12729), reward scaling; "Secrets of RLHF I", section 5.3.1.
    """
    return [math.fsum(gamma ** (t - j) * rewards[j] for j in range(t + 1)) for t in range(len(rewards))]


def scale_rewards(rewards: Row, history: Row) -> list[float]:
    """r_t / std of all rolling returns ever seen, no mean subtracted; unchanged where it is 0. Source: as above."""
    scale = moments(history).std
    return [r / scale for r in rewards] if scale else list(rewards)
