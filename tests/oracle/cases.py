"""Random ragged batches in plain Python, for comparing a tensor library with this package.

Every entry of a row is exactly a float32, so that a float32 and a float64 comparison see the same inputs and ties stay
ties. Spreads are either exactly 0 or well above the rounding of the mean: whether a near-constant set of scores counts
as constant is a matter of the arithmetic, not of the mathematics. (Whitening equal entries divides the
rounding of their mean by sqrt(eps): compare that in float64.)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, fields
from random import Random

DISCOUNTS = (0.0, 0.5, 0.9, 0.95, 1.0)
SCALES = (1e-3, 0.1, 1.0, 30.0)
SOURCES = ("helpful", "harmless", "other")
GROUP_IDS = (0, 1, 7, -3, 1_000_000_007)
MAX_ROWS = 6
MAX_LENGTH = 12

Rows = list[list[float]]


@dataclass(frozen=True)
class Case:
    """One batch of unpadded responses with everything that a formula of the contract may ask for.

    Per token (rows of floats, one row per response): `rewards`, `values`, `old_values`, `returns`, `advantages`,
    `logprobs`, `old_logprobs`, `behaviour_logprobs`, `reference_logprobs`, `entropies`, `kl` (never negative), `dense`.
    Per response: `bootstrap` (0 where not truncated), `truncated`, `scores`, `groups`, `sources`.
    Per pair, unrelated to the responses: `chosen`, `rejected`, `margins`, `pair_weights`. Over a vocabulary:
    `logits_p`, `logits_q`. `history`: scores of earlier batches by source. `losses`: a critic's past losses.
    """

    seed: int
    rewards: Rows
    values: Rows
    old_values: Rows
    returns: Rows
    advantages: Rows
    logprobs: Rows
    old_logprobs: Rows
    behaviour_logprobs: Rows
    reference_logprobs: Rows
    entropies: Rows
    kl: Rows
    dense: Rows
    bootstrap: list[float]
    truncated: list[bool]
    scores: list[float]
    groups: list[int]
    sources: list[str]
    history: dict[str, list[float]]
    chosen: list[float]
    rejected: list[float]
    margins: list[float]
    pair_weights: list[float]
    logits_p: list[float]
    logits_q: list[float]
    losses: list[float]
    gamma: float
    gae_lambda: float
    k: int
    eps: float
    clip_ratio: float
    dual_clip: float | None
    value_clip: float | None
    score_clip: float | None
    advantage_clip: float | None
    entropy_clip: float | None
    importance_cap: float
    kl_coefficient: float
    denom: float
    free_length: int

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.rewards]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class System:
    """A symmetric matrix with no negative eigenvalue, a right-hand side, and TRPO's numbers."""

    matrix: Rows
    gradient: list[float]
    max_kl: float
    damping: float
    iterations: int


@dataclass(frozen=True)
class Path:
    """One optimiser's run over a scalar parameter: its gradients, rates and schedule."""

    parameter: float
    gradients: list[float]
    rates: list[float]
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    peak: float
    total: int
    warmup: float
    floor: float
    shape: str


def f32(x: float) -> float:
    """The nearest float32."""
    return struct.unpack("f", struct.pack("f", x))[0]


def _numbers(random: Random, length: int) -> list[float]:
    """Gaussian numbers of one scale, zeros, one number repeated, or a few numbers with ties."""
    scale, kind = random.choice(SCALES), random.random()
    if kind < 0.1:
        return [0.0] * length
    if kind < 0.2:
        return [f32(random.gauss(0, scale))] * length
    if kind < 0.4:
        pool = [f32(x * scale) for x in (-1.0, -0.5, 0.0, 0.5, 1.0)]
        return [random.choice(pool) for _ in range(length)]
    shift = random.choice((0.0, 0.0, 3.0, -3.0)) * scale
    return [f32(random.gauss(shift, scale)) for _ in range(length)]


