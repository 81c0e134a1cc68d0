"""The phases of a run on one device: what is always held, plus what each adds at its worst moment."""

from __future__ import annotations

from collections.abc import Sequence

from ppomax.config.plan import PlanConfig
from ppomax.engine.checkpoint import FILE_BYTES
from ppomax.stages.plan_memory import (
    FLOAT32,
    Bytes,
    Machine,
    Role,
    backward_working,
    cache,
    decode_working,
    forward_working,
    held,
    microbatch,
    stays_whole,
    trunk_states,
    vocabulary_working,
)


def phases(
    roles: Sequence[Role], players: dict[str, Bytes], config: PlanConfig, machine: Machine, shard: str
) -> dict[str, dict[str, float]]:
    """By phase, what adds up to its peak; the part 'always' is the same in all but loading."""
    policy = roles[0]
    always = sum(player.always for player in players.values())
    sharded, part = shard != "none", microbatch(config, machine)
    decoding = policy.parameters * machine.compute if sharded else 0.0
    if shard == "zero2" or (sharded and stays_whole(policy, config)):
        decoding = held(policy, config).trained * machine.compute
    # One player at a time: a pass without gradient gives back what it gathered, a backward pass does as well.
    gathered = max(player.gathered for player in players.values())
    trunk = trunk_states(policy, config, machine)
    working = max(forward_working(role.shape, part, machine.compute) for role in roles)
    forward = working + vocabulary_working(policy, config, machine, trains=False)
    # On a GPU the copy that is written while training goes on lies in the host's memory.
    copy = _checkpoint(roles, config) + _saving(roles, config) if config.save.background and machine.packs else 0.0
    found = {
        "load": _loading(roles, config, machine, shard),
        "generate": {
            "always": always,
            "background save": copy,
            "gathered weights": decoding,
            "key/value cache": cache(policy, config, machine),
            "working": decode_working(policy, config, machine),
        },
        "score": {
            "always": always,
            "background save": copy,
            "gathered weights": gathered,
            "lower layers' states": trunk,
            "working": forward,
        },
        "train": {
            "always": always,
            "background save": copy,
            "gathered weights": gathered,
            "lower layers' states": trunk,
            **_backward(roles, players, config, machine, sharded=sharded),
        },
        "save": {"always": always, "working": _saving(roles, config)} if machine.packs else {},
    }
    return {phase: {name: size for name, size in parts.items() if size} for phase, parts in found.items() if parts}


def _loading(roles: Sequence[Role], config: PlanConfig, machine: Machine, shard: str) -> dict[str, float]:
    """The largest sum, while rewards, reference, policy and critic are loaded in turn, of what the earlier ones hold
    and of one that stands whole in compute precision. A copy of an earlier one adds what the two do not share (`twin`).

    On a processor the pages of the file that is read, in bfloat16 as a rule, are resident too.
    """
    names = ("reference", "policy", "critic")
    order = [*(r for r in roles if r.name not in names), *(r for name in names for r in roles if r.name == name)]
    upper, adapters = config.compute.train_layers, config.compute.lora_rank is not None
    kept = peak = 0.0
    holders = 0  # loaded players that hold lower layers of their own, which are to be the policy's
    for number, role in enumerate(order):
        below = 0 if upper is None else role.shape.embedding + (role.shape.layers - upper) * role.shape.layer
        trained = min(held(role, config).trained, role.parameters)
        own = role.parameters
        if (adapters or upper is not None) and any(other.same_as == role.name for other in order[:number]):
            own = trained if adapters else own - below
        elif role.shares_trunk:
            holders += 1
        peak = max(peak, kept + own * machine.compute)
        divided = shard == "zero3" and not role.trained and not stays_whole(role, config)
        kept += (own - trained) * machine.compute / (machine.count if divided else 1)
        kept += trained * machine.compute if shard == "none" else FLOAT32 * trained / machine.count
        if role.trained and holders > 1:
            kept -= (holders - 1) * below * machine.compute
            holders = 1
    return {"weights": peak, "file": 2.0 * max(role.parameters for role in roles) if machine.packs else 0.0}


def _saving(roles: Sequence[Role], config: PlanConfig) -> float:
    """A checkpoint's file twice, tensor by tensor and as it is written; on a GPU this is the host's memory."""
    return 2 * min(_checkpoint(roles, config), FILE_BYTES)


def _checkpoint(roles: Sequence[Role], config: PlanConfig) -> float:
    """Masters, two moments and the average, of all devices together."""
    copies = {role.name: 4 if config.ema is not None and role.name == "policy" else 3 for role in roles if role.trained}
    return sum(FLOAT32 * copies[role.name] * held(role, config).trained for role in roles if role.trained)


def host_memory(
    roles: Sequence[Role], players: dict[str, Bytes], config: PlanConfig, machine: Machine, shard: str
) -> dict[str, float]:  # fmt: skip
    """What lies in the host's memory for all of its GPUs together: what is offloaded, the copies that are written.

    Each process copies what it holds: undivided, that is everything.
    """
    if machine.packs:
        return {}
    copies = _checkpoint(roles, config) * (machine.count if shard == "none" else 1)
    found = {
        "offloaded": machine.count * sum(player.host for player in players.values()),
        "background save": copies + machine.count * _saving(roles, config) if config.save.background else 0.0,
    }
    return {name: size for name, size in found.items() if size}


def _backward(
    roles: Sequence[Role], players: dict[str, Bytes], config: PlanConfig, machine: Machine, *, sharded: bool
) -> dict[str, float]:
    """Gradients, activations and working memory at the worst moment of the update.

    Policy and critic take turns in every microbatch, and both step at its minibatch's end. With one microbatch a
    minibatch, the gradients of a player are not there yet when its backward pass begins; they are when a checkpointed
    pass comes to its last layer, which it recomputes.
    """
    trained, part = [role for role in roles if role.trained], microbatch(config, machine)
    alone = part.alone and config.ptx_weight is None
    moments = [{"gradients": sum(players[role.name].gradients for role in trained)}]
    for number, role in enumerate(trained):
        there = trained[: number + int(config.compute.gradient_checkpointing)] if alone else trained
        working = max(
            vocabulary_working(role, config, machine, trains=True), backward_working(role.shape, part, machine.compute)
        )
        if sharded:  # of one unit: the gradient before it is divided, in compute precision and in float32
            unit = max(role.shape.layer, role.shape.embedding + role.shape.unembedding)
            working += min(held(role, config).trained, unit) * (machine.compute + FLOAT32)
        moments.append(
            {
                "gradients": sum(players[other.name].gradients for other in there),
                "activations": players[role.name].activations,
                "working": working,
            }
        )
    return max(moments, key=lambda parts: sum(parts.values()))
