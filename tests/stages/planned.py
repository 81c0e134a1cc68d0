"""A small Llama as the planner sees it, and a processor to plan for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig

from ppomax.models.attention import attention_for
from ppomax.models.shapes import shape_of
from ppomax.stages.plan import GIB
from ppomax.stages.plan_memory import (
    Machine,
    Role,
)

CPU = Machine(1, 24 * GIB, 4, packs=True)
SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 500, "tie_word_embeddings": True, "pad_token_id": 0,
}  # fmt: skip
OPTIMISER: dict[str, Any] = {"weight_decay": 0.0, "betas": (0.9, 0.95), "eps": 1e-8, "max_grad_norm": 1.0}


def small(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**SMALL, **changes}, attn_implementation=attention_for(torch.device("cpu")))


def role(name: str = "policy", *, scalar: bool = False, trained: bool = True, **more: Any) -> Role:
    return Role(name, shape_of(small(), "small"), scalar, trained, **more)


def numel(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
