"""Gradient checkpointing: of a layer's pass only the input is kept, and the backward pass makes the rest again.

transformers' own switch needs a model in train mode, where every dropout, jitter or skipped layer of an architecture,
whatever it is called, would act. Here the model stays in evaluation mode, so that none of them can.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ppomax.types import SetupError


def recompute_layers(model: nn.Module) -> None:
    """Let the layers that transformers can compute again be computed again; SetupError where there are none."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise SetupError(
            f"gradient_checkpointing: found {type(model).__name__}, expected a model whose layers can be computed "
            "again; leave it False"
        )
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
