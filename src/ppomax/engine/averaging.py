"""An exponential moving average of parameters, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """mean ← decay · mean + (1 − decay) · parameters, after every optimiser step; starts at the parameters."""

    def __init__(self, masters: Mapping[str, Tensor], *, decay: float) -> None:
        self.decay = decay
        self.means = {name: master.detach().float().clone() for name, master in masters.items()}

    @torch.no_grad()
    def update(self, masters: Mapping[str, Tensor]) -> None:
        """Move the means towards the masters."""
        for name, mean in self.means.items():
            mean.lerp_(masters[name].detach().float(), 1.0 - self.decay)

    @contextmanager
    def inside(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """The means in the model for the time of a block, for an export or an evaluation."""
        kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            self._copy(self.means, parameters)
            yield
        finally:
            self._copy(kept, parameters)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `means` held."""
        for name, mean in self.means.items():
            mean.copy_(tensors[name])

    @staticmethod
    @torch.no_grad()
    def _copy(source: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            parameter.copy_(source[name])
