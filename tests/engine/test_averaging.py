"""The moving average: its recursion, and that it stands in the model for the time of a block only."""

from __future__ import annotations

import pytest
import torch

from ppomax.engine.averaging import MovingAverage


def test_the_recursion_by_hand() -> None:
    # 4 → 0.75·4 + 0.25·8 = 5 → 0.75·5 + 0.25·0 = 3.75
    master = torch.tensor([4.0])
    average = MovingAverage({"w": master}, decay=0.75)
    master.fill_(8.0)
    average.update({"w": master})
    assert average.means["w"].tolist() == [5.0]
    average.update({"w": torch.tensor([0.0])})
    assert average.means["w"].tolist() == [3.75]


def test_it_is_kept_in_float32_where_the_model_is_not() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    average = MovingAverage({"w": parameter}, decay=0.999)
    average.update({"w": torch.full((2,), 2.0)})
    assert average.means["w"].dtype == torch.float32
    assert average.means["w"].tolist() == pytest.approx([1.001, 1.001])


def test_inside_puts_the_means_in_and_takes_them_out_even_after_an_error() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    average = MovingAverage({"w": parameter}, decay=0.5)
    average.update({"w": torch.tensor([3.0])})
    with pytest.raises(RuntimeError), average.inside({"w": parameter}):
        assert parameter.tolist() == [2.0]
        raise RuntimeError
    assert parameter.tolist() == [1.0]


def test_load_gives_back_what_was_saved() -> None:
    average = MovingAverage({"w": torch.tensor([1.0])}, decay=0.5)
    average.load({"w": torch.tensor([7.0])})
    assert average.means["w"].tolist() == [7.0]
