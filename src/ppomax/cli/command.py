"""`main`: pick the verb, parse, call its stage, print; every expected failure becomes one line and an exit code."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path

from ppomax import __version__
from ppomax.cli.memory import memory_message, out_of_memory
from ppomax.cli.parse import VERBS, Invocation, expect_verb, parse, parse_recipes
from ppomax.cli.show import (
    show_checkpoints,
    show_difference,
    show_doctor,
    show_error,
    show_plan,
    show_recipe,
    show_recipe_chosen,
    show_recipes,
    show_replay,
    show_stopped,
    show_summary,
    show_verbs,
)
from ppomax.errors import DamagedError, DataError, Interrupted, NonFiniteError, ProcessLost, SaveError, SetupError
from ppomax.stages.stopping import ending_at_sigterm

SHARED = ("sft", "reward", "ppo")  # by several processes
TRAINING = (*SHARED, "quickstart")
FAILED, MISUSED, INTERRUPTED, TERMINATED = 1, 2, 130, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 (done, or saved after SIGTERM), 1 (could not save, out of memory, a damaged
    checkpoint, gradients that are no numbers), 2 (bad setup or data), 130 (Ctrl-C) or 143 (SIGTERM where nothing is
    saved).

    With PPOMAX_DEBUG=1 the traceback of an error is shown as well.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows few letters is no reason to end a run
    try:
        _run(words)
    except SystemExit as end:  # tyro's --help and its messages
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        show_error(str(end.code))
        return FAILED
    except BrokenPipeError:  # the reader, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Exception, KeyboardInterrupt) as error:
        explained = _explain(error, words[0] if words else "")
        if explained is None:
            raise
        code, message = explained
        # Several processes mostly fail alike, and one on each machine says so; memory, and who is missed, is each one's
        # own. What another one alone has met is in what the launcher prints at the end.
        own = isinstance(error, ProcessLost) or out_of_memory(error)
        if os.environ.get("LOCAL_RANK", "0") == "0" or own:
            show = show_stopped if isinstance(error, KeyboardInterrupt | Interrupted) else show_error
            show(message)
        else:
            _tell_launcher(message)
        if os.environ.get("PPOMAX_DEBUG") == "1":
            traceback.print_exception(error)
        return code
    return 0


def _tell_launcher(message: str) -> None:
    """torchrun shows at its end what the process that failed first wrote to this file."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        info = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": info}}), encoding="utf-8")


def _run(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
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
    if name not in SHARED and (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise SetupError(f"{name}: found {processes} processes, expected one; {', '.join(SHARED)} run in several")
    first = os.environ.get("RANK", "0") == "0"  # of several processes the first one prints
    if call.recipe and first:
        show_recipe_chosen(name, call.recipe)
    as_json = call.options.pop("json", False)
    stage = getattr(import_module(f"ppomax.stages.{name}"), name)
    with ending_at_sigterm():
        result = stage(call.config, **call.options)
    own = {
        "doctor": show_doctor, "checkpoint": show_checkpoints, "replay": show_replay, "plan": show_plan,
        "chat": lambda _: None, "report": print,
    }  # fmt: skip
    if not first:
        return
    if as_json:
        print(json.dumps(result, indent=2))
    elif name in own:
        own[name](result)
    else:
        show_summary(call.config.run_dir, result)


def _explain(error: BaseException, name: str) -> tuple[int, str] | None:
    """The exit code and what went wrong; None for an error that nobody expected."""
    if isinstance(error, KeyboardInterrupt):
        kept = ""
        if name in TRAINING:
            kept = "; nothing after the last checkpoint is kept. To go on: the same command with --resume"
            if name == "quickstart":
                kept = "; checkpoints and finished answers are kept. To go on: the same command without --fresh"
        elif name == "evaluate":
            kept = "; finished answers are kept. To go on: the same command, without --fresh if there are any"
        elif name == "rank":
            kept = "; nothing is kept. To do it again: the same command"
        return TERMINATED if error.args == (signal.SIGTERM,) else INTERRUPTED, f"stopped at once{kept}"
    if isinstance(error, Interrupted):
        return error.code, str(error)
    if isinstance(error, SetupError | DataError):
        return MISUSED, str(error)
    if isinstance(error, SaveError | DamagedError | NonFiniteError | ProcessLost):
        return FAILED, str(error)
    if name in VERBS and out_of_memory(error):
        return FAILED, memory_message(error, VERBS[name].schema)
    return None
