"""A reward that is any Python callable, named as `module:function` or passed as an object."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch

from ppomax.engine import world
from ppomax.errors import first_line
from ppomax.types import DataError, Message, Prompt, SetupError

LARGEST = torch.finfo(torch.float32).max

# Two answers that no judge should find equal.
TRIED = ("No.", "Yes, of course I can help you with that!")

# (prompts, responses, **columns) → one number per response, or one list of per-token numbers per response.
RewardFunction = Callable[..., Sequence[float] | Sequence[Sequence[float]]]


def load_function(spec: str) -> RewardFunction:
    """Import `module:function`; modules of the working directory count."""
    module_name, _, name = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError, SystemExit) as error:
        why = first_line(error) if not isinstance(error, SystemExit) else f"it calls sys.exit({error.code!r})"
        raise SetupError(f"{spec}: cannot import module '{module_name}' ({why}), expected module:function") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise SetupError(f"{spec}: found no callable '{name}' in {module_name}, expected module:function")
    return cast(RewardFunction, function)


def call(
    function: RewardFunction, prompts: Sequence[Sequence[Message]], responses: Sequence[str],
    columns: Mapping[str, Sequence[Any]], *, name: str, lengths: Sequence[int] | None = None,
) -> tuple[list[float], list[list[float]] | None]:  # fmt: skip
    """Call a reward function and check what it gives: (one score per response, per-token rewards or None).

    lengths: response lengths in tokens; a dense reward must have exactly one finite number per token. Of several
    processes the first one calls it, for all.
    """
    return world.first(lambda: _called(function, prompts, responses, columns, name, lengths))


def judged(
    judge: RewardFunction, prompts: Sequence[Prompt], responses: Sequence[str], *, name: str,
    ids: Sequence[Sequence[int]] | None = None,
) -> list[float]:  # fmt: skip
    """One score per response by a judge, which is called as a reward is; `ids`: the responses' token ids."""
    columns = shared_columns([prompt.columns for prompt in prompts])
    if ids is not None:
        columns["response_ids"] = list(ids)
    scores, dense = call(judge, [prompt.messages for prompt in prompts], responses, columns, name=name)
    if dense is not None:
        raise DataError(f"judge {name}: found a list for each response, expected one number each")
    return scores


def try_judge(judge: RewardFunction, prompts: Sequence[Prompt], *, name: str) -> None:
    """Call a judge once, on two answers, before minutes are spent on sampling what it is to judge."""
    judged(judge, [prompts[0], prompts[-1]], TRIED, name=name, ids=[[0], [0, 0]])


def _called(
    function: RewardFunction, prompts: Sequence[Sequence[Message]], responses: Sequence[str],
    columns: Mapping[str, Sequence[Any]], name: str, lengths: Sequence[int] | None,
) -> tuple[list[float], list[list[float]] | None]:  # fmt: skip
    given = _given(function, prompts, responses, columns, name)
    values = _plain(given)
    if not isinstance(values, list):
        raise DataError(f"reward {name}: found {type(given).__name__}, expected a list with one entry per response")
    if len(values) != len(responses):
        raise DataError(f"reward {name}: found {len(values)} values for {len(responses)} responses, expected one each")
    rows = [_plain(value) for value in values]
    if not any(isinstance(row, list) for row in rows):
        return _finite(rows, name, "scores"), None
    for i, row in enumerate(rows):
        if not isinstance(row, list):
            raise DataError(f"reward {name}: response {i}: found {row!r} among lists, expected one number per token")
        if lengths is not None and len(row) != lengths[i]:
            raise DataError(
                f"reward {name}: response {i} has {lengths[i]} tokens, found {len(row)} dense rewards (a list for each "
                "response is a number for each of its tokens; for one score each, return numbers)"
            )
    return [0.0] * len(rows), [_finite(row, name, f"response {i}") for i, row in enumerate(rows)]


