"""What a PPO run needs of memory and time, before anything is bought, loaded or started."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch

from ppomax.config import ModelConfig
from ppomax.config.plan import PlanConfig, gpus_of, parameters_of
from ppomax.engine.machine import memory_total
from ppomax.engine.speed import copy_rate, peak_rate
from ppomax.models.load import Compute, resolve_compute
from ppomax.models.shapes import Shape, shape_named, shape_sized
from ppomax.rewards.mixture import is_function, parse_terms
from ppomax.stages.plan_memory import Bytes, Machine, Role, microbatch, player_bytes
from ppomax.stages.plan_phases import host_memory, phases
from ppomax.stages.plan_time import flops, seconds
from ppomax.stages.ppo_checks import expect_possible
from ppomax.types import SetupError

GIB = 2**30
LORA_RANK, LAYERS_TRAINED = 16, 0.25
MOST_GPUS = 1024


@dataclass(frozen=True)
class Layout:
    """A way to train: the flags that ask for it (beside the settings given), and the settings with them."""

    name: str
    flags: str
    config: PlanConfig
    shard: str


def plan(config: PlanConfig) -> dict[str, Any]:
    """Bytes on one device by player and phase, which layouts fit, and the seconds of an iteration. All memory is in
    bytes, `flops` in operations.

    `models` and `machine` say what was counted for; `layouts` has every layout that was tried, the settings as given
    first; `shown` is the recommended one, the first that fits (`recommended` is then True), else the one that needs
    least; `players` and `phases` are its bytes, `host` those in the host's memory beside GPUs, `flops` and `seconds`
    (None where no speed is known) its iteration; `knobs` are settings that need less, where nothing fits. Only
    config.json files are read.
    """
    _expect_countable(config)
    roles = roles_of(config)
    machine, compute = machine_of(config)
    usable = machine.memory * (1 - config.reserve)
    tried = [_counted(layout, roles, machine, usable) for layout in layouts(config, roles, machine)]
    found = next((one for one in tried if one[1]["fits"]), None)
    layout, shown = found or min(tried, key=lambda one: one[1]["peak"])
    speed = _speed(config, compute)
    operations = flops(roles, layout.config, machine)
    players = _players(layout, roles, machine)
    return {
        "models": {role.name: {"parameters": role.parameters, "shape": str(role.shape)} for role in roles},
        "machine": {
            "devices": machine.count,
            "memory": machine.memory,
            "usable": usable,
            "dtype": "bfloat16" if machine.compute == 2 else "float32",
            "packed": machine.packs,
            **speed,
        },
        "microbatch": asdict(microbatch(layout.config, machine)),
        "layouts": [one for _, one in tried],
        "recommended": found is not None,
        "shown": shown["name"],
        "flags": shown["flags"],
        "players": {name: asdict(player) for name, player in players.items()},
        "phases": phases(roles, players, layout.config, machine, layout.shard),
        "host": host_memory(roles, players, layout.config, machine, layout.shard),
        "flops": operations,
        "seconds": _seconds(layout, roles, machine, speed),
        "knobs": [] if found else knobs(layout, roles, machine, config.reserve),
    }  # fmt: skip


def roles_of(config: PlanConfig) -> list[Role]:
    """The players of a run, the policy first, with the shapes that their config.json or the size names."""
    sized = None if config.model_size is None else shape_sized(config.model_size, parameters_of(config.model_size))

    def shape(name: str) -> Shape:
        return sized or shape_named(name)

    policy = shape(config.policy)
    roles = [Role("policy", policy, scalar=False, trained=True)]
    rewards = [spec for _, spec in parse_terms(config.reward) if not is_function(spec)]
    reward_size = config.reward_size
    of_reward = None if reward_size is None else shape_sized(reward_size, parameters_of(reward_size))
    scorers = [of_reward or shape(spec) for spec in rewards]
    init = config.critic.init
    if init == "reward" and not scorers:
        raise SetupError("critic.init: found 'reward', but no reward is a model; expected 'policy' or a directory")
    if init is not None:
        critic = policy if init == "policy" else scorers[0] if init == "reward" else shape(init)
        roles.append(Role("critic", critic, scalar=True, trained=True, shares_trunk=critic == policy))
    reference = shape(config.reference or config.policy)
    same = "policy" if config.reference in (None, config.policy) else None
    roles.append(Role("reference", reference, False, False, reference == policy, same))
    for number, scorer in enumerate(scorers):
        name = "reward" if number == 0 else f"reward {number + 1}"
        same = "critic" if init == "reward" and number == 0 else None
        # Beside stop strings it reads text, all of it (stages/players.py).
        roles.append(Role(name, scorer, True, False, scorer == policy and not config.sampling.stop, same))
    return roles


def machine_of(config: PlanConfig) -> tuple[Machine, Compute | None]:
    """The devices that the plan is for; with what they compute if they are this machine's."""
    sizes = {"float32": 4, "bfloat16": 2, "auto": 2}
    if config.gpus is not None:
        count, memory = gpus_of(config.gpus)
        return Machine(count, memory * GIB, sizes[config.compute.dtype], packs=False), None
    compute = resolve_compute(config.compute.device, config.compute.dtype)
    memory = memory_total()
    if compute.device.type == "cuda":
        memory = float(torch.cuda.get_device_properties(compute.device).total_memory)
    return Machine(1, memory, compute.dtype.itemsize, packs=compute.device.type == "cpu"), compute


