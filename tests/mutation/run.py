"""`make mutate`: plant every known trap as a wrong version in a copy of src/; a test named after the trap must fail.

First all these tests run once on an unchanged copy, where they must pass. Then each wrong version gets a copy and a
process of its own. Exit codes: 0 all were noticed, 1 some were not, 2 the unchanged copy is not green.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mutation.mutant import Mutation
from mutation.traps import MUTATIONS, TRAPS
from mutation.trial import Outcome, preload, trials


def green(mutations: Sequence[Mutation], jobs: int) -> bool:
    """Whether all named tests pass on an unchanged copy; says what fails."""
    tests = sorted({test for mutation in mutations for test in mutation.tests})
    shares = [share for n in range(jobs) if (share := tests[n * len(tests) // jobs : (n + 1) * len(tests) // jobs])]
    print(f"{len(tests)} tests on the unchanged code: ", end="", flush=True)
    outcomes = list(trials([(share, None) for share in shares], jobs))
    failed = [outcome for outcome in outcomes if outcome.code != 0]
    print("not green" if failed else f"green, {max(outcome.seconds for outcome in outcomes):.0f} s", flush=True)
    for outcome in failed:
        print(outcome.said[-6000:])
    return not failed


def table(mutations: Sequence[Mutation], jobs: int) -> list[tuple[Mutation, Outcome]]:
    """Print a row for each wrong version as soon as it and those before it are known; returns what was not noticed."""
    width = max(len(mutation.what) for mutation in mutations)
    print(f"\ntrap | {'what was planted':<{width}} | seconds | test that caught it", flush=True)
    missed = []
    outcomes = trials([(mutation.tests, mutation) for mutation in mutations], jobs)
    for mutation, outcome in zip(mutations, outcomes, strict=True):
        row = f"{mutation.trap:>4} | {mutation.what:<{width}} | {outcome.seconds:7.1f} | {outcome.verdict}"
        print(row, flush=True)
        if outcome.caught_by is None:
            missed.append((mutation, outcome))
    return missed


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make mutate", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("traps", nargs="*", type=int, help=f"only these, {TRAPS[0]} to {TRAPS[-1]}; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side, each on one thread (default 2)")
    options = parser.parse_args(arguments)
    if wrong := [trap for trap in options.traps if trap not in TRAPS]:
        parser.error(f"traps: found {wrong[0]}, expected numbers from {TRAPS[0]} to {TRAPS[-1]}")
    if options.jobs < 1:
        parser.error(f"--jobs: found {options.jobs}, expected at least 1")
    began = time.monotonic()
    chosen = [mutation for mutation in MUTATIONS if not options.traps or mutation.trap in options.traps]
    preload()
    if not green(chosen, options.jobs):
        return 2
    missed = table(chosen, options.jobs)
    for mutation, outcome in missed:
        print(f"\n--- trap {mutation.trap}: {mutation.what} ({mutation.file})\n{outcome.said[-3000:]}")
    traps = len({mutation.trap for mutation in chosen})
    result = f"NOT NOTICED: {len(missed)}" if missed else "each was noticed by a test named after its trap"
    print(f"\n{len(chosen)} wrong versions of {traps} traps in {time.monotonic() - began:.0f} s: {result}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
