"""Responses on the disk: who is interrupted goes on after the last whole piece, and other work is never mistaken."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ppomax.config import SamplingConfig
from ppomax.errors import SaveError
from ppomax.models.load import load_causal_lm, load_tokenizer
from ppomax.models.players import Policy
from ppomax.rollout.collect import collect
from ppomax.stages import kept as stage
from ppomax.stages.inputs import PromptRows, compute_of, fitted_prompts, sampling_of
from ppomax.stages.kept import Kept
from ppomax.types import ROLLOUT_TENSORS, Rollout
from stages.conftest import Toys, Trained
from stages.toy import FLOAT32

SAMPLING = SamplingConfig(max_new_tokens=6)
Asked = tuple[str, Policy, Any, PromptRows]


@pytest.fixture(scope="module")
def asked(trained: Trained, toys: Toys) -> Asked:
    tokenizer = load_tokenizer(trained.sft)
    policy = Policy(load_causal_lm(trained.sft, compute_of(FLOAT32)), train_layers=None, trained=False)
    return trained.sft, policy, tokenizer, fitted_prompts(tokenizer, [toys.prompts], 512)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many responses were sampled at a time, in pieces of at most 40."""
    sizes, draw = [], stage.draw

    def counted(policy: Policy, ids: Any, *given: Any, **options: Any) -> Any:
        sizes.append(len(ids))
        return draw(policy, ids, *given, **options)

    monkeypatch.setattr(stage, "draw", counted)
    monkeypatch.setattr(stage, "PIECE", 40)
    return sizes


def kept(path: Path, asked: Asked, **changes: Any) -> Kept:
    directory, policy, tokenizer, read = asked
    settings: dict[str, Any] = {
        "samples": 3, "iteration": 7, "seed": 0, "sampling": SAMPLING, "compute": FLOAT32, "prompts": read.prompts,
        "ids": read.ids, "directory": directory, **changes,
    }  # fmt: skip
    return Kept(path, policy=policy, tokenizer=tokenizer, **settings)


def nothing(amount: int) -> None: ...


def same(found: Rollout, expected: Rollout) -> bool:
    tensors = all(torch.equal(getattr(found, name), getattr(expected, name)) for name in ROLLOUT_TENSORS)
    return tensors and found.prompts == expected.prompts and found.prompt_ids == expected.prompt_ids


def test_in_pieces_or_at_once_the_responses_are_the_same(asked: Asked, drawn: list[int], tmp_path: Path) -> None:
    _, policy, tokenizer, read = asked
    advanced: list[int] = []
    found = kept(tmp_path / "answers", asked).rollout(advanced.append)
    how = sampling_of(SAMPLING, policy, tokenizer)
    expected = collect(policy, read.prompts, read.ids, range(45), samples=3, iteration=7, seed=0, how=how)
    assert drawn == [40, 40, 40, 15] and sum(advanced) == len(found) == 135
    gap = (found.behaviour_logprobs_BR - expected.behaviour_logprobs_BR).abs().max()
    assert gap < 1e-5  # rows that are decoded side by side round by what stands beside them
    assert same(dataclasses.replace(found, behaviour_logprobs_BR=expected.behaviour_logprobs_BR), expected)
    # What is there is not sampled again, and read as it was written, to the last bit.
    again = kept(tmp_path / "answers", asked)
    assert len(again.responses) == 135
    assert same(again.rollout(nothing), found) and len(drawn) == 4


def test_a_file_that_ends_anywhere_is_gone_on_with_after_its_last_whole_piece(
    asked: Asked, drawn: list[int], tmp_path: Path
) -> None:
    whole, path = tmp_path / "whole", tmp_path / "answers"
    expected = kept(whole, asked).rollout(nothing)
    written = whole.read_bytes()
    lines = written.splitlines(keepends=True)
    assert len(lines) == 5
    ends = [sum(map(len, lines[:n])) for n in range(6)]
    for end in {0, 5, len(written)} | {at + move for at in ends[1:-1] for move in (-1, 0, 1, 30)}:
        path.write_bytes(written[:end])
        del drawn[:]
        pieces = max(sum(at <= end for at in ends) - 2, 0)
        assert same(kept(path, asked).rollout(nothing), expected)
        assert drawn == [40, 40, 40, 15][pieces:]
        assert path.read_bytes() == written


@pytest.mark.parametrize(
    "damage",
    [lambda line: b"[[]]\n", lambda line: b"null\n", lambda line: b'[{"ids": [1]}]\n', lambda line: b"\x00" * 99],
)
def test_a_damaged_piece_and_all_after_it_are_sampled_again(
    damage: Callable[[bytes], bytes], asked: Asked, drawn: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "answers"
    expected = kept(path, asked).rollout(nothing)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], damage(lines[2]), *lines[3:]]))
    del drawn[:]
    assert same(kept(path, asked).rollout(nothing), expected)
    assert drawn == [40, 40, 15]
    assert path.read_bytes() == b"".join(lines)


@pytest.mark.parametrize(
    "other",
    [
        {"samples": 2}, {"iteration": 8}, {"seed": 1}, {"sampling": SamplingConfig(max_new_tokens=7)},
        {"sampling": SamplingConfig(max_new_tokens=6, stop=("e",))}, {"prompts": 44}, {"directory": "another"},
    ],
)  # fmt: skip
def test_responses_of_other_work_are_not_taken(
    other: dict[str, Any], asked: Asked, drawn: list[int], trained_top: Trained, tmp_path: Path
) -> None:
    _, _, _, read = asked
    if "prompts" in other:
        other = {"prompts": read.prompts[:44], "ids": read.ids[:44]}
    if "directory" in other:
        other = {"directory": trained_top.sft}
    path = tmp_path / "answers"
    kept(path, asked).rollout(nothing)
    found = kept(path, asked, **other)
    assert found.responses == []
    rollout = found.rollout(nothing)
    assert len(kept(path, asked, **other).responses) == len(rollout)
    assert kept(path, asked).responses == []
    assert json.loads(path.read_text().splitlines()[0]).keys() == {"work"}


def test_a_disk_that_cannot_be_written_is_said_with_the_file(asked: Asked, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises((SaveError, OSError), match="file"):
        kept(tmp_path / "file" / "answers", asked).rollout(nothing)
