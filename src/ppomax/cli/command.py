"""`main`: pick the verb, parse, call its stage, print; every expected failure becomes one line and an exit code."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from ppomax import __version__
from ppomax.cli.parse import VERBS, Invocation, expect_verb, parse, parse_recipes
from ppomax.cli.show import (
    show_difference,
    show_doctor,
    show_error,
    show_plan,
    show_recipe,
    show_recipe_chosen,
    show_recipes,
    show_stopped,
    show_summary,
    show_verbs,
)
from ppomax.config import ReportConfig
from ppomax.errors import DataError, Interrupted, SaveError, SetupError

TRAINING = ("sft", "reward", "ppo", "quickstart")
FAILED, MISUSED, INTERRUPTED = 1, 2, 130
# Settings that bound memory, in the order in which to lower them.
MEMORY_SETTINGS = ("compute.tokens_per_microbatch", "sampling.max_rows", "rollout_batch")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 1 (could not save, out of memory), 2 (bad setup or data) or 130 (interrupted).

    With PPOMAX_DEBUG=1 the traceback of an error is shown as well.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        _run(words)
    except SystemExit as end:  # tyro's --help and its messages
        return end.code if isinstance(end.code, int) else 0
    except BrokenPipeError:  # the reader, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Exception, KeyboardInterrupt) as error:
        code = _explain(error, words[0] if words else "")
        if code is None:
            raise
        if os.environ.get("PPOMAX_DEBUG") == "1":
            traceback.print_exception(error)
        return code
    return 0


def _run(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        show_verbs()
    elif words[0] == "--version":
        print(f"ppomax {__version__}")
    else:
        name, *rest = words
        expect_verb(name)
        if name == "recipes":
            arguments = parse_recipes(rest)
            if arguments.diff:
                show_difference(*arguments.diff)
            elif arguments.name:
                show_recipe(arguments.name)
            else:
                show_recipes()
        else:
            _call(name, parse(name, rest))


def _call(name: str, call: Invocation) -> None:
    """Import the verb's stage, which is slow, and run it."""
    if isinstance(call.config, ReportConfig):
        print(import_module("ppomax.monitor.report").write_report(call.config.run_dir))
        return
    if call.recipe:
        show_recipe_chosen(name, call.recipe)
    as_json = call.options.pop("json", False)
    stage = getattr(import_module(f"ppomax.stages.{name}"), name)
    result = stage(call.config, **call.options)
    if as_json:
        print(json.dumps(result, indent=2))
    elif name == "doctor":
        show_doctor(result)
    elif name == "plan":
        show_plan(result)
    elif name != "chat":
        show_summary(call.config.run_dir, result)


def _explain(error: BaseException, name: str) -> int | None:
    """Print what went wrong and return the exit code; None for an error that nobody expected."""
    if isinstance(error, KeyboardInterrupt):
        show_stopped("stopped at once" + ("; nothing after the last checkpoint is kept" if name in TRAINING else ""))
        return INTERRUPTED
    if isinstance(error, Interrupted):
        show_stopped(str(error))
        return INTERRUPTED
    if isinstance(error, SetupError | DataError):
        show_error(str(error))
        return MISUSED
    if isinstance(error, SaveError):
        show_error(str(error))
        return FAILED
    if name in VERBS and _out_of_memory(error):
        show_error(f"out of memory ({_first_line(error)}). {_memory_advice(name)}")
        return FAILED
    return None


def _is_a(error: BaseException, module: str, name: str) -> bool:
    """isinstance without importing: an error's class can only come from a module that is loaded."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(error, getattr(loaded, name))


def _out_of_memory(error: BaseException) -> bool:
    # torch's allocator for the processor raises a plain RuntimeError.
    exhausted = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or _is_a(error, "torch", "OutOfMemoryError") or exhausted


def _memory_advice(name: str) -> str:
    schema = VERBS[name].schema
    known = {*schema.model_fields}
    for group, field in schema.model_fields.items():
        known |= {f"{group}.{key}" for key in getattr(field.annotation, "model_fields", {})}
    flags = [f"--{setting.replace('_', '-')}" for setting in MEMORY_SETTINGS if setting in known]
    return f"Lower {', '.join(flags)}, or free some memory" if flags else "Free some memory and start again"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
