"""Whole runs by two processes that share one GPU, with NCCL between them: each takes itself for a machine of its own."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from parity.processes import VERBS, WORLD

# NCCL refuses one GPU twice on one machine, so each process has the name of another; what connects them is sockets.
NCCL = {
    "NCCL_SOCKET_IFNAME": "lo", "NCCL_NET": "Socket", "NCCL_IB_DISABLE": "1", "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
}  # fmt: skip


def worker(rank: int, folder: str, jobs: Sequence[tuple[Any, int]]) -> None:
    """All runs, one after the other, in one of the processes; each with the port where both meet."""
    torch.set_num_threads(1)
    launched = {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(**NCCL, **launched, NCCL_HOSTID=f"machine-{rank}")
    for config, port in jobs:
        os.environ["MASTER_PORT"] = str(port)
        try:
            VERBS[type(config)](config)
        except Exception:
            Path(folder, f"failed-{rank}.txt").write_text(f"{config.run_dir}\n{traceback.format_exc()}")
            os._exit(1)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
