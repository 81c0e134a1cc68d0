"""A reward that is somebody's function: found by name, called with everything, its answer checked."""

from __future__ import annotations

import math
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ppomax.rewards.callables import OVER, call, expect_takes, judged, limited, load_function, shared_columns
from ppomax.types import DataError, Message, Prompt, SetupError

PROMPTS = [(Message(role="user", content="one"),), (Message(role="user", content="two"),)]
RESPONSES = ["a", "bcd"]


def called(given: Any, lengths: tuple[int, int] = (1, 3)) -> tuple[list[float], list[list[float]] | None]:
    """What `call` makes of a function that returns `given`."""
    return call(lambda prompts, responses, **columns: given, PROMPTS, RESPONSES, {}, name="mine", lengths=lengths)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a module of the user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # undone with the path after the test
    (tmp_path / "house_rewards.py").write_text(
        "SIZE = 3\ndef length(prompts, responses, **columns):\n    return [float(len(r)) for r in responses]\n"
    )
    (tmp_path / "house_broken.py").write_text("import no_such_package_anywhere\n")
    yield tmp_path


def test_a_function_gets_copies_of_everything() -> None:
    seen: dict[str, Any] = {}

    def reward(prompts: list[list[Message]], responses: list[str], **columns: Any) -> list[float]:
        seen.update(prompts=prompts, responses=responses, columns=columns)
        responses.append("changed")
        prompts[0][-1]["content"] += " changed"
        columns["topic"][0].append("changed")
        return [1.0, -2.5]

    topics = [["x"], None]
    answer = call(reward, PROMPTS, RESPONSES, {"topic": topics}, name="mine")
    assert answer == ([1.0, -2.5], None)
    assert seen["prompts"][1] == list(PROMPTS[1]) and seen["columns"] == {"topic": [["x", "changed"], None]}
    assert RESPONSES == ["a", "bcd"] and PROMPTS[0][0]["content"] == "one" and topics == [["x"], None]


@pytest.mark.parametrize(
    "given", [[1, 2.5], (1, 2.5), np.array([1, 2.5]), torch.tensor([1, 2.5]), [np.float32(1), torch.tensor(2.5)]]
)
def test_any_list_of_numbers_is_a_score(given: Any) -> None:
    scores, dense = called(given)
    assert scores == [1.0, 2.5] and all(type(score) is float for score in scores) and dense is None


@pytest.mark.parametrize(
    "given",
    [
        [[0.5], [1, 2, 3]],
        ([0.5], (1, 2, 3)),
        [np.array([0.5]), np.array([1, 2, 3])],
        [torch.tensor([0.5]), torch.tensor([1.0, 2.0, 3.0])],
    ],
)
def test_lists_of_lists_are_dense(given: Any) -> None:
    assert called(given) == ([0.0, 0.0], [[0.5], [1.0, 2.0, 3.0]])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0], "found 1 values for 2 responses"),
        ([1.0, 2.0, 3.0], "found 3 values for 2 responses"),
        ([], "found 0 values for 2 responses"),
        (None, "found NoneType, expected a list with one entry per response"),
        (1.0, "found float, expected a list"),
        ("ab", "found str, expected a list"),
        ([1.0, math.nan], "scores, entry 1: found nan, expected a finite number"),
        ([math.inf, 0.0], "scores, entry 0: found inf"),
        # Numbers, but none of float32, in which rewards are added up.
        ([1.0, -1e39], "scores, entry 1: found -1e+39, expected a finite number, at most 3.4e+38"),
        ([10**400, 0.0], "scores, entry 0: found inf"),
        ([10**5000, 0.0], "scores, entry 0: found inf"),
        ([[1.0], [1.0, 1e39, 2.0]], "response 1, entry 1: found 1e+39"),
        ([None, 0.0], "scores, entry 0: found None"),
        (["good", 0.0], "scores, entry 0: found 'good'"),
        ([1.0, [1.0, 2.0, 3.0]], "response 0: found 1.0 among lists"),
        ([[1.0], 2.0], "response 1: found 2.0 among lists"),
        ([[1.0], [1.0, 2.0]], "response 1 has 3 tokens, found 2 dense rewards"),
        ([[1.0], [1.0, math.nan, 2.0]], "response 1, entry 1: found nan"),
        ([[1.0], [1.0, None, 2.0]], "response 1, entry 1: found None"),
    ],
)
def test_a_wrong_answer_is_an_error_that_names_the_reward(given: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(f"reward mine: {message}")):
        called(given)


