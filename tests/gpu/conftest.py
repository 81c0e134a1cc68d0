"""What only a CUDA device can show: `make test-gpu`. Without one these tests are not collected."""

from __future__ import annotations

import torch
from stages.conftest import one_thread, toys, trained, trained_top

__all__ = ["one_thread", "toys", "trained", "trained_top"]

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
