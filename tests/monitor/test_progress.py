from __future__ import annotations

import io
import re

import pytest

from ppomax.monitor import progress as module
from ppomax.monitor.progress import progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_it_prints_plain_lines_and_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with progress("ppo", 10, done=2, unit="iterations", file=out) as advance:
        for _ in range(8):
            now[0] += 4.0
            advance(note="score 0.31")
    assert out.getvalue().splitlines() == [
        "ppo: 5/10 iterations, 4.0 s per iteration, 0:20 left, score 0.31",
        "ppo: 8/10 iterations, 4.0 s per iteration, 0:08 left, score 0.31",
        "ppo: 10/10 iterations, 4.0 s per iteration, 0:32 elapsed, score 0.31",
    ]


def test_fast_work_is_given_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with progress("score", 5000, unit="tokens", file=out) as advance:
        now[0] += 4.0
        advance(5000)
    assert out.getvalue() == "score: 5000/5000 tokens, 1,250.0 tokens/s, 0:04 elapsed\n"


def test_an_interrupted_loop_still_ends_the_bar() -> None:
    out = io.StringIO()
    with pytest.raises(KeyboardInterrupt), progress("sft", 3, file=out) as advance:
        advance()
        raise KeyboardInterrupt
    assert out.getvalue().startswith("sft: 1/3 steps")


def test_a_terminal_gets_a_bar_with_count_rate_and_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    out = _Terminal()
    with progress("ppo", 4, file=out) as advance:
        for _ in range(4):
            advance(note="score [0.5]")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "4/4" in text and "steps/s" in text and "score [0.5]" in text


class _Unread(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError


class _UnreadTerminal(_Unread):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("out", [_Unread(), _UnreadTerminal()])
def test_the_work_goes_on_when_nobody_reads(out: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    done = 0
    with progress("ppo", 4, file=out) as advance:
        for _ in range(4):
            now[0] += 20.0
            advance()
            done += 1
    assert done == 4
