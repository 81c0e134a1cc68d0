"""The errors that a user can mend. No torch here, so that `ppomax --help` answers at once."""

from __future__ import annotations


class DataError(ValueError):
    """Bad input data: the message names file, line or key, what was found and what was expected."""


class SetupError(ValueError):
    """A configuration, model or directory that cannot work, found before any training starts."""


class SaveError(OSError):
    """A file or folder could not be written: the message names it, the space needed and free, and what to do."""


class Interrupted(Exception):
    """The run was asked to stop and has saved; the message says how to go on."""


class ProcessLost(RuntimeError):
    """Another process of the run did not arrive where all meet; the message says where, and which ones are missing."""