def layouts(config: PlanConfig, roles: Sequence[Role], machine: Machine) -> list[Layout]:
    """What is tried, in the order of what it costs: the settings as given, recomputed activations, adapters, fewer
    layers; each with its state divided over the devices more and more."""
    compute, found = config.compute, []
    checkpointed = {} if compute.gradient_checkpointing else {"gradient_checkpointing": True}
    ways: list[dict[str, Any]] = [{}, checkpointed] if checkpointed else [{}]
    if compute.lora_rank is None:
        ways.append({**checkpointed, "lora_rank": LORA_RANK})
    equal = all(role.shape == roles[0].shape for role in roles if role.trained)
    if compute.train_layers is None and equal:
        ways.append({**checkpointed, "train_layers": max(1, round(LAYERS_TRAINED * roles[0].shape.layers))})
    elif compute.train_layers is not None and not equal:
        raise SetupError("compute.train_layers: found policy and critic of different sizes, expected equal ones")
    if compute.train_layers is not None and not 1 <= compute.train_layers <= roles[0].shape.layers:
        layers = roles[0].shape.layers
        raise SetupError(f"compute.train_layers: found {compute.train_layers}, expected 1 to {layers} (the model's)")
    # A run's own setting counts as said where it is not the default, which a file of settings cannot be told from.
    said = config.shard or (config.compute.shard if config.compute.shard != ModelConfig().shard else None)
    shards = ("none",) if machine.count == 1 else (said,) if said else ("none", "zero2", "zero3")
    for way in ways:
        changed = _with(config, compute=way)
        named = {f"--compute.{key.replace('_', '-')}": value for key, value in way.items()}
        flags = [flag if value is True else f"{flag} {value}" for flag, value in named.items()]
        for shard in shards:
            divided = [] if machine.count == 1 else [f"--compute.shard {shard}"]
            name = ", ".join([_name(changed), *([] if machine.count == 1 else [shard])])
            found.append(Layout(name, " ".join([*flags, *divided]), changed, shard))
    return found


def knobs(layout: Layout, roles: Sequence[Role], machine: Machine, reserve: float) -> list[dict[str, Any]]:
    """Settings that bring the peak of a layout down, each by itself, and the number of devices at which it fits."""
    found = []
    equal = all(role.shape == roles[0].shape for role in roles if role.trained)
    for flags, changed in _smaller(layout.config, equal, divided=layout.shard != "none"):
        peak = _peak(Layout(layout.name, flags, changed, layout.shard), roles, machine)
        found.append({"change": flags, "peak": peak, "fits": peak <= machine.memory * (1 - reserve)})
    # More devices divide what is trained, and frozen weights only where nothing is shared: then all may be trained.
    all_trained = {"lora_rank": None, "train_layers": None, "gradient_checkpointing": True}
    ways = {"": layout.config, ", everything trained, checkpointing": _with(layout.config, compute=all_trained)}
    for count, (words, config) in product((2**power * machine.count for power in range(1, 11)), ways.items()):
        more = Machine(count, machine.memory, machine.compute, machine.packs)
        peak = _peak(Layout(layout.name, "", config, "zero3"), roles, more)
        if count <= MOST_GPUS and peak <= more.memory * (1 - reserve):
            found.append({"change": f"{count} GPUs, --compute.shard zero3{words}", "peak": peak, "fits": True})
            break
    peak = _peak(layout, roles, machine)
    return sorted((knob for knob in found if knob["peak"] < peak), key=lambda knob: (not knob["fits"], knob["peak"]))


