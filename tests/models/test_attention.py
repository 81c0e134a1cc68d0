"""The folded attention is transformers' eager attention, with gradients, for every head layout and mask."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import eager_attention_forward

from models.architectures import policy
from ppomax.models import attention as module
from ppomax.models.attention import attention_for, folded_attention, is_causal
from ppomax.types import SetupError

TOLERANCE = 1e-6
HIDDEN = torch.finfo(torch.float32).min


def problem(heads: int, kv_heads: int, T: int, S: int, D: int = 8) -> tuple[SimpleNamespace, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(heads * 100 + T)
    query, key, value = (torch.randn(3, h, n, D, generator=draw) for h, n in ((heads, T), (kv_heads, S), (kv_heads, S)))
    layer = SimpleNamespace(num_key_value_groups=heads // kv_heads, training=False, is_causal=True)
    return layer, query, key, value


def causal(T: int, S: int, padding: tuple[int, ...] = (0, 0, 0)) -> Tensor:
    """Additive [3, 1, T, S]: query t sees keys up to S − T + t, without the first `padding` of its row."""
    keys, queries = torch.arange(S)[None, None], torch.arange(T)[None, :, None] + S - T
    seen = (keys <= queries) & (keys >= torch.tensor(padding)[:, None, None])
    return torch.where(seen, 0.0, HIDDEN)[:, None]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize(("T", "S"), [(7, 7), (1, 7), (3, 7), (1, 1)])
@pytest.mark.parametrize("padding", [(0, 0, 0), (0, 2, 4)])
@pytest.mark.parametrize("scaling", [None, 0.2])
def test_equal_to_eager_attention(
    heads: int, kv_heads: int, T: int, S: int, padding: tuple[int, ...], scaling: float | None
) -> None:
    if S == 1 and any(padding):
        padding = (0, 0, 0)
    layer, query, key, value = problem(heads, kv_heads, T, S)
    mask = causal(T, S, padding)
    ours, theirs = ([x.clone().requires_grad_() for x in (query, key, value)] for _ in range(2))
    found, weights = folded_attention(layer, *ours, mask, scaling=scaling)
    expected, _ = eager_attention_forward(layer, *theirs, mask, scaling=8**-0.5 if scaling is None else scaling)
    assert weights is None and found.shape == (3, T, heads, 8)
    # A query that is itself padding sees nothing: its output is defined by the fill value alone and never read.
    read = (torch.arange(T) + S - T)[None, :] >= torch.tensor(padding)[:, None]
    torch.testing.assert_close(found[read], expected[read], atol=TOLERANCE, rtol=TOLERANCE)
    above = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)) * read[..., None, None]
    found.backward(above)
    expected.backward(above)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=4 * TOLERANCE, rtol=1e-5)


def test_without_a_mask_every_key_is_seen() -> None:
    layer, query, key, value = problem(4, 2, 5, 5)
    found, _ = folded_attention(layer, query, key, value, None)
    expected, _ = eager_attention_forward(layer, query, key, value, None, scaling=8**-0.5)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(("T", "S"), [(9, 9), (1, 9), (2, 9)])
def test_beyond_the_longest_the_fused_kernel_computes_the_same(monkeypatch: pytest.MonkeyPatch, T: int, S: int) -> None:
    layer, query, key, value = problem(6, 2, T, S)
    mask = causal(T, S, (0, 3, 0))
    folded, _ = folded_attention(layer, query, key, value, mask)
    calls = []
    fused = module.ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watched(*args: object, **kwargs: object) -> object:
        calls.append(args[1].shape)
        return fused(*args, **kwargs)

    monkeypatch.setitem(module.ALL_ATTENTION_FUNCTIONS, "sdpa", watched)
    monkeypatch.setattr(module, "LONGEST_FOLDED", S)
    folded_attention(layer, query, key, value, mask)
    assert not calls
    monkeypatch.setattr(module, "LONGEST_FOLDED", S - 1)
    found, _ = folded_attention(layer, query, key, value, mask)
    assert len(calls) == 1
    read = (torch.arange(T) + S - T)[None, :] >= torch.tensor([0, 3, 0])[:, None]
    torch.testing.assert_close(found[read], folded[read], atol=TOLERANCE, rtol=1e-5)


@pytest.mark.parametrize("option", ["softcap", "s_aux", "position_bias"])
def test_attention_that_is_more_than_a_softmax_is_refused(option: str) -> None:
    layer, query, key, value = problem(4, 2, 5, 5)
    with pytest.raises(SetupError, match=re.escape(f"needs {option}")):
        folded_attention(layer, query, key, value, None, **{option: 30.0})


def test_bfloat16_softmax_is_taken_in_float32() -> None:
    layer, query, key, value = problem(4, 2, 6, 6)
    low = [x.bfloat16() for x in (query, key, value)]
    found, _ = folded_attention(layer, *low, causal(6, 6).bfloat16())
    exact, _ = folded_attention(layer, *(x.float() for x in low), causal(6, 6))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, atol=2**-6, rtol=2**-6)


def test_the_implementation_depends_on_the_device() -> None:
    assert attention_for(torch.device("cuda")) == "sdpa"
    assert attention_for(torch.device("cpu")) == module.NAME
    assert attention_for(torch.device("cpu")) == module.NAME  # registering twice is harmless


def test_on_a_gpu_no_kernel_needs_a_plan_for_every_shape() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        for device, left in (("cpu", True), ("cuda", False)):
            torch.backends.cuda.enable_cudnn_sdp(True)
            module.without_plans(torch.device(device))
            assert torch.backends.cuda.cudnn_sdp_enabled() == left
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_a_mask_for_each_head_is_refused_where_heads_share_keys() -> None:
    layer, query, key, value = problem(4, 2, 3, 3)
    mask = causal(3, 3).expand(-1, 4, -1, -1)
    with pytest.raises(SetupError, match="a mask of its own for each head"):
        folded_attention(layer, query, key, value, mask)
    layer, query, key, value = problem(4, 4, 3, 3)
    plain, _ = folded_attention(layer, query, key, value, causal(3, 3))
    assert torch.equal(folded_attention(layer, query, key, value, mask)[0], plain)


def test_states_that_are_no_numbers_do_not_count_as_looking_ahead(lively: str) -> None:
    base = policy(lively).base
    assert is_causal(base)
    with torch.no_grad():
        base.norm.weight.fill_(float("nan"))
    assert is_causal(base), "the damage is named elsewhere"