def test_an_error_inside_the_function_is_the_users_own() -> None:
    def reward(prompts: Any, responses: Any) -> list[float]:
        return [1 / 0]

    with pytest.raises(ZeroDivisionError):
        call(reward, PROMPTS, RESPONSES, {}, name="mine")


def test_functions_are_found_by_name(workplace: Path) -> None:
    assert load_function("house_rewards:length")(PROMPTS, RESPONSES) == [1.0, 3.0]
    assert load_function("ppomax.rewards.judge:sentiment").__name__ == "sentiment"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("house_missing:f", "cannot import module 'house_missing'"),
        ("house_broken:f", "cannot import module 'house_broken' (No module named 'no_such_package_anywhere')"),
        ("house_rewards:SIZE", "found no callable 'SIZE' in house_rewards"),
        ("house_rewards:nothing", "found no callable 'nothing' in house_rewards"),
        ("house_rewards", "found no callable '' in house_rewards"),
        (":length", "cannot import module ''"),
    ],
)
def test_what_is_no_function_says_why(workplace: Path, spec: str, message: str) -> None:
    with pytest.raises(SetupError, match=re.escape(f"{spec}: {message}")) as caught:
        load_function(spec)
    assert "expected module:function" in str(caught.value)


def test_columns_are_aligned_with_the_rows() -> None:
    assert shared_columns([{"a": 1}, {"b": 2, "a": 3}, {}]) == {"a": [1, 3, None], "b": [None, 2, None]}
    assert shared_columns([{}, {}]) == {}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SystemExit("API_KEY is not set"), r"reward mine: it called sys.exit\('API_KEY is not set'\)"),
        (SystemExit(0), r"reward mine: it called sys.exit\(0\)"),
        (BrokenPipeError(32, "Broken pipe"), "reward mine: BrokenPipeError.*go on with --resume"),
    ],
)
def test_a_function_cannot_end_the_run_as_if_it_were_done(error: BaseException, message: str) -> None:
    def reward(*arguments: Any, **columns: Any) -> list[float]:
        raise error

    with pytest.raises(DataError, match=message):
        call(reward, PROMPTS, RESPONSES, {}, name="mine")


def test_a_module_that_ends_the_process_is_named(workplace: Path) -> None:
    (workplace / "house_exits.py").write_text("import sys\nsys.exit('no key')\n")
    with pytest.raises(SetupError, match=r"house_exits:reward: cannot import.*sys.exit\('no key'\)"):
        load_function("house_exits:reward")


@pytest.mark.parametrize("caught", [Exception, BaseException])
def test_the_time_limit_holds_for_a_function_that_tries_again_after_every_error(caught: type[BaseException]) -> None:
    tries = []

    def reward(prompts: Any, responses: Any, **columns: Any) -> list[float]:
        while True:
            try:
                tries.append(1)
                time.sleep(60)
            except caught:
                if len(tries) == 2:
                    raise

    with pytest.raises(DataError, match="no answer after 0.05 seconds"):
        call(limited(reward, 0.05, name="mine"), PROMPTS, RESPONSES, {}, name="mine")
    assert len(tries) == (1 if caught is Exception else 2)


