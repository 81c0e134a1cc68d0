"""Read the batch that ended a run again, alone: each loss, each gradient norm, and the first number that is none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ppomax.config import PPOConfig, ReplayConfig, RewardConfig, SFTConfig
from ppomax.engine.checkpoint import latest_checkpoint, load_checkpoint
from ppomax.engine.optimiser import Optimiser
from ppomax.models.load import Compute, load_causal_lm
from ppomax.models.players import Player, Policy, Scalar
from ppomax.stages import reward, sft, update
from ppomax.stages.checkpoint import player_of, put, run_settings
from ppomax.stages.inputs import RankedTokens, Tokens, compute_of, training_of
from ppomax.stages.players import Players
from ppomax.stages.scoring import Microbatch, Minibatch
from ppomax.stages.session import NONFINITE
from ppomax.stages.sft import adamw
from ppomax.stages.trust_region import trust_region_step
from ppomax.types import ROLLOUT_TENSORS, Experience, Prompt, Rollout, SetupError, token_batch

Found = dict[str, Any]


def replay(config: ReplayConfig) -> dict[str, Found]:
    """What the batch in `run_dir/nonfinite` gives, in the run's precision and in float32: measure → value.

    `first: …` names the first tensor that holds NaN or infinity, in the batch, the weights, the forward pass (by
    module) and the gradient (from the losses back).
    """
    settings = run_settings(config.run_dir)
    path, problems = latest_checkpoint(config.run_dir / NONFINITE)
    if path is None:
        raise SetupError(
            "; ".join(problems)
            or f"{config.run_dir / NONFINITE}: found nothing, expected the batch of a run that "
            "stopped because its gradients were no numbers"
        )
    tensors, state = load_checkpoint(path)
    found: dict[str, Found] = {}
    for dtype in dict.fromkeys((settings.compute.dtype, "float32")):
        compute = compute_of(settings.compute.model_copy(update={"device": config.device, "dtype": dtype}))
        name = str(compute.dtype)[6:]
        if name not in found:
            known = {
                "first: in the batch": _first(_under(tensors, "batch/", "coefficients")),
                "first: in the weights": _first(_under(tensors, "model/", "policy/", "critic/")),
            }
            found[name] = known | _READERS[type(settings)](settings, compute, tensors, state)
    return found


def _sft(settings: SFTConfig, compute: Compute, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Found:
    policy = Policy(
        load_causal_lm(settings.model, compute), trained=True, **training_of(settings.compute, settings.seed)
    )
    rows = [Tokens(tuple(row["ids"]), tuple(row["mask"])) for row in state["rows"]]
    optimiser = _loaded(policy, settings.optim, tensors, "model")
    with _watched(model=policy) as first:
        measured, _ = sft._step(policy, optimiser, rows, None, settings.compute.tokens_per_microbatch, 0.0)
    return first | optimiser.found | _losses(measured)


def _reward(settings: RewardConfig, compute: Compute, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Found:
    model = reward.reward_player(settings.model, compute, settings, trained=True)
    rows = [
        RankedTokens(
            tuple(row["prompt"]), tuple(map(tuple, row["responses"])), tuple(map(tuple, row["pairs"])), row["source"],
            tuple(row["gaps"]), weight=row["weight"],
        )
        for row in state["rows"]
    ]  # fmt: skip
    optimiser = _loaded(model, settings.optim, tensors, "model")
    with _watched(model=model) as first:
        measured, _ = reward._step(model, optimiser, rows, None, settings, 0.0)
    return first | optimiser.found | _losses(measured)


def _ppo(settings: PPOConfig, compute: Compute, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Found:
    players = _players(settings, compute, tensors)
    roles = {"policy": players.policy, **({} if players.critic is None else {"critic": players.critic})}
    optims = {"policy": settings.optim, "critic": settings.critic.optim}
    optimisers = {role: _loaded(player, optims[role], tensors, role) for role, player in roles.items()}
    part = _experience(tensors, state["prompt_ids"])
    micros = tuple(_microbatches(part.rollout, state["microbatches"], players))
    minibatch = Minibatch(tuple(range(len(part))), micros)
    kl, penalty = tensors["coefficients"].tolist()
    totals, found = update.Totals(), Found()
    with _watched(**roles) as first:
        steering = update.Steering(kl, penalty)
        update._backward(players, part, minibatch, settings, steering, state["pretraining"], totals)
        for role, optimiser in optimisers.items():
            found |= optimiser.look(role)
            optimiser.zero_grad()
        if settings.objective.kind == "trpo" and not state["pretraining"]:
            advantages_BR = update._normalised(part, settings)
            found |= trust_region_step(
                players.policy, optimisers["policy"], part, minibatch, advantages_BR, settings
            )  # fmt: skip
        if state["ptx"]:
            rows = [Tokens(tuple(row["ids"]), tuple(row["mask"])) for row in state["ptx"]]
            alone = settings.model_copy(update={"ptx_batch": len(rows)})
            update._backward_ptx(players, rows, 0, alone, totals)
            found |= optimisers["policy"].look("ptx")
    return dict(first) | found | _losses({**totals.sums, **totals.largest})


_READERS: dict[type, Any] = {SFTConfig: _sft, RewardConfig: _reward, PPOConfig: _ppo}


def _players(settings: PPOConfig, compute: Compute, tensors: Mapping[str, Tensor]) -> Players:
    """Policy, critic and reference; rewards are in the batch already."""
    policy, _, _ = player_of(settings, "final", compute)
    critic = player_of(settings, "critic", compute)[0] if any(key.startswith("critic/") for key in tensors) else None
    frozen = load_causal_lm(settings.reference or settings.policy, compute)
    reference = Policy(frozen, train_layers=settings.compute.train_layers, trained=False)
    assert isinstance(policy, Policy) and (critic is None or isinstance(critic, Scalar))
    return Players(policy, reference, critic, [], None, compute)


class _Observer(Optimiser):
    """Looks at the gradient where an optimiser would follow it."""

    found: Found

    def look(self, role: str) -> Found:
        """The gradient's norm and, from the losses back, the first parameter whose gradient is no number."""
        gradients = {name: m.grad for name, m in reversed(self.masters.items()) if m.grad is not None}
        return {f"grad_norm/{role}": self.gradient_norm(), f"first: in the gradient/{role}": _first(gradients)}

    def step(self, lr: float) -> float:
        self.found = self.look("model")
        self.zero_grad()
        return self.found["grad_norm/model"]


