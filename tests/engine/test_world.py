"""Which processes connect to what: a machine's GPUs are for those that compute on them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ppomax.engine import world
from ppomax.types import SetupError

# Three processes that sum a number, once all of them are up; the second one falls silent before its second sum.
SUMS = """
import os, sys, time
from torch.distributed import TCPStore
from ppomax.engine import world
from ppomax.errors import ProcessLost
store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
store.set("up/" + os.environ["RANK"], "")
store.wait(["up/0", "up/1", "up/2"])
try:
    with world.joined(minutes=0.1, device="cpu"):
        assert world.summed({"a": 1.0})["a"] == 3.0
        if world.rank() == 1:
            time.sleep(600)
        world.summed({"a": 1.0})
except ProcessLost as lost:
    sys.exit(str(lost))
"""


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """This process as the second of two that a launcher started on a machine with one GPU; which groups it asks for."""
    asked: list[Any] = []
    for key, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: asked.append(number))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: asked.append(backend))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    return asked


@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize("process", ["0", "1"])
def test_every_process_needs_a_gpu_of_its_own(
    device: str, process: str, second_of_two: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found out by all of them: the first one says so, instead of waiting for the others."""
    monkeypatch.setenv("LOCAL_RANK", process)
    found = "2 processes on this machine: found 1 GPUs, expected one for each"
    with pytest.raises(SetupError, match=found), world.joined(minutes=1, device=device):
        pass
    assert second_of_two == []


def test_one_gpu_cannot_be_asked_for_by_number(second_of_two: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = "compute.device: found cuda:0 with 2 processes, each of which has a GPU of its own"
    with pytest.raises(SetupError, match=found), world.joined(minutes=1, device="cuda:0"):
        pass
    assert second_of_two == []


def test_an_error_that_cannot_be_sent_is_told(tmp_path: Path) -> None:
    with open(tmp_path / "held", "w", encoding="utf-8") as held:
        error = OSError("the server said 500", held)
        assert isinstance(world._sendable(error), RuntimeError)
        assert str(world._sendable(error)).startswith("OSError: ") and "500" in str(world._sendable(error))

    class OfAFunction(Exception):
        """No other process finds such a class by its name."""

    assert str(world._sendable(OfAFunction("slow down: 429"))) == "OfAFunction: slow down: 429"
    fine = SetupError("found this, expected that")
    assert world._sendable(fine) is fine


def test_processes_on_the_processor_leave_gpus_alone(second_of_two: list[Any]) -> None:
    with world.joined(minutes=1, device="cpu"):
        assert second_of_two == ["gloo"]


def test_on_gpus_tensors_of_either_kind_can_be_summed(
    second_of_two: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with world.joined(minutes=1):
        assert second_of_two == [1, "cpu:gloo,cuda:nccl"]


@pytest.fixture
def three_processes() -> Iterator[list[subprocess.Popen[str]]]:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)  # as torchrun keeps one
    launched = {
        "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SUMS], env={**os.environ, **launched, "RANK": str(number)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(3)
    ]  # fmt: skip
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_who_waits_in_vain_names_the_process_that_does_not_answer(
    three_processes: list[subprocess.Popen[str]],
) -> None:
    first, _, third = three_processes
    for process in (first, third):
        _, said = process.communicate(timeout=100)
        assert process.returncode == 1
        assert "the connection to other processes was lost" in said
        assert "Of 3 processes 1 did not answer within 5 s" in said and "--resume" in said
