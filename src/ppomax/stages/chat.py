"""Talk to a model, or to two side by side."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from io import TextIOWrapper, UnsupportedOperation
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ppomax.config import ChatConfig, SamplingConfig
from ppomax.data.chat import fit_prompt, render_prompt
from ppomax.errors import printable
from ppomax.models.load import context_length, load_causal_lm, load_tokenizer
from ppomax.models.players import Policy
from ppomax.rollout.collect import collect, response_texts
from ppomax.stages.inputs import compute_of, expect_native, sampling_of
from ppomax.types import DataError, Message, Prompt, SetupError


@dataclass
class Speaker:
    """A model in a dialogue: its own answers are part of its history."""

    name: str
    policy: Policy
    tokenizer: Any
    history: list[Message] = field(default_factory=list)


def chat(config: ChatConfig) -> None:
    """Answer the messages of `--message`, of stdin (one a line), or of a person at the terminal, on stdout."""
    expect_native(config.sampling)
    if config.message is not None and not config.message.strip():
        raise SetupError("--message: found nothing, expected a message to answer")
    names = [config.model] if config.against is None else [config.model, config.against]
    speakers = [_speaker(name, config) for name in names]
    console = Console(highlight=False)
    if config.message is not None:
        _show(console, speakers, [reply(s, config.message, config.sampling, config.seed, turn=0) for s in speakers])
        return
    for turn, message in enumerate(_messages(console, speakers, config.system)):
        histories = [speaker.history for speaker in speakers]
        try:
            replies = [reply(s, message, config.sampling, config.seed, turn=turn) for s in speakers]
        except DataError as error:
            for speaker, history in zip(speakers, histories, strict=True):
                speaker.history = history  # what one model could answer and another not, neither remembers
            console.print(Text(f"{error}; /reset starts a new dialogue", style="yellow"))
        else:
            _show(console, speakers, replies)


def reply(speaker: Speaker, message: str, sampling: SamplingConfig, seed: int, *, turn: int) -> str:
    """The model's answer to `message`, which joins its history with it; old turns are dropped to fit its context.

    The tokens are keyed by (seed, turn) alone, so that two models draw the same uniforms.
    """
    try:
        message.encode()
    except UnicodeEncodeError:  # bytes that the terminal, a pipe or the shell could not read as text
        raise DataError("the message: found bytes that are not UTF-8, expected text") from None
    turns = [*speaker.history, Message(role="user", content=message)]
    room = (context_length(speaker.policy.model) or sys.maxsize) - sampling.max_new_tokens
    fitted = fit_prompt(speaker.tokenizer, turns, room)
    if fitted is None:
        raise DataError(
            f"{speaker.name}: the message does not fit into {max(room, 0)} tokens (its context less "
            f"{sampling.max_new_tokens} for the answer); shorten it or lower --sampling.max-new-tokens"
        )
    rollout = collect(
        speaker.policy, [Prompt(fitted, key="")], [tuple(render_prompt(speaker.tokenizer, fitted))], [0], samples=1,
        iteration=turn, seed=seed, how=sampling_of(sampling, speaker.policy, speaker.tokenizer),
    )  # fmt: skip
    text = response_texts(speaker.tokenizer, rollout)[0]
    speaker.history = [*turns, Message(role="assistant", content=text)]
    return f"{text} …" if bool(rollout.truncated_B[0]) else text


def _speaker(name: str, config: ChatConfig) -> Speaker:
    tokenizer = load_tokenizer(name, otherwise=config.compute.chat_template)
    policy = Policy(load_causal_lm(name, compute_of(config.compute)), train_layers=None, trained=False)
    return Speaker(name, policy, tokenizer, _opening(config.system))


def _opening(system: str | None) -> list[Message]:
    return [] if system is None else [Message(role="system", content=system)]


def _messages(console: Console, speakers: list[Speaker], system: str | None) -> Iterator[str]:
    """What is said to the models, line by line, until the end of the input or /quit; /reset empties the histories."""
    if isinstance(sys.stdin, TextIOWrapper):
        with suppress(UnsupportedOperation):  # a caller has read from it before
            sys.stdin.reconfigure(errors="surrogateescape")  # so that `reply` refuses what is no text, and goes on
    for line in _typed(console) if sys.stdin.isatty() else sys.stdin:
        message = line.strip()
        if message == "/quit":
            return
        if message == "/reset":
            for speaker in speakers:
                speaker.history = _opening(system)
            console.print("(a new dialogue)", style="dim")
        elif message.startswith("/"):
            console.print(f"unknown command {message.split()[0]}; known: /reset, /quit", style="yellow", markup=False)
        elif message:
            yield message


def _typed(console: Console) -> Iterator[str]:
    """Lines from the terminal; Ctrl-D and Ctrl-C at the prompt end them."""
    import readline  # noqa: F401  gives input() arrow keys and earlier lines

    console.print("/reset starts a new dialogue; /quit or Ctrl-D ends.", style="dim")
    while True:
        try:
            yield input("you > ")  # not rich's prompt: readline would draw over what it does not know
        except (EOFError, KeyboardInterrupt) as end:
            if end.args == (signal.SIGTERM,):
                raise
            console.print("\nGoodbye.", style="dim")
            return


def _shown(console: Console, text: str) -> str:
    """What a terminal may get; a file or a program gets the text as it is."""
    return printable(text) if console.is_terminal else text


def _show(console: Console, speakers: list[Speaker], replies: list[str]) -> None:
    """One answer as it is, two side by side."""
    if len(replies) == 1:
        console.print(Text(_shown(console, replies[0])), soft_wrap=True)
        return
    table = Table(expand=True)
    for speaker in speakers:
        table.add_column(Text(speaker.name), ratio=1)
    table.add_row(*(Text(_shown(console, text)) for text in replies))
    console.print(table)
