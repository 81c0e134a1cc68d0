"""Floating-point operations that a pass needs: a product of [n, a] and [a, b] is 2·n·a·b of them.

Useful ones only: no padding, nothing that is computed twice (gradient checkpointing, logits in a backward pass), and of
attention what a causal mask leaves. Norms, activations, look-ups and softmax are no matrix products and not counted.
Windows of attention are not taken into account. The costs of architectures for which this does not hold are 0, which
stands for unknown: mixtures of experts, whose tokens do not read all parameters, and models without attention heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppomax.types import TokenBatch, Work

# The linear maps that read a layer's input; all others read something that these have made.
READ_THE_INPUT = {"q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value"}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
# Tokens that cost as much as one padded pass more: a processor reads all weights once more for it; on a GPU, for one
# parameter a layer, by arithmetic: the passes through a layer, forward and backward, take 0.45 ms to be started, in
# which 300 TFLOP/s do so many times the 6 operations of a token and a parameter.
CPU_PASS, GPU_PASS = 64, 22_000_000_000


@dataclass(frozen=True)
class Cost:
    """Operations per token, per pair of query and key in attention, and per place where the vocabulary is read."""

    token: int = 0
    pair: int = 0
    place: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.token + other.token, self.pair + other.pair, self.place + other.place)

    def of(self, *, tokens: int, pairs: int, places: int) -> int:
        """Operations of a pass."""
        return self.token * tokens + self.pair * pairs + self.place * places


@dataclass(frozen=True)
class Costs:
    """Of a player's frozen lower layers where they are split off, of the rest forward, and of its backward pass."""

    trunk: Cost
    forward: Cost
    backward: Cost


def stack_costs(base: Any, *, split: int, token_weights: Sequence[Tensor], place_weights: Sequence[Tensor]) -> Costs:
    """Costs of a decoder stack whose first `split` layers are the trunk, with the heads on top of it.

    token_weights: of heads that read every token; place_weights: of those that read chosen places. What the backward
    pass computes follows from the parameters' `requires_grad`: the gradient in a map's weight (as much as its forward
    pass) if that is trained, the gradient in its input (the same) if something below it is.
    """
    layers = _layers(base)
    if layers is None or has_experts(base.config):
        return Costs(Cost(), Cost(), Cost())
    learns = bool(base.get_input_embeddings().weight.requires_grad)
    trunk, forward, backward = Cost(), Cost(), Cost()
    for i, layer in enumerate(layers):
        cost = _layer(base.config, layer)
        trunk, forward = (trunk + cost, forward) if i < split else (trunk, forward + cost)
        backward += _layer_backward(base.config, layer, learns)
        learns = learns or any(p.requires_grad for p in layer.parameters())
    learns = learns or any(p.requires_grad for p in base.parameters())
    head = Cost(token=_sizes(token_weights), place=_sizes(place_weights))
    trained = Cost(
        token=_sizes(w for w in token_weights if w.requires_grad),
        place=_sizes(w for w in place_weights if w.requires_grad),
    )
    return Costs(trunk, forward + head, backward + trained + (head if learns else Cost()))


def work_of(cost: Cost, spans: Iterable[tuple[int, int]], *, slots: int | None = None, places: int) -> Work:
    """The work of a pass over the tokens start…end−1 of sequences, each of which sees itself and what is before it.

    slots: tokens that the linear layers compute, padding included; None: just these.
    """
    spans = list(spans)
    tokens = sum(end - start for start, end in spans)
    pairs = sum((end * (end + 1) - start * (start + 1)) // 2 for start, end in spans)
    return Work(tokens, tokens if slots is None else slots, cost.of(tokens=tokens, pairs=pairs, places=places))


def batch_work(cost: Cost, batch: TokenBatch, *, packs: bool, places: int | None) -> Work:
    """The work of a pass over a batch. places: by default the response tokens.

    A packed pass reads a prompt that several rows share once, and has no padding in its linear layers.
    """
    prompts, lengths = batch.prompt_length_B.tolist(), batch.length_B.tolist()
    places = sum(lengths) - sum(prompts) if places is None else places
    if not packs:
        return work_of(cost, ((0, end) for end in lengths), slots=batch.ids_BT.numel(), places=places)
    distinct = dict(zip(batch.packing.prompt_B.tolist(), prompts, strict=True))
    return work_of(cost, [*((0, p) for p in distinct.values()), *zip(prompts, lengths, strict=True)], places=places)


def pass_tokens(base: Any, device: torch.device) -> int:
    """How many tokens more in a padded pass cost as much as one pass more."""
    if device.type == "cpu":
        return CPU_PASS
    layers, parameters = len(_layers(base) or (1,)), sum(p.numel() for p in base.parameters())
    return max(CPU_PASS, GPU_PASS * layers // parameters)


def has_experts(config: Any) -> bool:
    """Whether a model is a mixture of experts, whose tokens read some of the parameters."""
    return any(getattr(config, name, None) for name in EXPERTS)


def _layer(config: Any, layer: nn.Module) -> Cost:
    return Cost(_sizes(weight for _, weight in _maps(layer)), _pair(config))


def _layer_backward(config: Any, layer: nn.Module, learns: bool) -> Cost:
    """The backward pass of a layer; `learns`: something below it is trained."""
    maps = _maps(layer)
    if not learns and not any(p.requires_grad for p in layer.parameters()):
        return Cost()
    weights = {id(weight) for _, weight in maps}
    input_learns = learns or any(p.requires_grad for p in layer.parameters() if p.ndim == 1 and id(p) not in weights)
    token = _sizes(weight for _, weight in maps if weight.requires_grad)
    token += _sizes(weight for name, weight in maps if input_learns or not _reads_the_input(name))
    return Cost(token, 2 * _pair(config))


def _pair(config: Any) -> int:
    """Per query and key: one product with the key, one with the value, over all heads."""
    heads = config.num_attention_heads
    return 4 * heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def _maps(layer: nn.Module) -> list[tuple[str, Tensor]]:
    """Linear maps by name, GPT-2's Conv1D and adapters among them."""
    found = ((name, getattr(module, "weight", None)) for name, module in layer.named_modules() if _is_leaf(module))
    return [(name, weight) for name, weight in found if isinstance(weight, Tensor) and weight.ndim == 2]


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _reads_the_input(name: str) -> bool:
    parts = name.split(".")
    return bool(READ_THE_INPUT & set(parts)) and "lora_B" not in parts


def _layers(base: Any) -> nn.ModuleList | None:
    """The decoder layers, wherever an architecture keeps them; None: where there are none that we know."""
    count = getattr(base.config, "num_hidden_layers", None)
    if getattr(base.config, "num_attention_heads", None) is None:
        return None
    return next((m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == count), None)


def _sizes(weights: Iterable[Tensor]) -> int:
    """Operations per row of the products with these weights."""
    return sum(2 * weight.numel() for weight in weights)
