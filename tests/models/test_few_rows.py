"""Linear layers of few rows, weight first: the same numbers, for the time of decoding only."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.architectures import policy
from ppomax.models import few_rows
from ppomax.models.few_rows import MOST_ROWS, weight_first

THIS = torch.backends.cpu.get_cpu_capability()


@pytest.fixture(autouse=True)
def gaining(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever processor this is, it counts as one that gains."""
    monkeypatch.setattr(few_rows, "PROCESSORS", (THIS,))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 7), (5, 7), (MOST_ROWS, 1, 7), (MOST_ROWS + 1, 1, 7), (2, 3, 7)])
def test_the_layer_is_the_same_function(shape: tuple[int, ...], bias: bool) -> None:
    draw = torch.Generator().manual_seed(4)
    model = nn.Sequential(nn.Linear(7, 11, bias=bias))
    x = torch.randn(shape, generator=draw)
    expected = model(x)
    with weight_first(model), torch.inference_mode():
        found = model(x)
        strided = model(x.transpose(0, 1).contiguous().transpose(0, 1))
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(strided, expected, atol=1e-6, rtol=1e-6)


def test_only_float32_layers_and_only_inside() -> None:
    model = nn.ModuleDict({"of32": nn.Linear(3, 3), "of64": nn.Linear(3, 3).double()})
    with pytest.raises(ZeroDivisionError), weight_first(model):
        assert [name for name, layer in model.items() if "forward" in vars(layer)] == ["of32"]
        raise ZeroDivisionError
    assert not any("forward" in vars(layer) for layer in model.values())


def test_a_processor_that_does_not_gain_keeps_its_layers(lively: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "PROCESSORS", ())
    player = policy(lively)
    with player.decoding():
        assert not any("forward" in vars(layer) for layer in player.modules())


def test_a_policy_decodes_with_it(lively: str) -> None:
    player = policy(lively)
    with player.decoding():
        assert any("forward" in vars(layer) for layer in player.modules())
    assert not any("forward" in vars(layer) for layer in player.modules())
