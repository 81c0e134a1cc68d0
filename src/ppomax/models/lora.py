"""Low-rank adapters (Hu et al., 2021) instead of trained weights, by PEFT; merged into the weights for an export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ppomax.errors import first_line
from ppomax.types import SetupError

ADAPTER = "adapter"


@dataclass(frozen=True)
class Lora:
    """y = Wx + (alpha / rank)·B·A·x with A [rank, in] and B [out, rank] trained, W frozen; B starts at 0.

    seed: keys A's start.
    """

    rank: int
    alpha: float
    seed: int = 0


def add_adapters(model: nn.Module, base: Any, lora: Lora, *, first_layer: int) -> None:
    """Adapters in place in all linear maps of the decoder layers from `first_layer` on; they alone are then trained."""
    peft = _peft()
    layers = base.layers[first_layer:].named_modules()
    kinds = {name.rpartition(".")[2] for name, module in layers if isinstance(module, nn.Linear)}
    if not kinds:
        raise SetupError(
            f"lora_rank: found no linear map in the decoder layers of {type(model).__name__}, expected some to put "
            "adapters into; leave it None"
        )
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, bias="none", target_modules=sorted(kinds),
        layers_to_transform=list(range(first_layer, len(base.layers))), layers_pattern="layers",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lora.seed)
        try:
            peft.inject_adapter_in_model(config, model)
        except ValueError as error:
            raise SetupError(f"lora_rank: {type(model).__name__}: {first_line(error)}; leave it None") from None
    for layer in model.modules():
        if type(getattr(layer, "base_layer", None)) is nn.Linear:
            layer.__class__ = _quick(type(layer))


@cache
def _quick(kind: type[nn.Module]) -> type[nn.Module]:
    """PEFT's layer with `_adapted` for a forward pass: torch.compile would trace a function of each instance anew."""
    return type(kind.__name__, (kind,), {"forward": _adapted})


def _adapted(layer: Any, x: Tensor) -> Tensor:
    """What PEFT's layer computes, without its copies: a sum and a scaled product of whole outputs, and the gradients of
    both, which cost several times as much as the low-rank products (docs/performance.md)."""
    (adapter,) = layer.active_adapters
    low_RI, high_OR = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    scale, x_NI = layer.scaling[adapter], x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled():
        base = layer.base_layer
        y_NO = _Adapted.apply(x_NI, base.weight, base.bias, low_RI, high_OR, scale)
    else:  # by the layer, which may be quicker with few rows (models/few_rows.py)
        y_NO = layer.base_layer(x_NI).addmm_(x_NI @ low_RI.T, high_OR.T, alpha=scale)
    return y_NO.view(*x.shape[:-1], -1)  # type: ignore[union-attr]


class _Adapted(torch.autograd.Function):
    """y = xWᵀ + b + scale·(xAᵀ)Bᵀ with W and b frozen: the adapter's part is added to products that are there anyway.

    x·Aᵀ is made again in the backward pass, of which all can be differentiated once more (TRPO).
    """

    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, low_RI: Tensor, high_OR: Tensor, scale: float
    ) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(x_NI, weight_OI, low_RI, high_OR)
        return F.linear(x_NI, weight_OI, bias_O).addmm_(x_NI @ low_RI.T, high_OR.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_y_NO = gradients[0]
        x_NI, weight_OI, low_RI, high_OR = ctx.saved_tensors
        d_low_NR = ctx.scale * (d_y_NO @ high_OR)
        d_x_NI = (d_y_NO @ weight_OI).addmm_(d_low_NR, low_RI) if ctx.needs_input_grad[0] else None
        return d_x_NI, None, None, d_low_NR.T @ x_NI, d_y_NO.T @ (ctx.scale * (x_NI @ low_RI.T)), None


def has_adapters(model: nn.Module) -> bool:
    """Whether `add_adapters` was called on the model."""
    return any(name.endswith(".base_layer") for name, _ in model.named_modules())


@torch.no_grad()
def merged_state(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `state` under their names without adapters, W + (alpha / rank)·B·A in place of W; one by one, so
    that who hands them on holds no second copy of all."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "base_layer")}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        owner, _, kind = name.partition(".base_layer.")
        if owner in layers and kind == "weight":
            layer: Any = layers[owner]
            (adapter,) = layer.active_adapters
            low = [state[f"{owner}.lora_{side}.{adapter}.weight"].float() for side in "BA"]
            change = layer.scaling[adapter] * (low[0] @ low[1])
            change = change.T if getattr(layer, "fan_in_fan_out", False) else change
            tensor = (tensor.float() + change).to(tensor.dtype)
        yield f"{owner}.{kind}" if kind else name, tensor


def save_adapter(model: Any, state: Mapping[str, Tensor], folder: Path) -> None:
    """The adapters alone, in PEFT's layout, with the score head of a reward model: `PeftModel.from_pretrained` reads
    them onto the model that the run started from. state: all tensors of the model."""
    peft = _peft()
    tensors: Mapping[str, Tensor] = peft.get_peft_model_state_dict(model, state_dict=dict(state))
    config = next(iter(model.peft_config.values()))
    config.base_model_name_or_path = model.name_or_path
    config.task_type = "CAUSAL_LM"
    if isinstance(getattr(model, "score", None), nn.Linear):
        config.task_type, config.modules_to_save = "SEQ_CLS", ["score"]
        tensors = {**tensors, "score.weight": state["score.weight"]}
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(
        {f"base_model.model.{name}": tensor.detach().contiguous() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise SetupError("compute.lora_rank needs `peft`: pip install 'peft>=0.18'") from error
    return peft
