"""The shape of a decoder without its weights: from config.json or from a size such as 7b."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from ppomax.errors import first_line
from ppomax.models.flops import has_experts
from ppomax.models.load import UNREADABLE, model_directory
from ppomax.types import SetupError

Sizes = tuple[int, int, int, int, int, int, bool]
# hidden, layers, heads, key/value heads, intermediate, vocabulary, tied: of published Llama-like models.
KNOWN: dict[str, tuple[str, Sizes]] = {
    "135m": ("SmolLM2-135M", (576, 30, 9, 3, 1536, 49152, True)),
    "360m": ("SmolLM2-360M", (960, 32, 15, 5, 2560, 49152, True)),
    "1.1b": ("TinyLlama-1.1B", (2048, 22, 32, 4, 5632, 32000, False)),
    "1.3b": ("Sheared-LLaMA-1.3B", (2048, 24, 16, 16, 5504, 32000, False)),
    "1.7b": ("SmolLM2-1.7B", (2048, 24, 32, 32, 8192, 49152, True)),
    "3b": ("Llama-3.2-3B", (3072, 28, 24, 8, 8192, 128256, True)),
    "7b": ("Llama-2-7B", (4096, 32, 32, 32, 11008, 32000, False)),
    "8b": ("Llama-3-8B", (4096, 32, 32, 8, 14336, 128256, False)),
    "13b": ("Llama-2-13B", (5120, 40, 40, 40, 13824, 32000, False)),
    "34b": ("CodeLlama-34B", (8192, 48, 64, 8, 22016, 32000, False)),
    "65b": ("LLaMA-65B", (8192, 80, 64, 64, 22016, 32000, False)),
    "70b": ("Llama-2-70B", (8192, 80, 64, 8, 28672, 32000, False)),
}
# Converting it takes seconds and its weights; its shape is known.
EMBEDDED = {"smollm2-135m": "135m"}


@dataclass(frozen=True)
class Shape:
    """A decoder's axes and its parameters by part; two that differ in name alone are equal.

    embedding: of the vocabulary; layer: one decoder layer; matrices: of it, those in matrix products; rank_one: what
    one rank of adapters adds to a layer (in + out of each matrix); rest: final norm, positions; unembedding: 0 if it
    is the embedding.
    """

    name: str = field(compare=False)
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    gated: bool
    vocabulary: int
    embedding: int
    layer: int
    matrices: int
    rank_one: int
    rest: int
    unembedding: int

    @property
    def causal(self) -> int:
        """Parameters of the language model."""
        return self.embedding + self.layers * self.layer + self.rest + self.unembedding

    @property
    def scalar(self) -> int:
        """Parameters of a reward model or critic: the scalar head instead of the unembedding."""
        return self.causal - self.unembedding + self.hidden

    @property
    def kv_elements(self) -> int:
        """Numbers that the cache holds for one token: keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.causal / 1e9:.3g} B parameters, {self.layers} layers × {self.hidden}, "
            f"{self.heads} heads ({self.kv_heads} for keys and values), intermediate {self.intermediate}, "
            f"vocabulary {self.vocabulary:,}"
        )


def shape_named(name: str) -> Shape:
    """The shape of a model directory, hub name or embedded model; reads config.json, never the weights."""
    if name in EMBEDDED:
        return shape_sized(EMBEDDED[name], 0)
    try:
        return shape_of(AutoConfig.from_pretrained(model_directory(name), trust_remote_code=False), name)
    except UNREADABLE as error:
        if isinstance(error, SetupError):
            raise
        raise SetupError(f"{name}: its config.json cannot be read: {first_line(error)}") from None


def shape_sized(text: str, parameters: float) -> Shape:
    """The shape of a published model of that size or, for other sizes, one between its neighbours."""
    known = KNOWN.get(text.strip().lower())
    name, sizes = known if known is not None else (f"{text} (interpolated)", between(parameters))
    return shape_of(llama_config(sizes), name)


def llama_config(sizes: Sizes, **more: Any) -> LlamaConfig:
    """The configuration of a Llama of these sizes."""
    hidden, layers, heads, kv_heads, intermediate, vocabulary, tied = sizes
    return LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=intermediate, vocab_size=vocabulary, tie_word_embeddings=tied, **more,
    )  # fmt: skip


