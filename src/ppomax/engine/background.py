"""One piece of work at a time in a thread of its own, whose failure reaches whoever looks next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor


class Background:
    """What is written while the caller goes on."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ppomax-save")
        self._working: Future[object] | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Begin; what was begun before is waited for, and its failure raised."""
        self.settle()
        self._working = self._pool.submit(work)

    def settle(self, *, wait: bool = True) -> None:
        """Raise what the work failed with. wait: until it is done; otherwise look only."""
        if self._working is not None and (wait or self._working.done()):
            working, self._working = self._working, None
            working.result()


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they are now, in the host's memory, where nothing else writes to them: a GPU has none to spare."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