def _rows(random: Random, lengths: list[int]) -> Rows:
    """`_numbers` cut into rows, so that scale and ties belong to the whole batch."""
    numbers = _numbers(random, sum(lengths))
    return [[numbers.pop() for _ in range(length)] for length in lengths]


def _near(random: Random, rows: Rows, spread: float, ceiling: float) -> Rows:
    """Each entry moved by at most `spread`, a fifth of them not at all, and none above `ceiling`."""

    def move(x: float) -> float:
        return x if random.random() < 0.2 else f32(min(ceiling, x + random.uniform(-spread, spread)))

    return [[move(x) for x in row] for row in rows]


def _lengths(random: Random) -> list[int]:
    return [0 if random.random() < 0.05 else random.randint(1, MAX_LENGTH) for _ in range(random.randint(1, MAX_ROWS))]


def _logprobs(random: Random, lengths: list[int]) -> dict[str, Rows]:
    """Four policies' log-probabilities of the same tokens, none above 0, up to 3 nats apart from `old`."""
    top = -1e-4
    old = [[f32(-random.expovariate(0.5) + top) for _ in range(n)] for n in lengths]
    spread = random.choice((0.0, 0.01, 0.3, 3.0))
    return {
        "old_logprobs": old,
        "logprobs": _near(random, old, spread, top),
        "behaviour_logprobs": _near(random, old, random.choice((0.01, 0.3, 3.0)), top),
        "reference_logprobs": _near(random, old, random.choice((0.01, 0.3, 3.0)), top),
    }


def _tokens(random: Random, lengths: list[int]) -> dict[str, Rows]:
    old_values = _rows(random, lengths)
    return {
        "rewards": _rows(random, lengths),
        "old_values": old_values,
        "values": _near(random, old_values, random.choice((0.1, 1.0)), float("inf")),
        "returns": _rows(random, lengths),
        "advantages": _rows(random, lengths),
        "entropies": [[f32(random.uniform(0, 6)) for _ in range(n)] for n in lengths],
        "kl": [[f32(random.expovariate(2)) for _ in range(n)] for n in lengths],
        "dense": _rows(random, lengths),
    }


def _responses(random: Random, rows: int) -> dict[str, object]:
    truncated = [random.random() < 0.3 for _ in range(rows)]
    pool = random.sample(GROUP_IDS, random.randint(1, 3))
    bootstrap = [f32(random.gauss(0, 1)) if cut else 0.0 for cut in truncated]
    history = {source: _numbers(random, random.choice((0, 1, 2, 5, 40))) for source in SOURCES if random.random() < 0.7}
    return {
        "truncated": truncated,
        "bootstrap": bootstrap,
        "scores": _numbers(random, rows),
        "groups": [random.choice(pool) for _ in range(rows)],
        "sources": [random.choice(SOURCES) for _ in range(rows)],
        "history": history,
    }


def _pairs(random: Random) -> dict[str, list[float]]:
    count = random.randint(1, 8)
    chosen = _numbers(random, count)
    return {
        "chosen": chosen,
        "rejected": [x if random.random() < 0.3 else y for x, y in zip(chosen, _numbers(random, count), strict=True)],
        "margins": [random.choice((0.0, 0.25, 1.0)) for _ in range(count)],
        "pair_weights": [f32(random.choice((1.0, 1 / 3, 1 / 6, 0.5))) for _ in range(count)],
    }


def _vocabulary(random: Random) -> dict[str, list[float]]:
    size = random.randint(1, 9)
    logits = [f32(random.gauss(random.choice((0, 50)), random.choice((0.0, 1.0, 10.0)))) for _ in range(size)]
    return {"logits_p": logits, "logits_q": _near(random, [logits], random.choice((0.0, 0.1, 5.0)), float("inf"))[0]}


