"""Views of a decoder stack's lower and upper layers, which share its parameters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def lower_view(base: Any, count: int) -> Any:
    """The embeddings and the first `count` layers: ids in, raw states out (no final norm)."""
    return _view(base, layers=base.layers[:count], norm=nn.Identity())


def upper_view(base: Any, count: int) -> Any:
    """The layers from `count` on and the final norm: called with `inputs_embeds` = the lower view's states."""
    return _view(base, layers=base.layers[count:])


def split_is_exact(base: Any, count: int) -> bool:
    """Whether lower + upper views give what the whole stack gives, tried on a few tokens.

    False for architectures whose layers are not interchangeable with inputs_embeds (scaled embeddings, say), and for
    those that choose a layer's attention by its number, which a view shifts: a few tokens do not show a long window.
    """
    if not (
        isinstance(getattr(base, "layers", None), nn.ModuleList) and isinstance(getattr(base, "norm", None), nn.Module)
    ):
        return False
    if len(set(getattr(base.config, "layer_types", None) or ())) > 1:
        return False
    ids = torch.arange(1, 9, device=next(base.parameters()).device)[None, :]
    with torch.inference_mode():
        whole: Tensor = base(input_ids=ids, use_cache=False).last_hidden_state
        states = lower_view(base, count)(input_ids=ids, use_cache=False).last_hidden_state
        split: Tensor = upper_view(base, count)(inputs_embeds=states, use_cache=False).last_hidden_state
    return bool(torch.equal(whole, split))


def _view(base: Any, **replaced: nn.Module) -> Any:
    view = copy.copy(base)
    view._modules = {**base._modules, **replaced}
    return view