def test_the_time_limit_holds_for_a_function_that_limits_itself_by_the_clocks_signal() -> None:
    def reward(prompts: Any, responses: Any, **columns: Any) -> list[float]:
        signal.alarm(60)
        signal.alarm(0)  # there is one such clock in a process
        time.sleep(60)
        return [0.0]

    with pytest.raises(DataError, match="no answer after 0.05 seconds"):
        call(limited(reward, 0.05, name="mine"), PROMPTS, RESPONSES, {}, name="mine")


def test_the_time_limit_leaves_a_fast_function_and_the_callers_handler_alone() -> None:
    before = signal.getsignal(OVER)
    ended = 0
    for number in range(40):  # busy, without ever waiting, until just before or after the limit

        def busy(
            prompts: Any, responses: Any, *, until: float = time.monotonic() + 0.01 + number * 5e-4, **_: Any
        ) -> Any:
            while time.monotonic() < until:
                pass
            return [1.0] * len(responses)

        try:
            found, _ = call(limited(busy, 0.013, name="mine"), PROMPTS, RESPONSES, {}, name="mine")
            assert found == [1.0] * len(RESPONSES)
        except DataError:
            ended += 1
        assert signal.getsignal(OVER) is before
    assert 0 < ended < 40
    time.sleep(0.1)  # what rang now would end the process


def asked(text: str, **columns: Any) -> Prompt:
    return Prompt((Message(role="user", content=text),), key=text, columns=columns)


def test_a_judge_is_called_as_a_reward_is() -> None:
    seen: dict[str, Any] = {}

    def judge(prompts: Any, responses: list[str], **columns: Any) -> list[float]:
        seen.update(columns, prompts=prompts, responses=responses)
        return [1.0, 2.0]

    prompts = [asked("one", topic="a"), asked("two", topic="b")]
    assert judged(judge, prompts, RESPONSES, name="mine", ids=[[1], [2, 3]]) == [1.0, 2.0]
    assert seen["topic"] == ["a", "b"] and seen["response_ids"] == [[1], [2, 3]] and seen["responses"] == RESPONSES
    assert [p[0]["content"] for p in seen["prompts"]] == ["one", "two"]


@pytest.mark.parametrize("given", [[[0.9], [0.2]], torch.tensor([[0.9], [0.2]])])
def test_a_judge_that_gives_lists_is_refused(given: Any) -> None:
    with pytest.raises(DataError, match="judge mine: found a list for each response, expected one number each"):
        judged(lambda prompts, responses, **_: given, [asked("one"), asked("two")], RESPONSES, name="mine")


class Scorer:
    """A reward that is an object."""

    def __call__(self, prompts: Any, responses: Any, topic: Any, **columns: Any) -> list[float]:
        return [0.0] * len(responses)


def test_what_can_be_called_as_rewards_are_is_taken() -> None:
    def outside(prompts: Any, responses: Any, **columns: Any) -> list[float]:
        return [0.0] * len(responses)

    outside.__wrapped__ = len  # type: ignore[attr-defined]  # as functools.wraps leaves it: `outside` is what is called
    for function in (outside, Scorer(), lambda prompts, responses, topic, response_ids: [], min):
        expect_takes(function, ["topic"], what="reward mine")


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda prompts, responses: [], "got an unexpected keyword argument 'topic'"),
        (lambda prompts, responses, topic: [], "got an unexpected keyword argument 'response_ids'"),
        (lambda responses, **columns: [], "too many positional arguments"),
        (lambda prompts, responses, gold, **columns: [], "missing a required argument: 'gold'"),
    ],
)
def test_what_cannot_be_called_as_rewards_are_is_refused_before_it_is(function: Any, why: str) -> None:
    message = (
        f"reward mine: it cannot be called with (prompts, responses, topic=..., response_ids=...): {why}; expected"
    )
    with pytest.raises(SetupError, match=re.escape(f"{message} **columns")):
        expect_takes(function, ["topic"], what="reward mine")
