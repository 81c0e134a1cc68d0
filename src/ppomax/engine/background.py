"""One piece of work at a time in a thread of its own, whose failure reaches whoever looks next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from ppomax.engine import world


class Background:
    """What is written while the caller goes on; several processes do it together, each in its thread.

    minutes: how long one process's thread waits for another's.
    """

    def __init__(self, *, minutes: float = 30) -> None:
        self._minutes = minutes
        self._group: Any = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ppomax-save")
        self._working: Future[object] | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Begin; what was begun before is waited for, and its failure raised."""
        self.settle()
        if self._group is None:
            self._group = world.another_group(minutes=self._minutes)
        self._working = self._pool.submit(self._do, work)

    def _do(self, work: Callable[[], object]) -> None:
        with world.speaking_in(self._group):
            work()

    def settle(self, *, wait: bool = True) -> None:
        """Raise what the work failed with. wait: until it is done; otherwise look only, and raise in all processes."""
        if self._working is not None and (wait or not world.largest(not self._working.done())):
            try:
                self._working.result()
            finally:  # who is interrupted while waiting has not seen the end
                if self._working.done():
                    self._working = None


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they are now, in the host's memory, where nothing else writes to them: a GPU has none to spare."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
