"""From a score per response to a reward per token, in this order and no other.

weighted sum of scores -> `Moments.update` with the current batch -> `normalise_and_clip` -> penalties
-> `token_rewards`: score on the last token, plus dense rewards, minus eta times the token KL.

Scores, rewards and penalties share one unit once normalised: standard deviations of the score history. Two more tricks
stand beside this: `scale_rewards` on the token rewards, and `normalise_advantages` after the returns are taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ppomax.rl.arguments import (
    expect_mask,
    expect_not_negative,
    expect_positive,
    expect_shape,
    expect_unit_interval,
    expect_vector,
)
from ppomax.rl.kl import k1
from ppomax.rl.masked import whiten, zero_masked
from ppomax.rl.returns import discounted_sums, last_token


@dataclass(frozen=True)
class Moments:
    """Running count, mean and sum of squared deviations (m2) of every score so far; plain floats, exact in JSON."""

    count: float = 0.0
    mean: float = 0.0
    m2: float = 0.0

    def __post_init__(self) -> None:
        expect_not_negative(count=self.count, m2=self.m2)
        if not math.isfinite(self.mean):
            raise ValueError(f"mean: found {self.mean}, expected a finite number")

    @property
    def std(self) -> float:
        """Biased (population) standard deviation, sqrt(m2 / count); 0 without scores."""
        return math.sqrt(self.m2 / self.count) if self.count else 0.0

    @property
    def varies(self) -> bool:
        """Whether the std is more than the float32 rounding of the mean: below that, dividing by it makes noise."""
        float32 = torch.finfo(torch.float32)
        return self.std > max(float32.eps * abs(self.mean), float32.tiny)  # a smaller one is 0 in float32

    def update(self, values: Sequence[float]) -> Moments:
        """The moments with `values` included."""
        _expect_finite_each("values", values)
        if len(values) == 0:
            return self
        mean = math.fsum(values) / len(values)
        m2 = math.fsum((value - mean) ** 2 for value in values)
        return self.merge(Moments(float(len(values)), mean, m2))

    def merge(self, other: Moments) -> Moments:
        """The moments of both histories together. Source: Chan, Golub & LeVeque (1983)."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * other.count / count
        return Moments(count, mean, self.m2 + other.m2 + delta * delta * self.count * other.count / count)

    def to_dict(self) -> dict[str, float]:
        """For JSON; `from_dict` gives back an equal value."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, float]) -> Moments:
        """The moments that `to_dict` wrote."""
        expected = {f.name for f in fields(cls)}
        if set(saved) != expected:
            raise ValueError(f"saved: found keys {sorted(saved)}, expected {sorted(expected)}")
        return cls(**{name: float(value) for name, value in saved.items()})


def normalise_and_clip(score_B: Float[Tensor, " B"], moments: Moments, *, clip: float | None) -> Float[Tensor, " B"]:
    """Scores in standard deviations of the whole history, clipped.

        clip((score - mean) / std, -delta, delta)

    `moments` include the current batch; `clip` is delta, None means no clipping. There is no epsilon: where nothing can
    be said (fewer than two scores, or a std that is only the float32 rounding of the mean) every score becomes 0.
    Source: "Secrets of RLHF I", eq. 18.
    """
    expect_positive(clip=clip)
    if not moments.varies:
        return torch.zeros_like(score_B)
    normal_B = (score_B - moments.mean) / moments.std
    return normal_B if clip is None else normal_B.clamp(-clip, clip)


def update_by_source(
    moments: Mapping[str, Moments], scores: Sequence[float], sources: Sequence[str]
) -> dict[str, Moments]:
    """The moments of each source with its own `scores` included; `sources` names the source of each score.

    A source that is new starts an empty history; one without scores in this batch keeps the moments it has.
    """
    _expect_sources(sources, len(scores))
    _expect_finite_each("scores", scores)
    updated = dict(moments)
    for source in dict.fromkeys(sources):
        own = [score for score, name in zip(scores, sources, strict=True) if name == source]
        updated[source] = updated.get(source, Moments()).update(own)
    return updated


def normalise_by_source(
    score_B: Float[Tensor, " B"], sources: Sequence[str], moments: Mapping[str, Moments], *, clip: float | None
) -> Float[Tensor, " B"]:
    """`normalise_and_clip`, each score by the history of its own source: easy and hard prompts then weigh the same.

    `moments` include the current batch (`update_by_source`). Two sources keep no common unit: only how a score compares
    with others of its own source is left.
    """
    expect_vector(score_B=score_B)
    _expect_sources(sources, len(score_B))
    normal_B = torch.zeros_like(score_B)
    for source in dict.fromkeys(sources):
        if source not in moments:
            raise ValueError(f"moments: found only {sorted(moments)}, expected those of source {source!r} too")
        own_B = torch.tensor([name == source for name in sources], device=score_B.device)
        normal_B = torch.where(own_B, normalise_and_clip(score_B, moments[source], clip=clip), normal_B)
    return normal_B


def missing_eos_penalty(truncated_B: Bool[Tensor, " B"], *, penalty: float) -> Float[Tensor, " B"]:
    """-penalty for each response that the length limit cut before an eos, else 0: add it to the clipped scores."""
    expect_mask(truncated_B, axes=1, name="truncated_B")
    expect_not_negative(penalty=penalty)
    return torch.where(truncated_B, -float(penalty), 0.0)


def length_penalty(length_B: Int[Tensor, " B"], *, coefficient: float, free: float) -> Float[Tensor, " B"]:
    """A price on each token beyond the first `free` ones: add it to the clipped scores.

        -coefficient * max(0, length - free)

    `length_B` counts response tokens; `coefficient` is in units of the shaped score per token.
    """
    expect_vector(length_B=length_B)
    expect_not_negative(coefficient=coefficient, free=free)
    return -coefficient * (length_B - free).clamp(min=0).to(torch.float32)


def place_on_last_token(score_B: Float[Tensor, " B"], mask: Bool[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """The score at each row's last counted token, 0 elsewhere. A row with no counted token: all 0."""
    expect_mask(mask, axes=2)
    expect_shape(mask.shape[:1], score_B=score_B)
    return zero_masked(score_B[:, None].expand(mask.shape), last_token(mask))