def _smaller(config: PlanConfig, equal: bool, *, divided: bool) -> Iterator[tuple[str, PlanConfig]]:
    """Flags that ask for less, and what comes of them. equal: what is trained is of one size, and can share layers.
    divided: over several GPUs, whose parts the host may hold."""
    if divided and not config.compute.offload:
        yield "--compute.offload", _with(config, compute={"offload": True})
    longest = config.max_prompt_tokens + config.sampling.max_new_tokens
    if config.compute.tokens_per_microbatch > longest:
        yield f"--compute.tokens-per-microbatch {longest}", _with(config, compute={"tokens_per_microbatch": longest})
    if (rows := config.sampling.max_rows // 4) >= 1:
        yield f"--sampling.max-rows {rows}", _with(config, sampling={"max_rows": rows})
    if (limit := config.sampling.max_new_tokens // 2) >= 1:
        yield f"--sampling.max-new-tokens {limit}", _with(config, sampling={"max_new_tokens": limit})
    if equal and (config.compute.train_layers is None or config.compute.train_layers > 1):
        yield "--compute.train-layers 1", _with(config, compute={"train_layers": 1})


def _with(config: PlanConfig, **groups: dict[str, Any]) -> PlanConfig:
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in groups.items()}
    )


def _name(config: PlanConfig) -> str:
    compute = config.compute
    parts = [] if compute.lora_rank is None else [f"lora {compute.lora_rank}"]
    parts += [] if compute.train_layers is None else [f"upper {compute.train_layers} layers"]
    return ", ".join([*(parts or ["full"]), *(["checkpointing"] if compute.gradient_checkpointing else [])])


def _phases(layout: Layout, roles: Sequence[Role], machine: Machine) -> dict[str, dict[str, float]]:
    return phases(roles, _players(layout, roles, machine), layout.config, machine, layout.shard)


def _players(layout: Layout, roles: Sequence[Role], machine: Machine) -> dict[str, Bytes]:
    return {role.name: player_bytes(role, layout.config, machine, layout.shard) for role in roles}


def _peak(layout: Layout, roles: Sequence[Role], machine: Machine) -> float:
    return max(sum(parts.values()) for parts in _phases(layout, roles, machine).values())


def _counted(
    layout: Layout, roles: Sequence[Role], machine: Machine, usable: float
) -> tuple[Layout, dict[str, Any]]:  # fmt: skip
    by_phase = {phase: sum(parts.values()) for phase, parts in _phases(layout, roles, machine).items()}
    peak = max(by_phase.values())
    return layout, {
        "name": layout.name, "flags": layout.flags, "peak": peak, "fits": peak <= usable, "phases": by_phase,
        "flops": sum(flops(roles, layout.config, machine).values()),
    }  # fmt: skip


def _speed(config: PlanConfig, compute: Compute | None) -> dict[str, float | None]:
    """TFLOP/s and GB/s of one device: as given, else measured where the plan is for this machine."""
    tflops, bandwidth = config.tflops, config.bandwidth
    if compute is not None:
        tflops = tflops or (peak_rate(compute.device, compute.dtype) or 0.0) / 1e12 or None
        bandwidth = bandwidth or copy_rate(compute.device, seconds=0.15) / 1e9
    return {"tflops": tflops, "bandwidth": bandwidth}


def _seconds(
    layout: Layout, roles: Sequence[Role], machine: Machine, speed: dict[str, float | None]
) -> dict[str, float] | None:
    if speed["tflops"] is None:
        return None
    operations = flops(roles, layout.config, machine)
    return seconds(
        roles, layout.config, machine, operations, tflops=speed["tflops"], bandwidth=speed["bandwidth"]
    )  # fmt: skip


def _expect_countable(config: PlanConfig) -> None:
    """Refuse what `ppomax ppo` would refuse, data aside, and what the formulas do not cover."""
    expect_possible(config.model_copy(update={"ptx_data": ("any",) if config.ptx_weight is not None else ()}))
    if config.objective.kind == "trpo":
        raise SetupError("objective.kind: found trpo, whose second derivatives the planner does not count")
    if config.reward_size is not None and config.model_size is None:
        raise SetupError("reward_size: found a size without model_size; expected both, or neither")
    for name, mean, limit in (
        ("prompt_tokens", config.prompt_tokens, config.max_prompt_tokens),
        ("response_tokens", config.response_tokens, config.sampling.max_new_tokens),
    ):
        if mean is not None and mean > limit:
            raise SetupError(f"{name}: found a mean of {mean}, expected at most the longest, {limit}")
    if config.shard in ("zero2", "zero3") and (config.gpus is None or gpus_of(config.gpus)[0] == 1):
        raise SetupError(f"shard: found {config.shard} on one device; expected several, such as --gpus 8x80g")
