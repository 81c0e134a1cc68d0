"""From a score per response to a reward per token, in this order and no other.

weighted sum of scores -> `Moments.update` with the current batch -> `normalise_and_clip` -> penalties
-> `token_rewards`: score on the last token, plus dense rewards, minus eta times the token KL.

Scores, rewards and penalties share one unit once normalised: standard deviations of the score history.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppomax.rl.arguments import expect_mask, expect_not_negative, expect_positive, expect_shape
from ppomax.rl.kl import k1
from ppomax.rl.masked import zero_masked
from ppomax.rl.returns import last_token


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

    def update(self, values: Sequence[float]) -> Moments:
        """The moments with `values` included."""
        for i, value in enumerate(values):
            if not math.isfinite(value):
                raise ValueError(f"values[{i}]: found {value}, expected a finite score")
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
    if moments.std <= torch.finfo(torch.float32).eps * abs(moments.mean):
        return torch.zeros_like(score_B)
    normal_B = (score_B - moments.mean) / moments.std
    return normal_B if clip is None else normal_B.clamp(-clip, clip)


def missing_eos_penalty(truncated_B: Bool[Tensor, " B"], *, penalty: float) -> Float[Tensor, " B"]:
    """-penalty for each response that the length limit cut before an eos, else 0: add it to the clipped scores."""
    expect_mask(truncated_B, axes=1, name="truncated_B")
    expect_not_negative(penalty=penalty)
    return torch.where(truncated_B, -float(penalty), 0.0)


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
) -> Float[Tensor, "B R"]:
    """What RL sees at each token.

        r_t = [t = last] * score + dense_t - eta * KL_t,  KL_t = log pi_old(a_t) - log pi_ref(a_t)

    `kl_coefficient` is eta; KL_t (k1 at the sampled token, nats) is detached. Masked entries return 0. A truncated row
    that is bootstrapped must come with score 0. Source: "Secrets of RLHF I", total reward, per token.
    """
    expect_mask(mask, axes=2)
    expect_shape(mask.shape, old_logprobs=old_logprobs, reference_logprobs=reference_logprobs, dense=dense)
    expect_not_negative(kl_coefficient=kl_coefficient)
    rewards = place_on_last_token(score_B, mask) - kl_coefficient * k1(old_logprobs, reference_logprobs).detach()
    return zero_masked(rewards if dense is None else rewards + dense, mask)