def _loaded(player: Player, optim: Any, tensors: Mapping[str, Tensor], role: str) -> _Observer:
    """The player with the weights that read the batch, and who looks at their gradient."""
    put(player, tensors, f"{role}/")
    return _Observer(player.trained_parameters(), **adamw(optim))


def _experience(tensors: Mapping[str, Tensor], prompt_ids: Sequence[Sequence[int]]) -> Experience:
    prompts = tuple(Prompt((), key=str(i)) for i in range(len(prompt_ids)))
    rollout = Rollout(
        prompts, tuple(map(tuple, prompt_ids)), **{name: tensors[f"rollout/{name}"] for name in ROLLOUT_TENSORS}
    )
    return Experience(rollout, **_under(tensors, "batch/"))


def _microbatches(rollout: Rollout, sizes: Sequence[int], players: Players) -> Iterator[Microbatch]:
    responses, start = rollout.responses(), 0
    for size in sizes:
        rows = tuple(range(start, start + size))
        start += size
        batch = token_batch(
            [rollout.prompt_ids[i] for i in rows], [responses[i] for i in rows], device=str(players.compute.device)
        )  # fmt: skip
        yield Microbatch(rows, players.trunk(batch))


@contextmanager
def _watched(**players: Player) -> Iterator[Found]:
    """Notes the first module whose output holds NaN or infinity."""
    found: Found = {"first: in the forward pass": None}

    def hook(name: str) -> Any:
        def look(module: nn.Module, arguments: Any, output: Any) -> None:
            if found["first: in the forward pass"] is None and not all(map(_finite, _tensors(output))):
                found["first: in the forward pass"] = f"{name} ({type(module).__name__})"

        return look

    handles = [
        module.register_forward_hook(hook(f"{role}/{name}" if name else role))
        for role, player in players.items() for name, module in player.model.named_modules()
    ]  # fmt: skip
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _losses(measured: Mapping[str, float]) -> Found:
    return {key: value for key, value in measured.items() if key not in ("lr", "grad_norm")}


def _under(tensors: Mapping[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    return {key.removeprefix("batch/"): x for key, x in tensors.items() if key.startswith(prefixes)}


def _first(tensors: Mapping[str, Tensor]) -> str | None:
    return next((name for name, x in tensors.items() if not _finite(x)), None)


def _finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)