def token_rewards(
    score_B: Float[Tensor, " B"],
    old_logprobs: Float[Tensor, "B R"],
    reference_logprobs: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    *,
    kl_coefficient: float,
    dense: Float[Tensor, "B R"] | None = None,
    kl: Float[Tensor, "B R"] | None = None,
) -> Float[Tensor, "B R"]:
    """What RL sees at each token.

        r_t = [t = last] * score + dense_t - eta * KL_t,  KL_t = log pi_old(a_t) - log pi_ref(a_t)

    `kl_coefficient` is eta; KL_t (nats, detached) is k1 at the sampled token unless `kl` gives another estimate. Masked
    entries return 0. A truncated row that is bootstrapped must come with score 0.
    Source: "Secrets of RLHF I", total reward, per token.
    """
    expect_mask(mask, axes=2)
    expect_shape(mask.shape, old_logprobs=old_logprobs, reference_logprobs=reference_logprobs, dense=dense, kl=kl)
    expect_not_negative(kl_coefficient=kl_coefficient)
    kl = k1(old_logprobs, reference_logprobs) if kl is None else kl
    rewards = place_on_last_token(score_B, mask) - kl_coefficient * kl.detach()
    return zero_masked(rewards if dense is None else rewards + dense, mask)


def rolling_returns(rewards: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], *, gamma: float) -> Float[Tensor, "B R"]:
    """Discounted sums of the rewards so far, forwards from the start of each response: for reward scaling only.

        R_t = gamma * R_{t-1} + r_t,  R = 0 before the first token

    Not the return of any state. Masked entries return 0. Source: Engstrom et al. (2020), arXiv 2005.12729, section 2.
    """
    expect_mask(mask, axes=2)
    expect_shape(mask.shape, rewards=rewards)
    expect_unit_interval(gamma=gamma)
    backwards = zero_masked(rewards, mask).flip(1)
    return zero_masked(discounted_sums(backwards, factor=gamma).flip(1), mask)


def scale_rewards(rewards: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], moments: Moments) -> Float[Tensor, "B R"]:
    """Token rewards divided by the standard deviation of all rolling returns so far; no mean is subtracted.

        r_t / std

    `moments` are those of `rolling_returns` at counted tokens, the current batch included. Where they do not vary
    (`Moments.varies`) the rewards stay as they are. Masked entries return 0.
    Source: "Secrets of RLHF I", reward scaling; Engstrom et al. (2020), arXiv 2005.12729, section 2.
    """
    expect_mask(mask, axes=2)
    expect_shape(mask.shape, rewards=rewards)
    return zero_masked(rewards / moments.std if moments.varies else rewards, mask)


def normalise_advantages(
    advantages: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], *, eps: float, clip: float | None = None
) -> Float[Tensor, "B R"]:
    """Advantages whitened over the counted tokens of the whole minibatch, then clipped.

        clip((A - mean) / sqrt(var + eps), -c, c)

    `clip` is c, in standard deviations; None means no clipping. Take `lambda_returns` before this, not after.
    Source: "Secrets of RLHF I", advantage normalisation and clipping.
    """
    expect_positive(clip=clip)
    whitened = whiten(advantages, mask, eps=eps)
    return whitened if clip is None else whitened.clamp(-clip, clip)


def _expect_finite_each(name: str, values: Sequence[float]) -> None:
    for i, value in enumerate(values):
        if not math.isfinite(value):
            raise ValueError(f"{name}[{i}]: found {value}, expected a finite score")


def _expect_sources(sources: Sequence[str], scores: int) -> None:
    if len(sources) != scores:
        raise ValueError(f"sources: found {len(sources)} names, expected one for each of {scores} scores")