def between(parameters: float) -> Sizes:
    """Sizes for a number of parameters: proportions of the nearest published model, depth between two neighbours.

    The width H solves L·(2 + 2κ + 3ρ)·H² + v·V·H = parameters, with κ = kv heads / heads, ρ = intermediate / H and
    v = 1 where the embedding is the unembedding, else 2; it is rounded to whole heads, and the MLP takes up the rest.
    """
    models = sorted((_count(sizes), sizes) for _, sizes in KNOWN.values())
    size, nearest = min(models, key=lambda model: abs(math.log(model[0] / parameters)))
    below = [model for model in models if model[0] <= parameters]
    above = [model for model in models if model[0] >= parameters]
    if below and above:
        (low, shallow), (high, deep) = below[-1], above[0]
        share = 0.0 if low == high else math.log(parameters / low) / math.log(high / low)
        layers = round(shallow[1] ** (1 - share) * deep[1] ** share)
    else:  # beyond the table depth and both widths grow or shrink alike
        layers = max(1, round(nearest[1] * (parameters / size) ** (1 / 3)))
    width, _, heads, kv_heads, intermediate, vocabulary, tied = nearest
    head = width // heads
    square = layers * (2 + 2 * kv_heads / heads + 3 * intermediate / width)
    linear = vocabulary * (1 if tied else 2)
    hidden = (math.sqrt(linear**2 + 4 * square * parameters) - linear) / (2 * square)
    groups = heads // kv_heads
    new_kv_heads = max(1, round(hidden / head / groups))
    hidden = new_kv_heads * groups * head
    without = _count((hidden, layers, new_kv_heads * groups, new_kv_heads, 0, vocabulary, tied))
    wide = max(head, round((parameters - without) / (3 * layers * hidden)))
    return hidden, layers, new_kv_heads * groups, new_kv_heads, wide, vocabulary, tied


def _count(sizes: Sizes) -> float:
    hidden, layers, heads, kv_heads, intermediate, vocabulary, tied = sizes
    layer = (2 + 2 * kv_heads / heads) * hidden**2 + 3 * hidden * intermediate + 2 * hidden
    return layers * layer + (1 if tied else 2) * vocabulary * hidden + hidden


def shape_of(config: Any, name: str) -> Shape:
    """The shape of an architecture: its modules are made on the meta device, where they take no memory."""
    try:
        config = config.get_text_config()  # of a model that reads images too, the part that is trained
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            model.tie_weights()  # the first versions of transformers 5 leave it to whoever makes a model this way
    except UNREADABLE as error:
        raise SetupError(f"{name}: no causal LM can be made of its config.json: {error}") from None
    base: Any = getattr(model, model.base_model_prefix)
    stacks = [module for module in base.children() if isinstance(module, nn.ModuleList)]
    sizes = {sum(p.numel() for p in layer.parameters()) for stack in stacks for layer in stack}
    if len(stacks) != 1 or len(sizes) != 1 or has_experts(config):
        raise SetupError(
            f"{name}: found {type(model).__name__}, expected one stack of equal, dense decoder layers; "
            "this architecture cannot be planned"
        )
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    layer = sizes.pop()
    unembedding = 0 if head.weight is embedding else head.weight.numel()
    unembedding += 0 if head.bias is None else head.bias.numel()
    matrices = [p for p in stacks[0][0].parameters() if p.ndim == 2]
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    intermediate = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    return Shape(
        name, len(stacks[0]), hidden, heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
        intermediate=int(intermediate),
        gated=sum(intermediate in p.shape for p in matrices) > 2,
        vocabulary=embedding.shape[0],
        embedding=embedding.numel(),
        layer=layer,
        matrices=sum(p.numel() for p in matrices),
        rank_one=sum(sum(p.shape) for p in matrices),
        rest=sum(p.numel() for p in base.parameters()) - embedding.numel() - len(stacks[0]) * layer,
        unembedding=unembedding,
    )  # fmt: skip
