"""Whole runs by two processes that share one GPU, with NCCL between them: each takes itself for a machine of its own."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from parity.processes import VERBS, WORLD

# NCCL refuses one GPU twice on one machine, so that each process has the name of another; what connects them is sockets.
NCCL = {
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_NET": "Socket",
    "NCCL_IB_DISABLE": "1",
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
}


def worker(rank: int, folder: str, ports: Sequence[int], jobs: Sequence[Any]) -> None:
    """All runs, one after the other, in one of the processes."""
    torch.set_num_threads(1)
    launched = {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(**NCCL, **launched, NCCL_HOSTID=f"machine-{rank}")
    for config, port in zip(jobs, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        try:
            VERBS[type(config)](config)
        except Exception:
            Path(folder, f"failed-{rank}.txt").write_text(f"{config.run_dir}\n{traceback.format_exc()}")
            os._exit(1)


def run_in_two(folder: Path, jobs: Sequence[Any]) -> None:
    """All runs by two processes; a failure of either is an error that quotes it."""
    folder.mkdir(parents=True, exist_ok=True)
    context, ports = multiprocessing.get_context("spawn"), [_free_port() for _ in jobs]
    processes = [context.Process(target=worker, args=(r, str(folder), ports, jobs), daemon=True) for r in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(150)
        if process.is_alive():
            process.kill()
    failures = [file.read_text() for file in sorted(folder.glob("failed-*.txt"))]
    assert not failures, failures[0]
    assert [process.exitcode for process in processes] == [0, 0]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
