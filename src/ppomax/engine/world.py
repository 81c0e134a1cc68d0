"""The processes of a run. torchrun starts them, `joined` connects them; alone, everything here is the identity.

Every process holds the whole data and the whole state that is not a weight, and computes the same decisions from
them. Only passes through models are divided: each process reads its share of the rows, and sums make it whole again.
"""

from __future__ import annotations

import copy
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ppomax.errors import ProcessLost, SetupError, first_line

T = TypeVar("T")
ROLL_CALL, ROLL_CALL_SECONDS = "ppomax/connection lost/", 5.0
GO_ON = "the same command with --resume goes on from the last checkpoint"


def started() -> int:
    """How many processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def size() -> int:
    """How many processes are joined."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if size() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


@contextmanager
def joined(*, minutes: float, device: str = "auto") -> Iterator[None]:
    """The processes that the launcher started, connected for the time of a block.

    Whatever waits for another process waits `minutes` at most; ProcessLost then names those that do not answer (NCCL
    ends the process by itself). On GPUs every process of a machine has its own; device: as in the settings, cpu leaves
    GPUs alone.
    """
    if started() == 1 or size() > 1:
        yield
        return
    on_gpus = device != "cpu" and torch.cuda.is_available()
    if on_gpus:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1)), torch.cuda.device_count()
        if here > gpus:
            raise SetupError(
                f"{here} processes on this machine: found {gpus} GPUs, expected one for each; start fewer, or compute "
                "on the processor (--compute.device cpu)"
            )
        if torch.device("cuda" if device == "auto" else device).index is not None:
            raise SetupError(
                f"compute.device: found {device} with {started()} processes, each of which has a GPU of its own; "
                "expected auto, cuda or cpu"
            )
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    try:
        yield
    except ProcessLost:
        raise
    except RuntimeError as error:
        # gloo's errors have no type of their own, but name the file that they come from.
        if not isinstance(error, dist.DistNetworkError | dist.DistStoreError) and "/gloo/" not in str(error):
            raise
        raise ProcessLost(
            f"the connection to other processes was lost ({first_line(error)}). {_roll_call()}. Look for the "
            f"first error in what they printed; {GO_ON}"
        ) from error
    finally:
        dist.destroy_process_group()


def _roll_call() -> str:
    """Who does not answer: every process that loses the connection says so in the store, which the launcher keeps."""
    store, own, count = dist.distributed_c10d._get_default_store(), rank(), size()
    silent: list[int] | None = None

    def call() -> None:
        nonlocal silent
        with suppress(RuntimeError):  # the store is gone
            store.set(f"{ROLL_CALL}{own}", "here")
            end, missing = time.monotonic() + ROLL_CALL_SECONDS, list(range(count))
            while missing and time.monotonic() < end:
                missing = [other for other in missing if not store.check([f"{ROLL_CALL}{other}"])]
                time.sleep(0.05)
            silent = missing

    caller = threading.Thread(target=call, daemon=True)  # a store that hangs is not waited for
    caller.start()
    caller.join(ROLL_CALL_SECONDS + 1)
    if silent is None:
        return "The launcher's store does not answer either"
    if not silent:
        return f"All {count} processes answer"
    return f"Of {count} processes {', '.join(map(str, silent))} did not answer within {ROLL_CALL_SECONDS:g} s"


def meet(where: str, *, minutes: float) -> None:
    """Wait until all processes are here. After `minutes`, ProcessLost names those that are missing."""
    if size() == 1:
        return
    group = dist.group.WORLD if dist.get_backend() == "gloo" else _gloo()
    try:
        dist.monitored_barrier(group, timeout=timedelta(minutes=minutes), wait_all_ranks=True)
    except RuntimeError as error:
        raise ProcessLost(
            f"{where}: not all of {size()} processes arrived within {minutes:g} minutes ({first_line(error)}). Look "
            f"for the first error in the output of the missing one; {GO_ON}"
        ) from error


