"""One wrong version of the code: where it stands, what it replaces, and which tests must notice it."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"


@dataclass(frozen=True)
class Mutation:
    """`old`, which stands exactly once in `file` (below src/ppomax), becomes `new`; one of `tests` must then fail.

    trap: its number in the project's list of traps. tests: pytest node ids, whose names carry that number.
    """

    trap: int
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def module(self) -> str:
        """The module that is wrong: `rl/kl.py` → `ppomax.rl.kl`."""
        return ".".join(("ppomax", *Path(self.file).with_suffix("").parts))

    def text(self, source: Path = SOURCE) -> str:
        """The wrong file. ValueError where `old` stands elsewhere than exactly once: the code has moved on."""
        text = (source / "ppomax" / self.file).read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(
                f"trap {self.trap}, {self.what}: found {text.count(self.old)} times in {self.file}, expected once:\n"
                f"{self.old}\nGive tests/mutation another place for the same mistake"
            )
        return text.replace(self.old, self.new)

    def plant(self, source: Path) -> None:
        """Write the wrong version into a copy of src/."""
        text = self.text(source)
        (source / "ppomax" / self.file).write_text(text, encoding="utf-8")


def copied_source(folder: Path) -> Path:
    """A copy of src/ in `folder`, without compiled files."""
    return Path(shutil.copytree(SOURCE, folder / "src", ignore=shutil.ignore_patterns("__pycache__")))


def traps_in(test: str) -> set[int]:
    """The traps that a test is named after: `test_trap_19_and_24_no_pair_is_split` → {19, 24}."""
    name = test.rpartition("::")[2].partition("[")[0]
    found = re.match(r"test_traps?((?:(?:_and)?_\d+)+)_", name)
    return set(map(int, re.findall(r"\d+", found[1]))) if found else set()
