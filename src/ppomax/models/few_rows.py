"""Linear layers for few tokens on CPU: while responses are decoded, every row brings one.

In float32, weight · xᵀ is then a faster product than x · weightᵀ on processors with AVX2: 2.0 to 2.7 times as fast for
4 rows, 1.1 to 1.4 times for 64, slower for 256 (`python -m bench.products`, two cores). With AVX-512 it is mostly
slower: 0.5 to 0.9 times as fast for 4 and for 64 rows. bfloat16 goes to another library, where this was not tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MOST_ROWS = 64
PROCESSORS = ("AVX2",)


@contextmanager
def weight_first(model: nn.Module) -> Iterator[None]:
    """While inside, the model's linear layers compute few rows weight first, if that is faster on this processor."""
    gains = torch.backends.cpu.get_cpu_capability() in PROCESSORS
    layers = [
        layer
        for layer in (model.modules() if gains else ())
        if type(layer) is nn.Linear and layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32
    ]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: nn.Linear, input: Tensor) -> Tensor:
    if input.numel() > MOST_ROWS * input.shape[-1]:
        return F.linear(input, layer.weight, layer.bias)
    out = torch.mm(layer.weight, input.reshape(-1, input.shape[-1]).t())
    if layer.bias is not None:
        out += layer.bias[:, None]
    return out.t().contiguous().view(*input.shape[:-1], -1)
