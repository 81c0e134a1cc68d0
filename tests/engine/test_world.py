"""Which processes connect to what: a machine's GPUs are for those that compute on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ppomax.engine import world
from ppomax.types import SetupError


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """This process as the second of two that a launcher started on a machine with one GPU; which groups it asks for."""
    asked: list[Any] = []
    for key, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: asked.append(number))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: asked.append(backend))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    return asked


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_every_process_needs_a_gpu_of_its_own(device: str, second_of_two: list[Any]) -> None:
    found = "process 1 of this machine: found 1 GPUs, expected one for each process"
    with pytest.raises(SetupError, match=found), world.joined(minutes=1, device=device):
        pass
    assert second_of_two == []


def test_processes_on_the_processor_leave_gpus_alone(second_of_two: list[Any]) -> None:
    with world.joined(minutes=1, device="cpu"):
        assert second_of_two == ["gloo"]


def test_on_gpus_tensors_of_either_kind_can_be_summed(
    second_of_two: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with world.joined(minutes=1):
        assert second_of_two == [1, "cpu:gloo,cuda:nccl"]
