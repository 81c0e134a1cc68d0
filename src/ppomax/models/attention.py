"""Attention for CPUs: batched matrix products with the grouped query heads folded into the query axis.

On CPU, PyTorch's fused kernel expands grouped heads and has a slow backward pass; plain batched products over the
key/value heads are several times faster for the lengths of dialogue turns. Longer sequences go to the fused kernel,
which never holds the [heads, T, T] scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ppomax.types import SetupError

NAME = "ppomax_folded"
LONGEST_FOLDED = 1024
# Keyword arguments that change the scores beyond a scale and a mask.
UNSUPPORTED = ("softcap", "s_aux", "position_bias")


def folded_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Softmax(q·kᵀ·scaling + mask)·v; query [B, heads, T, D], key and value [B, kv_heads, S, D] → [B, T, heads, D]."""
    B, heads, T, D = query.shape
    kv_heads, S = key.shape[1], key.shape[2]
    for option in UNSUPPORTED:
        if kwargs.get(option) is not None:
            raise SetupError(
                f"{type(module).__name__}: its attention needs {option}; this architecture is not supported"
            )
    if max(T, S) > LONGEST_FOLDED or dropout:
        fused = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return fused(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    groups = heads // kv_heads
    scale = float(D) ** -0.5 if scaling is None else scaling
    if T == 1:
        # Decoding: the fused kernel reads the strided cache in place, where a batched product would copy it.
        folded = query.reshape(B, kv_heads, groups, D)
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=attention_mask, scale=scale)
        return out.reshape(B, 1, heads, -1), None
    folded = (query * scale).reshape(B * kv_heads, groups * T, D)
    scores = torch.bmm(folded, key.reshape(B * kv_heads, S, D).transpose(1, 2)).view(B, kv_heads, groups, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask[:, :, None]
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    out = torch.bmm(weights.view(B * kv_heads, groups * T, S), value.reshape(B * kv_heads, S, -1))
    return out.view(B, heads, T, -1).transpose(1, 2).contiguous(), None


def attention_for(device: torch.device) -> str:
    """The name of the attention implementation that is fastest on a device."""
    if device.type != "cpu":
        return "sdpa"
    AttentionInterface.register(NAME, folded_attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    return NAME
