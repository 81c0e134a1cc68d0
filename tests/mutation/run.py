"""`make mutate`: plant every known trap as a wrong version in a copy of src/; a test named after the trap must fail.

First all these tests run once on an unchanged copy, where they must pass. Then each wrong version gets a copy and a
process of its own. Exit codes: 0 all were noticed, 1 some were not, 2 the unchanged copy is not green.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mutation.mutant import ROOT, Mutation, copied_source
from mutation.traps import MUTATIONS, TRAPS
from mutation.witness import COPY, MODULE, REPORT

SECONDS = 900  # for one process, on a busy machine
PYTEST = ("-x", "-q", "-p", "no:cacheprovider", "-p", "mutation.witness", "--timeout=0", "--hypothesis-seed=0")


@dataclass(frozen=True)
class Outcome:
    """How one pytest process ended: its exit code (None: out of time), the witness's report, and what it printed."""

    code: int | None
    report: dict[str, str | bool]
    said: str
    seconds: float

    @property
    def caught_by(self) -> str | None:
        """The test that noticed; None where a run was green, broken, or a test merely crashed."""
        return str(self.report["test"]) if self.code == 1 and self.report.get("noticed") else None

    @property
    def verdict(self) -> str:
        """The cell of the table."""
        if self.caught_by is not None:
            return self.caught_by.removeprefix("tests/")
        if self.code == 0:
            return "SURVIVED"
        if self.code is None:
            return f"NO VERDICT: not done after {SECONDS} s"
        return f"NO VERDICT: pytest ended with {self.code}; {self.report.get('error', 'no test failed')}"


def tested(tests: Sequence[str], mutation: Mutation | None = None) -> Outcome:
    """pytest on `tests` in a process that imports ppomax from a copy of src/, with one mutation planted or none."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ppomax-mutate-") as name:
        folder = Path(name)
        copy, report = copied_source(folder), folder / "report.json"
        if mutation is not None:
            mutation.plant(copy)
        environment = {
            **os.environ, COPY: str(copy), MODULE: mutation.module if mutation else "", REPORT: str(report),
            "PYTHONPATH": os.pathsep.join((str(copy), str(ROOT / "tests"))), "OMP_NUM_THREADS": "1",
            "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis"),
        }  # fmt: skip
        command = [sys.executable, "-m", "pytest", *PYTEST, f"--basetemp={folder / 'tests'}", *tests]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                errors="replace", timeout=SECONDS, check=False,
            )  # fmt: skip
            code, said = done.returncode, done.stdout
        except subprocess.TimeoutExpired as expired:
            code, said = None, str(expired.stdout or "")
        noted = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
    return Outcome(code, noted, said, time.monotonic() - began)


def green(mutations: Sequence[Mutation], jobs: int) -> bool:
    """Whether all named tests pass on an unchanged copy; says what fails."""
    tests = sorted({test for mutation in mutations for test in mutation.tests})
    shares = [share for n in range(jobs) if (share := tests[n * len(tests) // jobs : (n + 1) * len(tests) // jobs])]
    print(f"{len(tests)} tests on the unchanged code: ", end="", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        outcomes = list(pool.map(tested, shares))
    failed = [outcome for outcome in outcomes if outcome.code != 0]
    print("not green" if failed else f"green, {max(outcome.seconds for outcome in outcomes):.0f} s", flush=True)
    for outcome in failed:
        print(outcome.said[-6000:])
    return not failed


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
    if not green(chosen, options.jobs):
        return 2
    width = max(len(mutation.what) for mutation in chosen)
    print(f"\ntrap | {'what was planted':<{width}} | seconds | test that caught it")
    missed: list[tuple[Mutation, Outcome]] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = pool.map(lambda mutation: tested(mutation.tests, mutation), chosen)
        for mutation, outcome in zip(chosen, outcomes, strict=True):
            row = f"{mutation.trap:>4} | {mutation.what:<{width}} | {outcome.seconds:7.1f} | {outcome.verdict}"
            print(row, flush=True)
            if outcome.caught_by is None:
                missed.append((mutation, outcome))
    for mutation, outcome in missed:
        print(f"\n--- trap {mutation.trap}: {mutation.what} ({mutation.file})\n{outcome.said[-3000:]}")
    traps = len({mutation.trap for mutation in chosen})
    result = f"NOT NOTICED: {len(missed)}" if missed else "each was noticed by a test named after its trap"
    print(f"\n{len(chosen)} wrong versions of {traps} traps in {time.monotonic() - began:.0f} s: {result}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