def _coefficients(random: Random, tokens: int) -> dict[str, object]:
    return {
        "gamma": random.choice(DISCOUNTS),
        "gae_lambda": random.choice(DISCOUNTS),
        "k": random.choice((1, 1, 2, 3, 5, MAX_LENGTH, 100)),
        "eps": random.choice((1e-8, 1e-5)),
        "clip_ratio": random.choice((0.1, 0.2, 0.5)),
        "dual_clip": random.choice((None, 1.5, 3.0)),
        "value_clip": random.choice((None, 0.05, 0.2, 0.5)),
        "score_clip": random.choice((None, 0.3, 0.8, 5.0)),
        "advantage_clip": random.choice((None, 0.12, 0.5)),
        "entropy_clip": random.choice((None, 1.0, 10.0, 30.0)),
        "importance_cap": random.choice((0.5, 1.0, 2.0, 10.0)),
        "kl_coefficient": random.choice((0.0, 0.05, 0.2, 1.0)),
        "denom": float(random.choice((max(tokens, 1), max(tokens, 1), 1, 37))),
        "free_length": random.randint(0, MAX_LENGTH),
    }


def cases(count: int, seed: int) -> Iterator[Case]:
    """`count` cases; the i-th depends on (seed, i) only, and `Case.seed` is its i."""
    for i in range(count):
        random = Random(f"case {seed} {i}")
        lengths = _lengths(random)
        yield Case(
            seed=i,
            **_tokens(random, lengths),
            **_logprobs(random, lengths),
            **_responses(random, len(lengths)),
            **_pairs(random),
            **_vocabulary(random),
            losses=[f32(abs(random.gauss(1, 0.3)) * 0.9**step) for step in range(random.randint(0, 12))],
            **_coefficients(random, sum(lengths)),
        )


def systems(count: int, seed: int) -> Iterator[System]:
    """`count` systems G G^T x = g on a grid of eighths (exact in float32): full rank, deficient, zero, diagonal."""
    for i in range(count):
        random = Random(f"system {seed} {i}")
        n = random.randint(1, 6)
        rank = random.choice((n, n, n, max(n - 1, 0)))
        factor = [[random.randint(-16, 16) / 8 for _ in range(rank)] for _ in range(n)]
        matrix = [[sum(a * b for a, b in zip(x, y, strict=True)) for y in factor] for x in factor]
        matrix = [[float(x) for x in row] for row in matrix]
        gradient = [0.0 if random.random() < 0.1 else random.randint(-16, 16) / 8 for _ in range(n)]
        yield System(
            matrix=matrix,
            gradient=[0.0] * n if random.random() < 0.1 else gradient,
            max_kl=random.choice((1e-3, 0.01, 0.1)),
            damping=random.choice((0.0625, 0.125, 1.0)),
            iterations=random.randint(1, n),
        )


def paths(count: int, seed: int) -> Iterator[Path]:
    """`count` runs of AdamW and schedules."""
    for i in range(count):
        random = Random(f"path {seed} {i}")
        steps = random.randint(1, 20)
        yield Path(
            parameter=f32(random.gauss(0, 1)),
            gradients=[0.0 if random.random() < 0.1 else f32(random.gauss(0, 1)) for _ in range(steps)],
            rates=[random.choice((0.0, 1e-3, 1e-2, 0.1)) for _ in range(steps)],
            betas=random.choice(((0.9, 0.95), (0.9, 0.999), (0.0, 0.5))),
            eps=random.choice((1e-8, 1e-5)),
            weight_decay=random.choice((0.0, 0.01, 0.1)),
            peak=random.choice((1.0, 5e-7, 9.5e-6)),
            total=random.randint(2, 40),
            warmup=random.choice((0.0, 0.05, 0.1, 0.25, 0.5)),
            floor=random.choice((0.0, 0.1, 0.5)),
            shape=random.choice(("cosine", "linear", "constant")),
        )


TOKEN_FIELDS = tuple(field.name for field in fields(Case) if field.type == "Rows")
