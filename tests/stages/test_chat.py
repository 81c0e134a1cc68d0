"""Chat: what the model is shown, how it is drawn, and what the commands do."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ppomax.config import ChatConfig, ModelConfig, SamplingConfig
from ppomax.data.chat import render_prompt
from ppomax.models.load import load_causal_lm, load_tokenizer
from ppomax.models.players import Policy
from ppomax.stages.chat import Speaker, chat, reply
from ppomax.stages.inputs import compute_of
from ppomax.types import DataError, Message, SetupError

FLOAT32 = ModelConfig(dtype="float32")
SAMPLING = SamplingConfig(max_new_tokens=6, temperature=1.0)
TINY = ChatConfig(model="tiny", sampling=SAMPLING, compute=FLOAT32)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PPOMAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def speaker() -> Speaker:
    """The tiny model: contexts of 512 tokens, a byte each."""
    policy = Policy(load_causal_lm("tiny", compute_of(FLOAT32)), train_layers=None, trained=False)
    return Speaker("tiny", policy, load_tokenizer("tiny"))


def said(lines: str, config: ChatConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What chat prints when `lines` come in on stdin."""
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    chat(config)
    return capsys.readouterr().out


def test_a_reply_joins_the_history_and_the_next_prompt(speaker: Speaker) -> None:
    first = reply(speaker, "hello", SAMPLING, 0, turn=0)
    assert [m["role"] for m in speaker.history] == ["user", "assistant"]
    assert first.removesuffix(" …") == speaker.history[1]["content"]
    seen: list[list[int]] = []

    def watch(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(named["input_ids"][0].tolist())

    speaker.policy.base.register_forward_pre_hook(watch, with_kwargs=True)
    expected = render_prompt(speaker.tokenizer, [*speaker.history, Message(role="user", content="again")])
    reply(speaker, "again", SAMPLING, 0, turn=1)
    assert seen[0] == expected


def test_seed_and_turn_decide_the_tokens(speaker: Speaker) -> None:
    def fresh(seed: int, turn: int) -> str:
        speaker.history = []
        return reply(speaker, "hello", SAMPLING, seed, turn=turn)

    assert fresh(0, 0) == fresh(0, 0)
    assert len({fresh(0, 0), fresh(0, 1), fresh(1, 0)}) == 3


def test_top_k_of_one_is_greedy_whatever_the_seed(speaker: Speaker) -> None:
    answers = set()
    for seed in range(3):
        speaker.history = []
        answers.add(reply(speaker, "hello", SamplingConfig(max_new_tokens=6, top_k=1), seed, turn=0))
    assert len(answers) == 1


def test_an_answer_cut_by_the_limit_shows_it(speaker: Speaker) -> None:
    assert reply(speaker, "hello", SamplingConfig(max_new_tokens=1), 0, turn=0).endswith("…")
    assert "…" not in speaker.history[1]["content"]


def test_old_turns_leave_when_the_context_is_full(speaker: Speaker) -> None:
    for turn in range(3):
        reply(speaker, "x" * 300, SAMPLING, 0, turn=turn)
    assert len(speaker.history) == 6
    with pytest.raises(DataError, match="tiny: the message does not fit into 506 tokens"):
        reply(speaker, "x" * 600, SAMPLING, 0, turn=3)
    assert len(speaker.history) == 6


def test_one_message_is_answered_and_nothing_else_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    config = TINY.model_copy(update={"message": "hello"})
    chat(config)
    first = capsys.readouterr().out
    chat(config)
    assert capsys.readouterr().out == first != ""
    with pytest.raises(SetupError, match="--message: found nothing"):
        chat(TINY.model_copy(update={"message": " "}))


def test_a_message_that_is_not_utf8_is_refused(speaker: Speaker) -> None:
    with pytest.raises(DataError, match="the message: found bytes that are not UTF-8"):
        reply(speaker, b"caf\xe9".decode(errors="surrogateescape"), SAMPLING, 0, turn=0)


def test_a_line_that_is_not_utf8_does_not_end_the_dialogue(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, speaker: Speaker
) -> None:
    given = io.TextIOWrapper(io.BytesIO(b"caf\xe9\nhello\n"), encoding="utf-8", errors="strict")
    monkeypatch.setattr("sys.stdin", given)
    chat(TINY)
    out = capsys.readouterr().out
    assert "found bytes that are not UTF-8" in out.replace("\n", " ")
    assert reply(speaker, "hello", SAMPLING, 0, turn=1) in out


def test_stdin_is_a_dialogue_of_one_message_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, speaker: Speaker
) -> None:
    out = said("hello\n\nagain\n/quit\nnever\n", TINY, capsys, monkeypatch)
    expected = [reply(speaker, message, SAMPLING, 0, turn=turn) for turn, message in enumerate(["hello", "again"])]
    assert out == "".join(f"{text}\n" for text in expected)


def test_reset_forgets_all_but_the_system_message(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, speaker: Speaker
) -> None:
    config = TINY.model_copy(update={"system": "Be brief."})
    out = said("one\n/reset\n/unknown\ntwo\n", config, capsys, monkeypatch)
    speaker.history = [Message(role="system", content="Be brief.")]
    assert out.splitlines()[-1] == reply(speaker, "two", SAMPLING, 0, turn=1).splitlines()[-1]
    assert "(a new dialogue)" in out
    assert "unknown command /unknown; known: /reset, /quit" in out


def test_a_message_that_does_not_fit_ends_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = said(f"{'x' * 600}\nhello\n", TINY, capsys, monkeypatch)
    assert "does not fit into 506 tokens" in out.replace("\n", " ")
    assert len(out.splitlines()) > 2


def test_what_one_of_two_models_cannot_read_neither_remembers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, speaker: Speaker, tmp_path: Path
) -> None:
    speaker.policy.model.config.max_position_embeddings = 256
    speaker.policy.model.save_pretrained(tmp_path)
    speaker.tokenizer.save_pretrained(tmp_path)
    seen: list[int] = []
    told = render_prompt

    def watch(tokenizer: Any, messages: Any) -> list[int]:
        seen.append(len(messages))
        return told(tokenizer, messages)

    monkeypatch.setattr("ppomax.stages.chat.render_prompt", watch)
    said(f"hello\n{'x' * 300}\nagain\n", TINY.model_copy(update={"against": str(tmp_path)}), capsys, monkeypatch)
    # "hello" twice; the long one by the first model alone; then both know the first exchange and "again".
    assert seen == [1, 1, 3, 3, 3]


def test_two_models_answer_side_by_side_with_histories_of_their_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = said("hello\n", TINY.model_copy(update={"against": "tiny"}), capsys, monkeypatch)
    (header,) = [line for line in out.splitlines() if "tiny" in line]
    assert header.count("tiny") == 2
    left, right = next(line for line in out.splitlines() if line.startswith("│")).strip("│").split("│")
    assert left.strip() == right.strip() != ""  # one model twice, the same uniforms
