"""Chunked log-probs against one float32 log_softmax over the whole vocabulary: values, gradients, entropy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppomax.models import logprobs as module
from ppomax.models.logprobs import Unembedded, token_entropy, token_kl, token_logprobs, token_statistics

N, H, V = 23, 16, 41
ROW_BYTES = 4 * V
TOLERANCE = 2e-6


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """States, weight, bias, targets (the first and the last id among them) and the gradient from above."""
    draw = torch.Generator().manual_seed(7)
    states, weight, bias, above = (
        (size * torch.randn(shape, generator=draw)).to(dtype)
        for size, shape in ((0.5, (N, H)), (1.0, (V, H)), (1.0, (V,)), (1.0, (N,)))
    )
    targets = torch.randint(0, V, (N,), generator=draw)
    targets[:2] = torch.tensor([0, V - 1])
    return states, weight, bias, targets, above.float()


def full(states: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """log softmax [N, V] as the definition says, in one piece."""
    logits = states.float() @ weight.float().T
    return torch.log_softmax((logits if bias is None else logits + bias.float()) / temperature, dim=-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows_at_once", [1, 7, N, 1000])
def test_values_and_gradients_are_those_of_log_softmax(
    monkeypatch: pytest.MonkeyPatch, temperature: float, with_bias: bool, rows_at_once: int
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", rows_at_once * ROW_BYTES)
    states, weight, bias, targets, above = problem()
    ours = [x.clone().requires_grad_() for x in (states, weight, bias)]
    theirs = [x.clone().requires_grad_() for x in (states, weight, bias)]
    found = token_logprobs(ours[0], ours[1], ours[2] if with_bias else None, targets, temperature=temperature)
    expected = full(theirs[0], theirs[1], theirs[2] if with_bias else None, temperature)[range(N), targets]
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
    (found * above).sum().backward()
    (expected * above).sum().backward()
    for name, a, b in zip(("states", "weight", "bias"), ours, theirs, strict=True):
        if name == "bias" and not with_bias:
            assert a.grad is None
            continue
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_the_chunk_size_changes_nothing_beyond_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    states, weight, bias, targets, _ = problem()
    whole = token_logprobs(states, weight, bias, targets, temperature=0.6)
    for rows in (1, 4, 22):
        monkeypatch.setattr(module, "CHUNK_BYTES", rows * ROW_BYTES)
        assert len(Unembedded(states, weight, bias).chunks()) == -(-N // rows)
        torch.testing.assert_close(
            token_logprobs(states, weight, bias, targets, temperature=0.6), whole, atol=TOLERANCE, rtol=0
        )


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 96, 97, 120, 200, 291])
def test_rows_of_logits_start_at_whole_vectors(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 100 * ROW_BYTES)
    _, weight, _, _, _ = problem()
    states = torch.randn(count, H, generator=torch.Generator().manual_seed(count))
    of = Unembedded(states, weight)
    room, sizes = of.room(), [rows.stop - rows.start for rows in of.chunks()]
    assert sum(sizes) == count and max(sizes, default=0) <= 96 and len(sizes) == -(-count // 96)
    assert max(sizes, default=0) - min(sizes, default=0) <= 8 * len(sizes), "a short last chunk costs much for little"
    for rows, n in zip(of.chunks(), sizes, strict=True):
        logits_Vn = of.logits(rows, 1.0, room)
        assert logits_Vn.stride() == (n if n < 64 else -(-n // 8) * 8, 1)
        torch.testing.assert_close(logits_Vn, weight @ states[rows].T)
    # Rows that end while others are decoded leave fewer, which may then be one larger chunk.
    fewer = Unembedded(states[:96], weight)
    for rows in fewer.chunks():
        torch.testing.assert_close(fewer.logits(rows, 1.0, room), weight @ states[rows].T)


def test_a_chunk_smaller_than_one_row_still_makes_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    states, weight, bias, targets, _ = problem()
    whole = token_logprobs(states, weight, bias, targets)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    torch.testing.assert_close(token_logprobs(states, weight, bias, targets), whole, atol=TOLERANCE, rtol=0)


def test_gradient_goes_only_where_it_is_wanted() -> None:
    states, weight, bias, targets, _ = problem()
    states.requires_grad_()
    token_logprobs(states, weight, bias, targets).sum().backward()
    assert states.grad is not None and weight.grad is None and bias.grad is None


def test_the_last_chunk_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 10 * ROW_BYTES)
    computed: list[slice] = []
    logits = Unembedded.logits

    def noted(self: Unembedded, rows: slice, temperature: float, room: Tensor) -> Tensor:
        computed.append(rows)
        return logits(self, rows, temperature, room)

    monkeypatch.setattr(Unembedded, "logits", noted)
    states, weight, bias, targets, above = problem()
    weight.requires_grad_()
    found = (token_logprobs(states, weight, bias, targets) * above).sum()
    first, second, third = computed
    found.backward(retain_graph=True)
    once = weight.grad.clone()
    assert computed[3:] == [second, first]
    found.backward()  # what waited is gone
    assert computed[5:] == [third, second, first]
    torch.testing.assert_close(weight.grad - once, once)


def test_slopes_wait_only_for_a_backward_pass_that_can_come() -> None:
    states, weight, _, _, _ = problem()
    weight.requires_grad_()
    factors: list[Tensor | None] = []

    def rule(logits_Vn: Tensor, rows: slice, factor_n: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factors.append(factor_n)
        return logits_Vn.sum(0), None

    with torch.no_grad():
        module._chunked(states, weight, None, 1.0, rule)
    module._chunked(states, weight, None, 1.0, rule)
    assert [factor is None for factor in factors] == [True, False]


def test_gradcheck_in_float32_against_finite_differences() -> None:
    # d logprob / d state = (weight[target] − softmax · weight) / temperature, by central differences of float64.
    states, weight, bias, targets, _ = problem()
    states.requires_grad_()
    token_logprobs(states, weight, bias, targets, temperature=0.6)[3].backward()
    step = torch.zeros(N, H, dtype=torch.float64)
    for h in range(0, H, 5):
        step.zero_()[3, h] = 1e-5
        ends = []
        for sign in (1, -1):
            logits = ((states.detach().double() + sign * step) @ weight.double().T + bias.double()) / 0.6
            ends.append(torch.log_softmax(logits, -1)[3, targets[3]])
        assert float(states.grad[3, h]) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, abs=1e-5)


def test_no_token_at_all() -> None:
    states, weight, bias, targets, _ = problem()
    empty = states[:0].requires_grad_()
    found = token_logprobs(empty, weight, bias, targets[:0])
    found.sum().backward()
    assert found.shape == (0,) and found.dtype == torch.float32 and empty.grad.shape == (0, H)
    for column in token_statistics(states[:0], weight, bias, targets[:0], temperature=1.0):
        assert column.shape == (0,)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("rows_at_once", [5, 1000])
def test_trap_18_entropy_is_exact_over_the_vocabulary(
    monkeypatch: pytest.MonkeyPatch, temperature: float, rows_at_once: int
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", rows_at_once * ROW_BYTES)
    states, weight, bias, targets, _ = problem()
    logprobs, entropy, plain = token_statistics(states, weight, bias, targets, temperature=temperature)
    tempered, untempered = full(states, weight, bias, temperature), full(states, weight, bias, 1.0)
    torch.testing.assert_close(logprobs, tempered[range(N), targets], atol=TOLERANCE, rtol=TOLERANCE)
    differentiable = token_entropy(states, weight, bias, temperature=temperature)  # the bonus in the loss
    for found in (entropy, differentiable):
        torch.testing.assert_close(found, -(tempered.exp() * tempered).sum(-1), atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(plain, untempered[range(N), targets], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.7])
def test_trap_07_statistics_and_training_give_the_same_bits(dtype: torch.dtype, temperature: float) -> None:
    states, weight, bias, targets, _ = problem(dtype)
    trained = token_logprobs(states.clone().requires_grad_(), weight, bias, targets, temperature=temperature)
    assert torch.equal(trained.detach(), token_statistics(states, weight, bias, targets, temperature=temperature)[0])


def test_bfloat16_gradients_are_those_of_its_rounded_inputs() -> None:
    states, weight, bias, targets, above = problem(torch.bfloat16)
    ours = [x.clone().requires_grad_() for x in (states, weight, bias)]
    exact = [x.float().requires_grad_() for x in (states, weight, bias)]
    (token_logprobs(*ours, targets) * above).sum().backward()
    (full(*exact, 1.0)[range(N), targets] * above).sum().backward()
    for a, b in zip(ours, exact, strict=True):
        assert a.grad.dtype == torch.bfloat16
        # bfloat16 keeps 8 bits: 2**-8 of the largest entry, twice for logits and products.
        assert float((a.grad.float() - b.grad).abs().max()) < 2**-6 * float(b.grad.abs().max())


def test_a_small_entropy_keeps_its_digits() -> None:
    # Two likely tokens among logits about 100: H = −p log p − q log q with q = 1 / (1 + e^8), about 3.0e-3.
    logits = torch.tensor([100.0, 92.0, 0.0])
    entropy = token_statistics(torch.eye(1), logits[:, None], None, torch.tensor([0]), temperature=1.0)[1]
    q = 1 / (1 + 2.718281828459045**8)
    assert float(entropy) == pytest.approx(-(1 - q) * math.log(1 - q) - q * math.log(q), rel=1e-4)


def test_very_peaked_logits_stay_finite() -> None:
    states, weight, bias, targets, _ = problem()
    logprobs, entropy, plain = token_statistics(1e4 * states, weight, bias, targets, temperature=0.01)
    for column in (logprobs, entropy, plain):
        assert bool(torch.isfinite(column).all())
    assert float(entropy.min()) >= 0


@pytest.mark.parametrize("trained", ["states", "everything"])
@pytest.mark.parametrize("rows_at_once", [5, 1000])
@pytest.mark.parametrize("what", ["logprobs", "entropy", "kl"])
def test_values_and_gradients_are_those_of_autograd_with_a_frozen_and_with_a_trained_unembedding(
    monkeypatch: pytest.MonkeyPatch, what: str, rows_at_once: int, trained: str
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", rows_at_once * ROW_BYTES)
    states, weight, bias, targets, above = problem()
    other = Unembedded(states.flip(0).requires_grad_(), weight.flip(1), bias)
    ours, theirs = ([x.clone().requires_grad_(trained == "everything") for x in (states, weight, bias)] for _ in "ab")
    ours[0].requires_grad_()
    theirs[0].requires_grad_()
    log_p = full(theirs[0], theirs[1], theirs[2], 0.6)
    if what == "logprobs":
        found, expected = token_logprobs(*ours, targets, temperature=0.6), log_p[range(N), targets]
    elif what == "entropy":
        found, expected = token_entropy(*ours, temperature=0.6), -(log_p.exp() * log_p).sum(-1)
    else:
        log_q = full(other.states_NH, other.weight_VH, other.bias_V, 0.6).detach()
        found, expected = token_kl(Unembedded(*ours), other, temperature=0.6), (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
    (found * above).sum().backward()
    (expected * above).sum().backward()
    assert other.states_NH.grad is None
    for a, b in zip(ours, theirs, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5 * max(1.0, float(b.grad.abs().max())), rtol=0)


def test_the_kl_to_itself_is_zero_and_has_no_gradient() -> None:
    states, weight, bias, _, _ = problem()
    states.requires_grad_()
    found = token_kl(Unembedded(states, weight, bias), Unembedded(states.detach(), weight, bias))
    found.sum().backward()
    assert float(found.detach().abs().max()) == 0.0 and float(states.grad.abs().max()) == 0.0
