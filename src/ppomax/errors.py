"""The errors that a user can mend. No torch here, so that `ppomax --help` answers at once."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any


class DataError(ValueError):
    """Bad input data: the message names file, line or key, what was found and what was expected."""


class SetupError(ValueError):
    """A configuration, model or directory that cannot work, found before any training starts."""


class SaveError(OSError):
    """A file or folder could not be written: the message names it, the space needed and free, and what to do."""


class DamagedError(Exception):
    """`ppomax checkpoint verify` found damage: the message names every damaged file."""


class Interrupted(Exception):
    """The run was asked to stop and can be gone on with; the message says how.

    code: what the process ends with: 130 after Ctrl-C, 0 after SIGTERM, with which a scheduler asks for the machine.
    """

    def __init__(self, message: str, code: int = 130) -> None:
        super().__init__(message)
        self.code = code


class NonFiniteError(FloatingPointError):
    """The gradient was not finite in several steps in a row.

    tensors, state: the last such batch and the weights that read it, as a checkpoint holds them.
    """

    def __init__(self, message: str, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.tensors, self.state = tensors, state


class ProcessLost(RuntimeError):
    """Other processes of the run do not arrive where all meet, or do not answer; the message says which, and where."""


def printable(text: str) -> str:
    """The text without what would command a terminal, or turn it around, instead of being shown by it."""
    return "".join("\ufffd" if _commands(c) else c for c in text)


def _commands(character: str) -> bool:
    if character in "\n\t" or character.isprintable():
        return False
    # Spaces of any width, and what joins letters or says where a word may break, are text.
    return unicodedata.category(character) != "Zs" and character not in "\u00ad\u200b\u200c\u200d\u2060\ufeff"


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its class where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
