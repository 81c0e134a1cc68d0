"""The command line: `ppomax VERB`."""

from ppomax.cli.command import main

__all__ = ["main"]
