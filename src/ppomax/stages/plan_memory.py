"""Bytes on one device, player by player and piece by piece; docs/planning.md has the same formulas in words.

Nothing here reads a weight. `plan_phases.py` adds the pieces up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ppomax.config.plan import PlanConfig
from ppomax.models.attention import LONGEST_FOLDED
from ppomax.models.logprobs import chunk_rows
from ppomax.models.shapes import Shape
from ppomax.rollout.sampler import PREFILL, cache_shape

FLOAT32 = 4


@dataclass(frozen=True)
class Role:
    """A player: its shape, whether it has a scalar head, whether it is trained, and whose frozen weights it may hold.

    shares_trunk: it reads the policy's ids, so that lower layers can be common. same_as: the player that it is equal
    to before training, or None.
    """

    name: str
    shape: Shape
    scalar: bool
    trained: bool
    shares_trunk: bool = True
    same_as: str | None = None

    @property
    def parameters(self) -> int:
        """All of its parameters."""
        return self.shape.scalar if self.scalar else self.shape.causal


@dataclass(frozen=True)
class Machine:
    """Devices, bytes of memory of each, bytes of a number in compute precision. packs: padding is not computed."""

    count: int
    memory: float
    compute: int
    packs: bool


@dataclass(frozen=True)
class Held:
    """Parameters that a player holds itself (not through another player), and those of them that are trained."""

    owned: int
    trained: int


@dataclass(frozen=True)
class Pass:
    """One microbatch of a device: rows, tokens in the linear layers, tokens of responses, and attention's blocks.

    keys: tokens of keys and values that the blocks hold; scores: query-key pairs whose weights are kept; pairs: all
    that are computed. alone: the minibatch is this one microbatch.
    """

    rows: float
    tokens: float
    responses: float
    keys: float
    scores: float
    pairs: float
    alone: bool


def held(role: Role, config: PlanConfig) -> Held:
    """What a player holds with `train_layers` and `lora_rank` as configured."""
    shape, upper, rank = role.shape, config.compute.train_layers, config.compute.lora_rank
    head = shape.hidden if role.scalar else 0
    below = 0 if upper is None else shape.embedding + (shape.layers - upper) * shape.layer
    adapters = 0 if rank is None else rank * shape.rank_one * (shape.layers if upper is None else upper)
    owned = role.parameters - (below if role.name != "policy" and role.shares_trunk else 0)
    if role.trained:
        if rank is not None:
            return Held(owned + adapters, adapters + head)
        return Held(owned, role.parameters if upper is None else upper * shape.layer + shape.rest + head)
    # Beside adapters, equal frozen tensors are the same objects; a scalar head is trained, hence the reward's own.
    return Held(head if rank is not None and role.same_as is not None else owned, 0)


def microbatch(config: PlanConfig, machine: Machine) -> Pass:
    """The largest microbatch of responses at the length limit, prompts at theirs."""
    P, R, budget = config.max_prompt_tokens, config.sampling.max_new_tokens, config.compute.tokens_per_microbatch
    rows = math.ceil(config.minibatch / machine.count)
    per_prompt = min(config.samples_per_prompt, rows) if machine.packs else 1
    whole = math.ceil(rows / per_prompt) * P + rows * R
    tokens = float(max(P + R, min(budget, whole)))
    group = P + per_prompt * R
    prompts = max(tokens / group, 1.0)
    rows_here = prompts * per_prompt if tokens >= group else (tokens - P) / R
    alone = whole <= tokens
    if not machine.packs:
        return Pass(rows_here, tokens, rows_here * R, tokens, 0.0, rows_here * (P + R) ** 2 / 2, alone)
    of_prompts, of_responses = prompts * P * P, rows_here * R * (P + R)
    scores = (of_prompts if P <= LONGEST_FOLDED else 0.0) + (of_responses if P + R <= LONGEST_FOLDED else 0.0)
    keys = prompts * P + rows_here * (P + R)
    return Pass(rows_here, tokens, rows_here * R, keys, scores, of_prompts + of_responses, alone)


def layer_activations(shape: Shape, part: Pass, compute: int, *, adapters: bool = False) -> float:
    """Bytes that one decoder layer keeps of a microbatch for its backward pass.

    Two norms: input (float32), normalised (where the gain is trained), output; queries, keys, values, attention's
    output; four or two tensors of the MLP; on a processor also attention's weights (float32, and once more in a lower
    compute precision). `adapters`: they alone are trained; what is between their two matrices is made again.
    """
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = 2 * part.tokens * shape.hidden * (FLOAT32 + (1 if adapters else 2) * compute)
    attention = (2 * part.tokens * query + 2 * part.keys * kv) * compute
    weights = shape.heads * part.scores * (FLOAT32 + (compute if compute < FLOAT32 else 0))
    mlp = part.tokens * shape.intermediate * (4 if shape.gated else 2) * compute
    return norms + attention + weights + mlp


def forward_working(shape: Shape, part: Pass, compute: int) -> float:
    """Bytes that one layer needs in a pass without gradient, and drops: its MLP or its attention."""
    mlp = part.tokens * (3 * shape.intermediate + 2 * shape.hidden) * compute
    attention = 2 * shape.heads * part.scores * FLOAT32 + 3 * part.tokens * shape.heads * shape.head_dim * compute
    return max(mlp, attention)


def backward_working(shape: Shape, part: Pass, compute: int) -> float:
    """Bytes that one layer's backward pass needs beyond what it frees.

    The MLP: three gradients, when one activation is gone. Attention, when the MLP's activations are gone: the gradients
    of its weights and of what they are the softmax of.
    """
    mlp = 2 * part.tokens * shape.intermediate * compute
    freed = part.tokens * ((4 if shape.gated else 2) * shape.intermediate + 3 * shape.hidden) * compute
    return max(mlp, 2 * shape.heads * part.scores * FLOAT32 - freed)


def activations(role: Role, config: PlanConfig, machine: Machine) -> float:
    """Bytes that a trained player keeps of one microbatch, at the start of its backward pass."""
    part, shape, compute = microbatch(config, machine), role.shape, machine.compute
    layers = shape.layers if config.compute.train_layers is None else config.compute.train_layers
    layer = layer_activations(shape, part, compute, adapters=config.compute.lora_rank is not None)
    if config.compute.gradient_checkpointing:
        kept = layers * part.tokens * shape.hidden * compute + (layer if layers else 0.0)
    else:
        kept = layers * layer
    norm = part.tokens * shape.hidden * (FLOAT32 + 2 * compute)
    states = part.rows * _longest(config) * shape.hidden  # padded again; of them the responses' are picked, or read
    read = states * FLOAT32 if role.scalar else (states + part.responses * shape.hidden) * compute
    return kept + norm + read


def vocabulary_working(role: Role, config: PlanConfig, machine: Machine, *, trains: bool) -> float:
    """Bytes for chunks of float32 logits, and for the gradient of a trained unembedding."""
    if role.scalar:
        return 0.0
    V, tokens = role.shape.vocabulary, microbatch(config, machine).responses
    chunks = (_chunks_of_the_loss(config) if trains else 2) * FLOAT32 * _chunk(V, tokens)
    gradient = 0.0 if trains_a_part(config) or not trains else V * role.shape.hidden * (FLOAT32 + machine.compute)
    return chunks + gradient


def trains_a_part(config: PlanConfig) -> bool:
    """Upper layers or adapters alone: the unembedding and whatever else is frozen are shared."""
    return config.compute.train_layers is not None or config.compute.lora_rank is not None


def _chunks_of_the_loss(config: PlanConfig) -> int:
    """Chunks in memory at once: one that is computed, a copy of it, and what waits for the backward pass.

    An exact KL has the reference's chunk beside its own.
    """
    entropy = config.objective.entropy_weight is not None
    kl = config.kl.place == "loss" and config.kl.estimator == "full"
    return 2 + 2 * (entropy or kl) + (entropy and kl)


def _chunk(vocabulary: int, tokens: float) -> float:
    """Logits held at once, of so many tokens."""
    return vocabulary * min(tokens, chunk_rows(vocabulary))


def cache(role: Role, config: PlanConfig, machine: Machine) -> float:
    """Bytes of the key/value cache of the rows that one device decodes side by side."""
    rows, columns = _cache_shape(config, machine)
    return rows * columns * role.shape.kv_elements * machine.compute


def rows_decoded(config: PlanConfig, machine: Machine) -> int:
    """Rows side by side on one device."""
    return _cache_shape(config, machine)[0]


def _cache_shape(config: PlanConfig, machine: Machine) -> tuple[int, int]:
    sampling, sequences = config.sampling, math.ceil(config.rollout_batch / machine.count)
    return cache_shape(
        sequences, config.max_prompt_tokens, sampling.max_new_tokens, max_rows=sampling.max_rows,
        max_tokens=sampling.max_cache_tokens,
    )  # fmt: skip


def decode_working(role: Role, config: PlanConfig, machine: Machine) -> float:
    """Bytes of the sampler beside the cache: a pass over prompts with its cache, or the logits of a step's chunk."""
    shape, rows, compute = role.shape, rows_decoded(config, machine), machine.compute
    P = config.max_prompt_tokens
    prompts = min(math.ceil(rows / config.samples_per_prompt), max(PREFILL // P, 1))
    scores = prompts * P * P if machine.packs and P <= LONGEST_FOLDED else 0
    prefill = forward_working(shape, Pass(prompts, prompts * P, 0, 0, scores, 0, True), compute)
    prefill += prompts * P * shape.kv_elements * compute
    step = _chunk(shape.vocabulary, rows) * (FLOAT32 + (compute if compute < FLOAT32 else 0))
    # With a mask, transformers repeats grouped keys and values for every head, a layer at a time.
    if not machine.packs and shape.heads > shape.kv_heads:
        step += 2 * rows * _longest(config) * shape.heads * shape.head_dim * compute
    return max(prefill, step)


def trunk_states(policy: Role, config: PlanConfig, machine: Machine) -> float:
    """Bytes of the frozen lower layers' states, kept for a whole rollout batch."""
    if config.compute.train_layers is None:
        return 0.0
    rows = math.ceil(config.rollout_batch / machine.count) * config.buffer
    return rows * _longest(config) * policy.shape.hidden * machine.compute


@dataclass(frozen=True)
class Bytes:
    """One player on one device. gathered: the copy in compute precision that sharded masters are gathered into.
    host: what lies in the host's memory instead."""

    weights: float
    masters: float
    moments: float
    gradients: float
    gathered: float = 0.0
    activations: float = 0.0
    average: float = 0.0
    host: float = 0.0

    @property
    def always(self) -> float:
        """What is held in every phase."""
        return self.weights + self.masters + self.moments + self.average


def stays_whole(role: Role, config: PlanConfig) -> bool:
    """Whether zero3 leaves a player's frozen parameters undivided: those that it has in common with others (adapters,
    upper layers), and a reference whose whole distribution is read."""
    return trains_a_part(config) or (role.name == "reference" and config.kl.estimator == "full")


def player_bytes(role: Role, config: PlanConfig, machine: Machine, shard: str) -> Bytes:
    """One player's state on one device under `shard`: none, zero2 or zero3."""
    part, compute, W = held(role, config), machine.compute, machine.count
    kept = activations(role, config, machine) if role.trained else 0.0
    average = FLOAT32 * part.trained if config.ema is not None and role.name == "policy" else 0
    if shard == "none":
        masters = FLOAT32 * part.trained if compute < FLOAT32 else 0
        return Bytes(
            part.owned * compute, masters, 8 * part.trained, FLOAT32 * part.trained, 0.0, kept, average
        )  # fmt: skip
    whole = shard == "zero2" or stays_whole(role, config)
    frozen, spread = (part.owned - part.trained) * compute, part.trained if whole else role.parameters
    units = (2 * role.shape.layer + role.shape.embedding + role.shape.unembedding) * compute
    divided = Bytes(
        frozen if whole else frozen / W,
        FLOAT32 * part.trained / W, 8 * part.trained / W, FLOAT32 * part.trained / W,
        gathered=part.trained * compute if shard == "zero2" else min(units, spread * compute),
        activations=kept, average=average / W,
    )  # fmt: skip
    return _offloaded(divided, whole=whole) if config.compute.offload else divided


def _offloaded(found: Bytes, *, whole: bool) -> Bytes:
    """With all that is divided in the host's memory; frozen weights are, unless they stay whole."""
    weights = 0.0 if whole else found.weights
    moved = weights + found.masters + found.moments + found.gradients + found.average
    return replace(
        found, weights=found.weights - weights, masters=0.0, moments=0.0, gradients=0.0, average=0.0, host=moved
    )


def _longest(config: PlanConfig) -> int:
    return config.max_prompt_tokens + config.sampling.max_new_tokens
