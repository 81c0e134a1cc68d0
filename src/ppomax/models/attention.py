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

from ppomax.types import Packing, SetupError, token_batch

NAME = "ppomax_folded"
LONGEST_FOLDED = 1024
# Rounding between matrix products of different shapes; a wrong mask or position is off by far more.
PACKING_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-8}
# Where a difference ends the run, and not only a short cut, it has to be larger.
SLACK = 4.0
# Keyword arguments that change the scores beyond a scale and a mask.
UNSUPPORTED = ("softcap", "s_aux", "position_bias")


def folded_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, packing: Packing | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Softmax(q·kᵀ·scaling + mask)·v; query [B, heads, T, D], key and value [B, kv_heads, S, D] → [B, T, heads, D].

    With `packing`, B = 1 and T = S = N packed tokens: each sees its own sequence up to itself, whatever the mask says.
    """
    if packing is not None:
        return _packed_attention(module, query, key, value, packing, dropout=dropout, scaling=scaling, **kwargs), None
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
    if attention_mask is not None and groups > 1 and attention_mask.shape[1] > 1:
        raise SetupError(
            f"{type(module).__name__}: found a mask of its own for each head; this architecture is not supported"
        )
    scale = float(D) ** -0.5 if scaling is None else scaling
    if T == 1:
        # Decoding: the fused kernel reads the strided cache in place, where a batched product would copy it.
        folded = query.reshape(B, kv_heads, groups, D)
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=attention_mask, scale=scale)
        return out.reshape(B, 1, heads, -1), None
    folded = (query * scale).reshape(B * kv_heads, groups * T, D)
    scores = torch.bmm(folded, key.reshape(B * kv_heads, S, D).transpose(1, 2)).view(B, kv_heads, groups, T, S)
    if attention_mask is not None:
        scores.add_(attention_mask[:, :, None])
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    out = torch.bmm(weights.view(B * kv_heads, groups * T, S), value.reshape(B * kv_heads, S, -1))
    return out.view(B, heads, T, -1).transpose(1, 2).contiguous(), None


def _packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, packing: Packing, **kwargs: Any
) -> Tensor:
    """Prompts among themselves, then each response over its prompt and itself; [1, heads, N, D] → [1, N, heads, D]."""
    query_N, key_N, value_N = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    G, P = packing.prompt_GP.shape
    B = len(packing.response_BR)
    prompt, response = packing.prompt_GP.flatten(), packing.response_BR.flatten()
    of_response = packing.prompt_GP[packing.prompt_B]
    seen = torch.cat([of_response, packing.response_BR], dim=1).flatten()
    causal = torch.ones(P, P, dtype=torch.bool, device=query.device).tril()[None, None]

    def block(x_N: Tensor, index: Tensor, rows: int) -> Tensor:
        return x_N.index_select(0, index).view(rows, -1, *x_N.shape[1:]).transpose(1, 2)

    of_prompts, _ = folded_attention(
        module, block(query_N, prompt, G), block(key_N, prompt, G), block(value_N, prompt, G),
        additive(causal, query.dtype), **kwargs,
    )  # fmt: skip
    of_responses, _ = folded_attention(
        module, block(query_N, response, B), block(key_N, seen, B), block(value_N, seen, B),
        additive(packing.visible_BRS[:, None], query.dtype), **kwargs,
    )  # fmt: skip
    return torch.cat([of_prompts.flatten(0, 1), of_responses.flatten(0, 1)]).index_select(0, packing.block_N)[None]


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask (True = may be seen) as what is added to the scores."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)


def packed_states(stack: Any, packing: Packing, **inputs: Tensor) -> Tensor:
    """Last states [N, H] of a stack of layers over packed ids or states [1, N(, H)], given by transformers' name."""
    x = next(iter(inputs.values()))
    # transformers hands on a mask with four axes as it is and builds no [N, N] mask of its own.
    no_mask = torch.zeros(1, 1, 1, 1, device=x.device)
    out = stack(
        **inputs, position_ids=packing.position_N[None], attention_mask=no_mask, use_cache=False, packing=packing
    )  # fmt: skip
    return out.last_hidden_state[0]


@torch.inference_mode()
def packing_is_exact(base: Any) -> bool:
    """Whether a decoder stack gives packed tokens the states that padded rows have, tried on a few tokens.

    False on devices with another attention, and for architectures with windows, which a few tokens do not show, or
    whose layers do not hand the packing on.
    """
    if getattr(base.config, "_attn_implementation", None) != NAME or set(_layer_types(base)) != {"full_attention"}:
        return False
    device = next(base.parameters()).device
    batch = token_batch([[1, 2, 3], [4], [1, 2, 3]], [[4, 5], [6, 7, 8], [9]], device=str(device))
    padded = base(input_ids=batch.ids_BT, use_cache=False).last_hidden_state.flatten(0, 1)
    ids_N = batch.ids_BT.flatten().index_select(0, batch.packing.source_N)
    try:
        packed = packed_states(base, batch.packing, input_ids=ids_N[None])
    except (TypeError, ValueError, RuntimeError):
        return False
    expected = padded.index_select(0, batch.packing.source_N).float()
    return near(packed, expected)


@torch.inference_mode()
def is_causal(base: Any) -> bool:
    """Whether no token's state depends on later tokens, tried on a few; states that are no numbers say nothing."""
    ids = torch.arange(1, 5, device=next(base.parameters()).device)[None, :]
    whole, start = (base(input_ids=x, use_cache=False).last_hidden_state for x in (ids, ids[:, :2]))
    return near(start, whole[:, :2], slack=SLACK) or not bool(torch.isfinite(whole).all())


def near(found: Tensor, expected: Tensor, *, slack: float = 1.0) -> bool:
    """Whether two readings of the same states are equal up to rounding."""
    difference = (found.float() - expected.float()).abs().max()
    return bool(difference <= slack * PACKING_TOLERANCE[found.dtype] * expected.float().abs().max())


def _layer_types(base: Any) -> list[str]:
    config = base.config
    if getattr(config, "index_topk", None) is not None:  # attention that chooses its keys, once there are many
        return ["sparse_attention"]
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]


def attention_for(device: torch.device) -> str:
    """The name of the attention implementation that is fastest on a device."""
    if device.type != "cpu":
        return "sdpa"
    AttentionInterface.register(NAME, folded_attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    return NAME


def without_plans(device: torch.device) -> None:
    """Take cuDNN out of PyTorch's choice of attention kernels on GPUs, for this whole process.

    It builds a plan for every new shape, and here nearly every batch, and every token that is decoded, has its own.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