def first(work: Callable[[], T]) -> T:
    """What `work` returns in the first process, in all of them; its failure is raised in all of them."""
    if size() == 1:
        return work()
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if is_first():
        try:
            outcome[0] = work()
        except Exception as error:
            failure, outcome[1] = error, _sendable(error)
    dist.broadcast_object_list(outcome, group=group())
    if outcome[1] is not None:
        raise failure or outcome[1]
    return outcome[0]


class _OfThread(threading.local):
    group: Any = None


_of_thread = _OfThread()


def group() -> Any:
    """The process group by which this thread speaks with the other processes' threads; None is the default one."""
    return _of_thread.group


def another_group(*, minutes: float) -> Any:
    """One more group of all processes, for a thread that works while training goes on; None where there is one process.

    Everything that all processes do together in one group, they do in the same order: two threads need two groups.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(minutes=minutes)) if size() > 1 else None


@contextmanager
def speaking_in(other: Any) -> Iterator[None]:
    """This thread's `first`, and the checkpoints it writes, by the group `other` for the time of a block."""
    before, _of_thread.group = _of_thread.group, other
    try:
        yield
    finally:
        _of_thread.group = before


def _sendable(error: Exception) -> Exception:
    """The error, or what it says where it cannot go to another process (one that holds an open file, say)."""
    try:
        copy.deepcopy(error)  # takes it apart and puts it together as sending it does,
        ForkingPickler.dumps(error)  # which also looks for its class by name
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {first_line(error)}")
    return error


def of_first(value: T) -> T:
    """The first process's value, in all of them."""
    return first(lambda: value)


def gathered(value: T) -> list[T]:
    """Every process's value, in the order of the processes."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def summed(numbers: Mapping[str, float]) -> dict[str, float]:
    """The sums over all processes; the names are the same in all of them."""
    if size() == 1:
        return dict(numbers)
    total = torch.tensor(list(numbers.values()), dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(numbers, total.tolist(), strict=True))


def largest(number: float) -> float:
    """The largest of all processes' numbers."""
    if size() == 1:
        return number
    most = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return float(most)


def fill(*tensors: Tensor) -> None:
    """Sum tensors over all processes in place: each wrote its own rows and left the others 0, or has its gradients."""
    if size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def shares(sizes: Sequence[int]) -> list[list[int]]:
    """Indices for each process, so that the sums of `sizes` are nearly equal: the largest first, to whom has least.

    A function of the sizes alone, so that every process knows everybody's share.
    """
    parts: list[list[int]] = [[] for _ in range(size())]
    load = [0] * size()
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = min(range(size()), key=lambda r: (load[r], r))
        parts[least].append(i)
        load[least] += sizes[i]
    return [sorted(part) for part in parts]


def passes(sizes: Sequence[int], cut: Callable[[list[int]], Sequence[Sequence[int]]]) -> list[tuple[list[int], float]]:
    """This process's passes through a model over units of `sizes`: which units each reads, and its weight, 1.

    cut: some units → passes over them, as places in that list. A pass through a sharded model is something that all
    processes do together, so who has fewer makes one of its passes again, with weight 0.
    """
    by_process = [[[part[i] for i in group] for group in cut(part)] if part else [] for part in shares(sizes)]
    return [(group, float(counts)) for group, counts in in_step(by_process)]


def in_step(by_process: Sequence[Sequence[T]]) -> list[tuple[T, bool]]:
    """This process's passes of everybody's, then one of them again, which does not count, until all have as many."""
    mine = [(group, True) for group in by_process[rank()]]
    spare = next((groups[-1] for groups in (by_process[rank()], *by_process) if groups), None)
    return mine if spare is None else mine + [(spare, False)] * (max(map(len, by_process)) - len(mine))


def _gloo() -> Any:
    """A group for the CPU alone: barriers that name who is missing exist only there."""
    global _cpu_group
    if _cpu_group is None or _cpu_group[0] is not dist.group.WORLD:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _cpu_group = dist.group.WORLD, dist.new_group(backend="gloo")
    return _cpu_group[1]


_cpu_group: tuple[Any, Any] | None = None
