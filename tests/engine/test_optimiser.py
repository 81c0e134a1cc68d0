"""AdamW on float32 masters: a reference in float32 is followed, whatever precision the model computes in."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.architectures import batch_of, make_model
from torch import Tensor, nn

from ppomax.engine.optimiser import Optimiser, learning_rate
from ppomax.models.players import Policy

SHAPES = {"embed.weight": (6, 3), "layers.0.weight": (4, 3), "layers.0.bias": (4,), "norm.weight": (3,)}
SETTINGS: dict[str, Any] = {"weight_decay": 0.0, "betas": (0.9, 0.95), "eps": 1e-8, "max_grad_norm": None}


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for name, shape in SHAPES.items()}


def gradients(step: int, size: float = 1.0) -> dict[str, Tensor]:
    """Numbers that bfloat16 holds exactly, so that both precisions are given the same ones."""
    draw = torch.Generator().manual_seed(1000 + step)
    return {name: (size * torch.randn(shape, generator=draw)).bfloat16().float() for name, shape in SHAPES.items()}


def backward(params: dict[str, nn.Parameter], given_gradients: dict[str, Tensor]) -> None:
    """A backward pass that arrives at every parameter with the given gradient."""
    sum((p * given_gradients[name].to(p.dtype)).sum() for name, p in params.items()).backward()


def optimiser_of(params: dict[str, nn.Parameter], **changed: Any) -> Optimiser:
    return Optimiser(params, **{**SETTINGS, **changed})


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: t.detach().float().numpy().tobytes() for name, t in tensors.items()}


def adamw_by_hand(
    start: Tensor, steps: list[Tensor], lr: float, decay: float, betas: tuple[float, float], eps: float
) -> Tensor:
    """Loshchilov & Hutter (2019), algorithm 2, in float64."""
    w, m, v = start.double(), torch.zeros_like(start).double(), torch.zeros_like(start).double()
    for t, g in enumerate((g.double() for g in steps), 1):
        w = w - lr * decay * w
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        w = w - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return w


def test_trap_23_masters_and_moments_are_float32_and_the_model_follows_them() -> None:
    low = parameters(torch.bfloat16)
    optimiser = optimiser_of(low, weight_decay=0.1)
    start = {name: p.detach().float() for name, p in low.items()}
    for step in range(20):
        backward(low, gradients(step))
        optimiser.step(1e-3)
    assert all(t.dtype == torch.float32 for t in optimiser.state_tensors().values())
    for name, parameter in low.items():
        decay = 0.1 if name == "layers.0.weight" else 0.0
        expected = adamw_by_hand(
            start[name], [gradients(step)[name] for step in range(20)], 1e-3, decay, (0.9, 0.95), 1e-8
        )
        torch.testing.assert_close(optimiser.masters[name].double(), expected, atol=1e-6, rtol=1e-6)
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, optimiser.masters[name].bfloat16())


def test_trap_23_steps_below_the_precision_of_bfloat16_are_not_lost() -> None:
    # 1 + 1e-4 rounds to 1 in bfloat16; forty steps of 1e-4 in one direction must add up to 4e-3.
    low = {"w": nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))}
    optimiser = optimiser_of(low)
    for _ in range(40):
        low["w"].sum().backward()
        optimiser.step(1e-4)
    torch.testing.assert_close(optimiser.masters["w"], torch.full((2, 2), 1 - 40e-4), atol=1e-6, rtol=0)
    assert float(low["w"][0, 0].detach()) == 0.99609375, "1 − 40e-4 to the nearest bfloat16"


def test_float32_parameters_are_their_own_masters() -> None:
    full = parameters()
    optimiser = optimiser_of(full)
    assert all(optimiser.masters[name] is parameter for name, parameter in full.items())
    start = {name: p.detach().clone() for name, p in full.items()}
    backward(full, gradients(0))
    optimiser.step(1e-2)
    for name, parameter in full.items():
        expected = adamw_by_hand(start[name], [gradients(0)[name]], 1e-2, 0.0, (0.9, 0.95), 1e-8)
        torch.testing.assert_close(parameter.detach().double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trap_19_microbatches_add_up_in_float32(dtype: torch.dtype) -> None:
    # 256 + 1 is 256 in bfloat16: 64 ones after a 256 are lost unless they are added in float32.
    params = {"w": nn.Parameter(torch.zeros(2, 2, dtype=dtype))}
    optimiser = optimiser_of(params)
    for size in (256.0, *[1.0] * 64):
        (params["w"] * size).sum().backward()
    assert optimiser.masters["w"].grad.dtype == torch.float32
    assert optimiser.masters["w"].grad.tolist() == [[320.0, 320.0]] * 2
    assert optimiser.gradient_norm() == pytest.approx(640.0)
    if dtype == torch.bfloat16:
        assert params["w"].grad is None, "the low-precision gradient is freed at once"
    optimiser.zero_grad()
    assert optimiser.gradient_norm() == 0.0 and params["w"].grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trap_21_the_clip_is_global_over_all_parameters(dtype: torch.dtype) -> None:
    params = {"a": nn.Parameter(torch.zeros(2, 2, dtype=dtype)), "b": nn.Parameter(torch.zeros(1, dtype=dtype))}
    optimiser = Optimiser(params, **{**SETTINGS, "max_grad_norm": 2.0})
    # 2² + 2² + 2² + 2² + 3² = 25: norm 5, so everything is scaled by 2/5.
    ((2 * params["a"]).sum() + (3 * params["b"]).sum()).backward()
    assert optimiser.step(0.1) == pytest.approx(5.0)
    moments = optimiser.state_tensors()
    torch.testing.assert_close(moments["exp_avg.a"], torch.full((2, 2), 0.1 * 0.8), atol=1e-6, rtol=0)
    torch.testing.assert_close(moments["exp_avg.b"], torch.tensor([0.1 * 1.2]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("limit", [5.1, None])
def test_trap_21_a_small_gradient_is_not_scaled(limit: float | None) -> None:
    params = {"a": nn.Parameter(torch.zeros(2, 2)), "b": nn.Parameter(torch.zeros(1))}
    optimiser = Optimiser(params, **{**SETTINGS, "max_grad_norm": limit})
    ((2 * params["a"]).sum() + (3 * params["b"]).sum()).backward()
    assert optimiser.step(0.1) == pytest.approx(5.0), "the norm before clipping"
    assert torch.equal(optimiser.state_tensors()["exp_avg.b"], torch.tensor([0.1 * 3.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_trap_21_a_gradient_that_is_not_finite_changes_nothing(dtype: torch.dtype, poison: float) -> None:
    params, twin = parameters(dtype), parameters(dtype)
    optimiser, reference = optimiser_of(params, max_grad_norm=1.0), optimiser_of(twin, max_grad_norm=1.0)
    for step in range(3):
        backward(params, gradients(step))
        backward(twin, gradients(step))
        optimiser.step(1e-2)
        reference.step(1e-2)
    before = bits(optimiser.state_tensors()), bits(params)
    bad = gradients(3)
    bad["layers.0.bias"][1] = poison
    backward(params, bad)
    assert not math.isfinite(optimiser.step(1e-2))
    assert (bits(optimiser.state_tensors()), bits(params)) == before
    # The next step begins clean and is that of a run that never saw the bad one.
    for which, mine in ((params, optimiser), (twin, reference)):
        backward(which, gradients(4))
        mine.step(1e-2)
    assert bits(optimiser.state_tensors()) == bits(reference.state_tensors())


def decayed_names(names_and_shapes: dict[str, tuple[int, ...]]) -> set[str]:
    """Which parameters shrink when the gradient is zero."""
    params = {name: nn.Parameter(torch.ones(shape)) for name, shape in names_and_shapes.items()}
    optimiser = optimiser_of(params, weight_decay=0.5)
    sum((p * 0).sum() for p in params.values()).backward()
    optimiser.step(0.1)
    for parameter in params.values():
        assert parameter.unique().numel() == 1 and float(parameter.detach().view(-1)[0]) in (1.0, pytest.approx(0.95))
    return {name for name, p in params.items() if float(p.detach().view(-1)[0]) < 1}


def test_trap_23_decay_spares_biases_norms_embeddings_and_scalar_heads() -> None:
    assert decayed_names(
        {
            "model.embed_tokens.weight": (6, 4), "model.layers.0.mlp.up_proj.weight": (5, 4),
            "model.layers.0.self_attn.q_proj.bias": (4,), "model.layers.0.input_layernorm.weight": (4,),
            "model.norm.weight": (4,), "lm_head.weight": (6, 4), "score.weight": (1, 4),
            "transformer.wte.weight": (6, 4), "transformer.wpe.weight": (9, 4), "gpt_neox.embed_in.weight": (6, 4),
        }
    ) == {"model.layers.0.mlp.up_proj.weight", "lm_head.weight"}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox"])
def test_trap_23_in_real_families_only_linear_layers_decay(family: str) -> None:
    shapes = {name: tuple(p.shape) for name, p in make_model(family).named_parameters()}
    decayed = decayed_names(shapes)
    linear = (".layers.", ".h.", "lm_head")
    assert decayed == {n for n, s in shapes.items() if len(s) == 2 and any(part in n for part in linear)}
    assert len(decayed) >= 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trap_29_a_restored_optimiser_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimiser = optimiser_of(params, weight_decay=0.1, max_grad_norm=1.0)

    def advance(which: dict[str, nn.Parameter], mine: Optimiser, first: int, last: int) -> None:
        for step in range(first, last):
            backward(which, gradients(step))
            mine.step(1e-2 / (step + 1))

    advance(params, optimiser, 0, 4)
    saved = {name: t.clone() for name, t in optimiser.state_tensors().items()}
    assert len(saved) == 4 * len(SHAPES)
    advance(params, optimiser, 4, 8)
    for seed in (0, 99):
        others = parameters(dtype, seed)  # other weights: all that counts is in the state
        restored = optimiser_of(others, weight_decay=0.1, max_grad_norm=1.0)
        restored.load_state_tensors(saved)
        assert bits(restored.state_tensors()) == bits(saved)
        assert all(torch.equal(p, restored.masters[name].to(dtype)) for name, p in others.items())
        advance(others, restored, 4, 8)
        assert bits(restored.state_tensors()) == bits(optimiser.state_tensors()) and bits(others) == bits(params)


def test_a_restored_state_is_a_copy_and_replaces_everything() -> None:
    params = parameters()
    optimiser = optimiser_of(params)
    fresh = {name: t.clone() for name, t in optimiser.state_tensors().items()}
    assert set(fresh) == {f"master.{name}" for name in SHAPES}, "no moments before the first step"
    backward(params, gradients(0))
    optimiser.step(1e-2)
    stepped = {name: t.clone() for name, t in optimiser.state_tensors().items()}
    optimiser.load_state_tensors(fresh)
    assert bits(optimiser.state_tensors()) == bits(fresh), "moments of a later step do not survive"
    optimiser.load_state_tensors(stepped)
    kept = bits(stepped)
    backward(params, gradients(1))
    optimiser.step(1e-2)
    assert bits(stepped) == kept


def test_a_checkpoint_is_read_into_the_masters_and_its_moments_are_kept() -> None:
    params = parameters(torch.bfloat16)
    optimiser = optimiser_of(params)
    empty = optimiser.empty_state()
    assert all(empty[f"master.{n}"].data_ptr() == master.data_ptr() for n, master in optimiser.masters.items())
    moments = {name: torch.full_like(tensor, 0.5) for name, tensor in empty.items() if "exp_avg" in name}
    steps = {f"step.{name}": torch.tensor(3.0) for name in optimiser.masters}
    for master in optimiser.masters.values():
        master.data.fill_(2.0)
    optimiser.load_state_tensors({**empty, **moments, **steps}, adopt=True)
    assert all(bool((p == 2.0).all()) for p in params.values())
    assert all(optimiser.state_tensors()[name].data_ptr() == tensor.data_ptr() for name, tensor in moments.items())


def test_size_of_the_state_is_known_before_the_first_step() -> None:
    params = parameters(torch.bfloat16)
    optimiser = optimiser_of(params)
    announced = optimiser.bytes()
    backward(params, gradients(0))
    optimiser.step(1e-3)
    assert announced == sum(t.numel() * t.element_size() for t in optimiser.state_tensors().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaling_reaches_the_parameter_and_its_master(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimiser, before = optimiser_of(params), parameters(dtype)
    optimiser.scale("layers.0.weight", 0.3)
    master = optimiser.masters["layers.0.weight"]
    torch.testing.assert_close(master, before["layers.0.weight"].detach().float() * 0.3, atol=1e-7, rtol=1e-6)
    assert torch.equal(params["layers.0.weight"], master.to(dtype))
    assert torch.equal(params["norm.weight"], before["norm.weight"])


def test_parameters_without_a_gradient_stay() -> None:
    params = parameters()
    optimiser = optimiser_of(params, weight_decay=0.5)
    before = params["layers.0.weight"].detach().clone()
    params["norm.weight"].sum().backward()
    optimiser.step(1e-2)
    assert torch.equal(params["layers.0.weight"], before)


def test_a_tied_parameter_is_counted_once() -> None:
    # Input and output use of one matrix: two contributions, one master, one step.
    player = Policy(make_model("llama").to(torch.bfloat16), train_layers=None, trained=True)
    optimiser = optimiser_of(player.trained_parameters())
    assert "lm_head.weight" not in optimiser.masters
    player(batch_of()).logprobs_BT.sum().backward()
    table = optimiser.masters["model.embed_tokens.weight"]
    assert bool(table.grad.any()) and player.base.embed_tokens.weight.grad is None
    optimiser.step(1e-3)
    assert torch.equal(player.model.get_output_embeddings().weight, table.bfloat16())


RATE: dict[str, Any] = {"peak": 2.0, "warmup": 0.2, "schedule": "cosine", "floor": 0.1}


def test_trap_22_warm_up_then_cosine_by_hand() -> None:
    # total 12, warm-up round(2.4) = 2 steps: 1, 2; then 10 steps of cosine from 2 to 0.2.
    rates = [learning_rate(step, 12, **RATE) for step in range(12)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[11] == pytest.approx(0.2)
    # Step 5 is a third of the way: cos(π/3) = 1/2, so 2·(0.1 + 0.9·0.75) = 1.55.
    assert rates[5] == pytest.approx(1.55)
    # After the last step a cosine would rise again: at step 21 it would be back at its peak.
    assert [learning_rate(step, 12, **RATE) for step in (12, 16, 21, 50)] == pytest.approx([0.2] * 4)


def test_linear_and_constant_by_hand() -> None:
    linear = [learning_rate(step, 7, **{**RATE, "warmup": 0.0, "schedule": "linear"}) for step in range(7)]
    assert linear == pytest.approx([2.0, 1.7, 1.4, 1.1, 0.8, 0.5, 0.2])
    constant = [learning_rate(step, 10, **{**RATE, "schedule": "constant"}) for step in range(14)]
    assert constant == pytest.approx([1.0, *[2.0] * 13])


@given(st.integers(1, 60), st.floats(0, 1), st.sampled_from(["cosine", "linear", "constant"]), st.floats(0, 1))
def test_trap_22_after_the_peak_the_rate_never_rises(total: int, warmup: float, schedule: str, floor: float) -> None:
    rates = [
        learning_rate(step, total, peak=1.0, warmup=warmup, schedule=schedule, floor=floor)
        for step in range(3 * total + 5)
    ]
    rising = round(warmup * total)
    assert all(0 < r <= 1 for r in rates[:rising]) and rates[:rising] == sorted(rates[:rising])
    if rising:
        assert rates[rising - 1] == 1.0
    fallen = rates[rising:]
    assert all(a >= b for a, b in pairwise(fallen))
    assert min(fallen) >= floor - 1e-12
    end = max(total, rising + 1)
    assert set(rates[end + 1 :]) == {rates[-1]}, "flat after the end"
    assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else floor)


def test_trap_22_a_resumed_schedule_continues() -> None:
    # A function of the step number alone has nothing to restore.
    whole = [learning_rate(step, 30, **RATE) for step in range(30)]
    assert [learning_rate(step, 30, **RATE) for step in range(17, 30)] == whole[17:]