def _given(
    function: RewardFunction, prompts: Sequence[Sequence[Message]], responses: Sequence[str],
    columns: Mapping[str, Sequence[Any]], name: str,
) -> Any:  # fmt: skip
    """What the function returns. It gets copies: what it does to them is its own affair.

    Two failures look like ours when they leave `main`, and would end the run as if it were done.
    """
    try:
        return function(
            [[copy.copy(message) for message in prompt] for prompt in prompts], list(responses),
            **copy.deepcopy(dict(columns)),
        )  # fmt: skip
    except SystemExit as end:
        raise DataError(f"reward {name}: it called sys.exit({end.code!r}), expected scores or an exception") from end
    except BrokenPipeError as error:
        raise DataError(f"reward {name}: {error!r}: what it talks to went away; go on with --resume") from error


# Not SIGALRM: functions that limit themselves use that one.
OVER = signal.SIGVTALRM


class _TooLate(BaseException):
    """Out of time. No Exception, so that a function which tries again after every error does not try on and on."""


def limited(function: RewardFunction, seconds: float | None, *, name: str) -> RewardFunction:
    """The function, ended with a DataError when it takes longer than `seconds`; None: as it is.

    By a signal, so that waiting (for a server, a lock, a process) ends too; a C function that never returns to Python
    does not. Outside the main thread, where signals cannot be caught, nothing is limited.
    """
    if seconds is None:
        return function

    def call_in_time(*arguments: Any, **columns: Any) -> Any:
        main, ended = threading.main_thread(), threading.Event()
        if threading.current_thread() is not main:
            return function(*arguments, **columns)

        def over(number: int, frame: FrameType | None) -> None:
            if not ended.is_set():
                raise _TooLate

        before = signal.signal(OVER, over)
        bell = threading.Thread(target=_ring, args=(main.ident, seconds, ended), daemon=True)
        bell.start()
        try:
            try:
                return function(*arguments, **columns)
            finally:
                ended.set()
        except _TooLate:
            raise DataError(
                f"reward {name}: no answer after {seconds:g} seconds (reward_timeout); mend what it waits for or raise "
                "the limit, then go on with --resume"
            ) from None
        finally:
            ended.set()
            bell.join()  # what it rings at the last moment is for `over`, not for the handler before
            signal.signal(OVER, before)

    return call_in_time


def _ring(thread: int, seconds: float, ended: threading.Event) -> None:
    """Signal a thread after so many seconds, and every second from there, until it has ended."""
    while not ended.wait(seconds):
        signal.pthread_kill(thread, OVER)
        seconds = 1.0


def function_name(function: RewardFunction) -> str:
    """`module:name` of a callable, for the record."""
    return f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', type(function).__name__)}"


def shared_columns(columns: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The rows' other columns as lists, None where a row lacks one; a reserved name is a DataError."""
    names = dict.fromkeys(key for row in columns for key in row)
    for reserved in ("prompts", "responses", "response_ids"):
        if reserved in names:
            raise DataError(
                f"data column '{reserved}': rewards are called with an argument of this name; rename the column"
            )
    return {name: [row.get(name) for row in columns] for name in names}


def expect_takes(function: RewardFunction, columns: Iterable[str], *, what: str) -> None:
    """Refuse a function that cannot be called as (prompts, responses, **columns), before anything is sampled for it."""
    given = [*columns, "response_ids"]
    try:
        inspect.signature(function, follow_wrapped=False).bind([], [], **dict.fromkeys(given))
    except TypeError as error:
        arguments = ", ".join(["prompts", "responses", *(f"{name}=..." for name in given)])
        raise SetupError(
            f"{what}: it cannot be called with ({arguments}): {error}; expected **columns as its last parameter, for "
            "what it does not name"
        ) from None
    except ValueError:  # it does not say what it takes, as some functions in C do not
        return


def _plain(value: Any) -> Any:
    """Arrays, tensors and tuples as lists; a single number or a text as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _finite(values: Sequence[Any], name: str, where: str) -> list[float]:
    numbers = []
    for i, value in enumerate(values):
        try:
            numbers.append(float(value))
        except (TypeError, ValueError):
            numbers.append(math.nan)
        except OverflowError:  # a whole number, which may be too long to be written
            numbers.append(math.inf)
            value = math.inf
        if not abs(numbers[-1]) <= LARGEST:  # NaN is not, either
            raise DataError(
                f"reward {name}: {where}, entry {i}: found {value!r}, expected a finite number, at most {LARGEST:.3g} "
                "(float32)"
            )
    return numbers
