"""torch.compile for the decoder layers of a trained player: fused kernels for the passes that are made again and again.

Every layer runs the same code, so that a few graphs serve the whole stack whatever the lengths of a batch: one for
passes with a backward pass, one for those without. Decoding stays as it is, because its cache changes at every token.
One process only: layers that FSDP2 gathers did not get through their first pass when it was tried.
"""

from __future__ import annotations

import importlib.util
import os
import shutil

from torch import nn

from ppomax.engine import world
from ppomax.models.players import Player
from ppomax.types import SetupError

COMPILERS = ("g++", "clang++", "cl")


def compile_layers(player: Player, backend: str = "inductor") -> None:
    """Compile each decoder layer at its first pass; SetupError where it could not be done then.

    backend: torch.compile's. Another than the default is for tests: it traces as all do, and compiles no kernels.
    """
    base, device = player.base, player.device.type
    if world.size() > 1:
        raise SetupError(f"compiled: found True with {world.size()} processes, expected one process; leave it out")
    if not isinstance(getattr(base, "layers", None), nn.ModuleList):
        raise SetupError(f"compiled: {type(base).__name__} has no list of decoder layers; leave it out")
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        raise SetupError("compiled: found no triton, expected it to be installed; leave it out or pip install triton")
    if device == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))):
        raise SetupError(f"compiled: found no C++ compiler, expected one of {', '.join(COMPILERS)} or one named by CXX")
    for layer in base.layers:
        layer.compile(dynamic=True, backend=backend)
    player.compiled = True
