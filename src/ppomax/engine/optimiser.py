"""AdamW on float32 master weights, whatever precision the model computes in."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ppomax.engine import world


def learning_rate(
    step: int, total: int, *, peak: float, warmup: float, schedule: str, floor: float
) -> float:  # fmt: skip
    """The rate of optimiser step `step` (0-based) of `total`.

    Linear from peak/n to peak over the first n = round(warmup·total) steps, then constant, or by cosine or linearly
    down to floor·peak at the last step, and flat from there: it never rises again.
    """
    rising = round(warmup * total)
    if step < rising:
        return peak * (step + 1) / rising
    progress = min((step - rising) / max(total - rising - 1, 1), 1.0)
    shape = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }[schedule]
    return peak * (floor + (1 - floor) * shape)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Optimiser:
    """AdamW with float32 masters, float32 gradient accumulation and a global gradient-norm clip.

    A gradient is added to its master's as soon as the backward pass has it, so that micro-batches accumulate in
    float32 and the low-precision gradient is freed at once.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, weight_decay: float, betas: tuple[float, float], eps: float,
        max_grad_norm: float | None,
    ) -> None:  # fmt: skip
        self.parameters = dict(parameters)
        self.max_grad_norm = max_grad_norm
        self.masters = {name: p if p.dtype == torch.float32 else p.detach().float() for name, p in parameters.items()}
        for name, p in self.parameters.items():
            if self.masters[name] is not p:
                p.register_post_accumulate_grad_hook(self._collector(self.masters[name]))
        decayed = [m for name, m in self.masters.items() if _is_decayed(name, m)]
        plain = [m for name, m in self.masters.items() if not _is_decayed(name, m)]
        self.adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=0.0, betas=betas, eps=eps, fused=True,
        )  # fmt: skip

    @staticmethod
    def _collector(master: Tensor):
        def collect(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

        return collect

    def gradient_norm(self) -> float:
        """The global L2 norm of the accumulated gradient, over all processes."""
        gradients = [m.grad for m in self.masters.values() if m.grad is not None]
        if not gradients:
            return 0.0
        norm = torch.nn.utils.get_total_norm(gradients)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """One AdamW step at rate `lr` on the accumulated gradient, clipped; returns the norm before clipping.

        A non-finite norm changes nothing: the gradient is dropped and the caller counts the skip.
        """
        self._sum_over_processes()
        norm = self.gradient_norm()
        if math.isfinite(norm):
            if self.max_grad_norm is not None:
                scale = min(1.0, self.max_grad_norm / (norm + 1e-6))
                if scale < 1.0:
                    torch._foreach_mul_([m.grad for m in self.masters.values() if m.grad is not None], scale)
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
            self._follow()
        self.zero_grad()
        return norm

    @torch.no_grad()
    def _follow(self) -> None:
        """The model's weights become the masters, rounded to what the model computes in."""
        rounded = [name for name, parameter in self.parameters.items() if self.masters[name] is not parameter]
        if rounded:
            torch._foreach_copy_([self.parameters[n] for n in rounded], [self.masters[n] for n in rounded])

    def _sum_over_processes(self) -> None:
        """Where every process has all masters, each has found the gradient of its own rows; shards are sums already."""
        found = [m.grad for m in self.masters.values() if m.grad is not None]
        world.fill(*(gradient for gradient in found if not isinstance(gradient, DTensor)))

    @torch.no_grad()
    def scale(self, name: str, factor: float) -> None:
        """Multiply one parameter and its master."""
        self.masters[name].mul_(factor)
        if self.masters[name] is not self.parameters[name]:
            self.parameters[name].copy_(self.masters[name])

    def bytes(self) -> int:
        """Size of `state_tensors` once the moments exist."""
        return sum(3 * 4 * master.numel() + 4 for master in self.masters.values())

    def training_bytes(self) -> int:
        """What training holds beside the model's weights: masters where those are rounded, moments, gradients; of
        tensors that processes divide, this one's part."""
        own = ((m, m is self.parameters[name]) for name, m in self.masters.items())
        return sum(4 * local(m).numel() * (3 if weight else 4) for m, weight in own)

    def zero_grad(self) -> None:
        """Forget the accumulated gradient."""
        for master in self.masters.values():
            master.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """Masters and moments by name: all that a checkpoint needs."""
        tensors: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            tensors[f"master.{name}"] = master.detach()
            for key, value in self.adamw.state.get(master, {}).items():
                tensors[f"{key}.{name}"] = value
        return tensors

    def empty_state(self) -> dict[str, Tensor]:
        """Tensors like those of `state_tensors` once the moments exist, for a checkpoint to be read into: the masters
        themselves, so that no second set of them has to fit."""
        empty: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            empty[f"master.{name}"] = master.detach()
            empty |= {f"{key}.{name}": torch.empty_like(master.detach()) for key in ("exp_avg", "exp_avg_sq")}
        return empty

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor], *, adopt: bool = False) -> None:
        """Put back what `state_tensors` gave; the model's weights follow the masters.

        adopt: the moments may be kept as they are, because nobody else goes on using them.
        """
        for name, master in self.masters.items():
            master.copy_(tensors[f"master.{name}"])
            moments = {key: f"{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq")}
            self.adamw.state.pop(master, None)
            if moments["exp_avg"] in tensors:
                self.adamw.state[master] = {
                    key: tensors[full].to(master.device, copy=not adopt) for key, full in moments.items()
                }
        self._follow()


def _is_decayed(name: str, tensor: Tensor) -> bool:
    """Matrices only: no biases, norms, embeddings (wte and wpe in GPT-2), nor the row of a scalar head.

    GPT-NeoX calls its unembedding embed_out; it is a matrix as lm_head is elsewhere.
    """
    embedding = any(part in name for part in ("embed", "wte", "wpe")) and "embed_out" not in name
    return tensor.ndim >= 2 and min(tensor.shape) > 1 and not embedding
