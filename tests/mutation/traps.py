"""All known traps, each as one or more wrong versions of the code."""

from __future__ import annotations

from mutation import traps_01_16, traps_17_31
from mutation.mutant import Mutation

TRAPS = range(1, 32)
MUTATIONS: list[Mutation] = [*traps_01_16.MUTATIONS, *traps_17_31.MUTATIONS]
