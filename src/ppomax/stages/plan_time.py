"""Floating-point operations of one PPO iteration, and the seconds that they take at a given speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ppomax.config.plan import PlanConfig
from ppomax.models.logprobs import chunk_rows
from ppomax.models.shapes import Shape
from ppomax.stages.plan_memory import Machine, Role, microbatch, rows_decoded, trains_a_part


@dataclass(frozen=True)
class Work:
    """What one iteration reads: rows, the tokens of a pass over all of them, response tokens, query-key pairs."""

    rows: int
    prompts: float
    prompt: int
    response: int
    tokens: float
    pairs: float

    @property
    def responses(self) -> int:
        """Response tokens."""
        return self.rows * self.response


def work(config: PlanConfig, machine: Machine) -> Work:
    """One rollout batch at the mean lengths; where passes are packed, equal prompts of a minibatch count once."""
    P = config.prompt_tokens or config.max_prompt_tokens
    R = config.response_tokens or config.sampling.max_new_tokens
    rows = config.rollout_batch
    prompts = rows / (config.samples_per_prompt if machine.packs else 1)
    if machine.packs:
        return Work(rows, prompts, P, R, prompts * P + rows * R, prompts * P * P + rows * R * (P + R))
    return Work(rows, prompts, P, R, rows * (P + R), rows * (P + R) ** 2 / 2)


def flops(roles: Sequence[Role], config: PlanConfig, machine: Machine) -> dict[str, float]:
    """Operations of all devices together, by phase of one iteration in which policy and critic learn.

    Forward: two a weight and token. Backward: four where weights learn, two where they only pass a gradient on.
    """
    read = work(config, machine)
    policy = roles[0].shape
    distinct = read.rows / config.samples_per_prompt
    decoded = read.rows * read.response
    prefill = distinct * (2 * read.prompt * policy.layers * policy.matrices + 2 * policy.embedding)
    seen = decoded * (read.prompt + read.response / 2) + distinct * read.prompt**2 / (1 if machine.packs else 2)
    steps = 2 * decoded * (policy.layers * policy.matrices + policy.vocabulary * policy.hidden)
    score = sum(_forward(role, read, config) for role in roles)
    again = sum(_forward(role, read, config) for role in roles if role.trained) * (config.buffer - 1)
    trunk = _stack(policy, _frozen_layers(policy, config), read.tokens, read.pairs)
    train = config.epochs * config.buffer * sum(_update(role, read, config, machine) for role in roles if role.trained)
    if config.ptx_weight is not None:
        train += config.epochs * config.buffer * _ptx(roles[0], read, config, machine)
    return {
        "generate": prefill + steps + policy.layers * _attention(policy) * seen,
        "score": score + again + trunk * config.buffer,
        "train": train,
    }


def seconds(
    roles: Sequence[Role], config: PlanConfig, machine: Machine, operations: dict[str, float], *, tflops: float,
    bandwidth: float | None,
) -> dict[str, float]:  # fmt: skip
    """By phase. Decoding takes as long as its operations or, if that is longer, as reading weights and cache."""
    found = {phase: count / (machine.count * tflops * 1e12) for phase, count in operations.items()}
    if bandwidth is not None:
        policy, read = roles[0].shape, work(config, machine)
        rows = math.ceil(config.rollout_batch / machine.count)
        rounds = math.ceil(rows / rows_decoded(config, machine))
        weights = policy.layers * policy.layer + policy.vocabulary * policy.hidden
        cached = rows * (read.prompt + read.response / 2) * policy.kv_elements
        moved = read.response * (rounds * weights + cached) * machine.compute
        found["generate"] = max(found["generate"], moved / (bandwidth * 1e9))
    return found


def _frozen_layers(shape: Shape, config: PlanConfig) -> int:
    return 0 if config.compute.train_layers is None else shape.layers - config.compute.train_layers


def _attention(shape: Shape) -> float:
    """Forward operations of one layer for one query-key pair: q·k, and its weight times v."""
    return 4.0 * shape.heads * shape.head_dim


def _stack(shape: Shape, layers: int, tokens: float, pairs: float) -> float:
    return layers * (2 * shape.matrices * tokens + _attention(shape) * pairs)


def _upper(role: Role, read: Work, config: PlanConfig) -> float:
    """Forward operations of the layers that are a player's own: all, or those above the common ones."""
    layers = role.shape.layers - (_frozen_layers(role.shape, config) if role.shares_trunk else 0)
    return _stack(role.shape, layers, read.tokens, read.pairs)


def _unembedding(shape: Shape, tokens: float) -> float:
    return 2.0 * shape.vocabulary * shape.hidden * tokens


def _forward(role: Role, read: Work, config: PlanConfig) -> float:
    return _upper(role, read, config) + (0 if role.scalar else _unembedding(role.shape, read.responses))


def _times(config: PlanConfig) -> int:
    """Training's operations as a multiple of a forward pass."""
    return (2 if config.compute.lora_rank is not None else 3) + int(config.compute.gradient_checkpointing)


def _vocabulary_times(policy: Shape, config: PlanConfig, machine: Machine) -> float:
    """A trained unembedding: logits, two gradients, logits again but for a microbatch's last chunk.

    A frozen one: logits and one gradient.
    """
    if trains_a_part(config):
        return 2
    return 4 - 1 / math.ceil(microbatch(config, machine).responses / chunk_rows(policy.vocabulary))


def _update(role: Role, read: Work, config: PlanConfig, machine: Machine) -> float:
    layers = _times(config) * _upper(role, read, config)
    if role.scalar:
        return layers
    return layers + _vocabulary_times(role.shape, config, machine) * _unembedding(role.shape, read.responses)


def _ptx(policy: Role, read: Work, config: PlanConfig, machine: Machine) -> float:
    """The LM loss on `ptx_batch` dialogues a step, taken to be as long as prompt and response."""
    steps = config.rollout_batch // config.minibatch
    rows = steps * (config.ptx_batch or config.minibatch)
    length = read.prompt + read.response
    tokens, pairs = rows * length, rows * length**2 / 2
    lower = _stack(policy.shape, _frozen_layers(policy.shape, config), tokens, pairs)
    upper = _stack(policy.shape, policy.shape.layers - _frozen_layers(policy.shape, config), tokens, pairs)
    vocabulary = _vocabulary_times(policy.shape, config, machine) * _unembedding(policy.shape, tokens)
    return lower + _times(config) * upper + vocabulary
