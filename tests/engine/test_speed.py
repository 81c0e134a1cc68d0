"""What is measured of a machine: rates are counted right, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch

from ppomax.engine import speed
from ppomax.engine.speed import copy_rate, model_shapes, operations, peak_rate, product_rate

CPU = torch.device("cpu")


@pytest.fixture
def slow_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of calls takes longer than the one before: 1 s, 2 s, 3 s, …"""
    times = [0.0]
    for took in range(1, 100):
        times += [times[-1] + took] if len(times) % 2 else []
        times += [times[-1]]
    reading = iter(times)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(reading))


def test_the_best_block_after_the_first_counts(slow_clock: None) -> None:
    # The first call (1 s) makes ready; then a product in 2 s, another in 3 s.
    assert product_rate(CPU, torch.float32, (4, 5, 6), seconds=4.0) == 2 * 4 * 5 * 6 / 2.0


def test_a_copy_reads_and_writes(slow_clock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "COPIED_BYTES", 4096)
    assert copy_rate(CPU, seconds=1.0) == 2 * 4096 / 2.0


def test_a_peak_is_that_of_the_fastest_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SIDES", (8, 16))
    rates = {(8, 8, 8): 1e6, (16, 16, 16): 3e6, (2, 3, 4): 2e6}
    monkeypatch.setattr(speed, "product_rate", lambda device, dtype, shape, seconds: rates[shape])
    assert peak_rate(CPU, torch.float32, [(2, 3, 4)], seconds=30.0) == 3e6
    # 8192 operations at 1e6 a second are 8 ms: more than a share of 3 ms allows.
    assert peak_rate(CPU, torch.float32, [(2, 3, 4)], seconds=0.009) == 2e6


def test_what_cannot_be_measured_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> float:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(speed, "product_rate", fails)
    assert peak_rate(CPU, torch.float32) is None


def test_a_measurement_leaves_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    rate = peak_rate(CPU, torch.float32, [(64, 32, 48)], seconds=0.02)
    assert rate is not None and rate > 0
    assert torch.equal(before, torch.random.get_rng_state())


def test_shapes_of_a_model() -> None:
    llama = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 259}
    assert model_shapes(llama) == {
        "attention": (1024, 32, 32), "up": (1024, 32, 48), "down": (1024, 48, 32), "vocabulary": (259, 32, 64)
    }  # fmt: skip
    assert model_shapes({"n_embd": 8, "n_inner": None, "vocab_size": 9})["up"] == (1024, 8, 32)
    assert model_shapes({"vocab_size": 9}) == {}
    assert operations((2, 3, 4)) == 48
