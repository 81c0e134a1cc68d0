"""A pytest plugin that is told which copy of src/ is tested, insists on it, and writes down how the first test failed.

A wrong version must be noticed by a test, not by the interpreter: it has to be importable, and a test that ends in any
error but a failed assertion (or a missing exception) has crashed on it and has noticed nothing.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import pytest

COPY, MODULE, REPORT = "PPOMAX_MUTATION_COPY", "PPOMAX_MUTATION_MODULE", "PPOMAX_MUTATION_REPORT"


def pytest_configure(config: pytest.Config) -> None:
    """Import what is wrong, from the copy; any other state of affairs ends pytest with a code above 2."""
    copy = Path(os.environ[COPY]).resolve()
    for name in filter(None, ("ppomax", os.environ.get(MODULE))):
        found = Path(importlib.import_module(name).__file__ or "").resolve()
        if not found.is_relative_to(copy):
            raise pytest.UsageError(f"{name}: found {found}, expected it below {copy}")


def pytest_exception_interact(node: pytest.Item, call: pytest.CallInfo, report: pytest.TestReport) -> None:
    """The test that failed first, in which of its phases, and whether it was by an assertion."""
    path = Path(os.environ[REPORT])
    if path.exists() or call.excinfo is None:
        return
    error = call.excinfo.value
    noticed = report.when == "call" and is_assertion(error)
    entry = {"test": node.nodeid, "noticed": noticed, "error": f"{report.when}: {type(error).__name__}: {error}"[:300]}
    path.write_text(json.dumps(entry), encoding="utf-8")


def is_assertion(error: BaseException) -> bool:
    """A failed assertion, `pytest.raises` without an exception, or hypothesis' group of several such."""
    members = getattr(error, "exceptions", None)
    if members:
        return all(map(is_assertion, members))
    return isinstance(error, AssertionError | pytest.fail.Exception)
