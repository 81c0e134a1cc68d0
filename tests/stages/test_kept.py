"""Responses on the disk: who is interrupted goes on with those that are missing, and other work is never mistaken."""

from __future__ import annotations

import dataclasses
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ppomax.config import SamplingConfig
from ppomax.errors import SaveError
from ppomax.models.load import Compute, load_causal_lm, load_tokenizer
from ppomax.models.players import Policy
from ppomax.rollout.collect import collect
from ppomax.stages import kept as stage
from ppomax.stages.inputs import PromptRows, compute_of, fitted_prompts, sampling_of
from ppomax.stages.kept import Kept
from ppomax.types import ROLLOUT_TENSORS, Rollout
from stages.conftest import Draws, Toys, Trained
from stages.toy import FLOAT32

SAMPLING = SamplingConfig(max_new_tokens=6, max_rows=16)
Asked = tuple[str, Policy, Any, PromptRows]


@pytest.fixture(scope="module")
def asked(trained: Trained, toys: Toys) -> Asked:
    tokenizer = load_tokenizer(trained.sft)
    return (
        trained.sft,
        policy_of(trained.sft, compute_of(FLOAT32)),
        tokenizer,
        fitted_prompts(tokenizer, [toys.prompts], 512),
    )


def policy_of(directory: str, compute: Compute) -> Policy:
    return Policy(load_causal_lm(directory, compute), train_layers=None, trained=False)


def configured(directory: str, **changes: Any) -> Policy:
    policy = policy_of(directory, compute_of(FLOAT32))
    for name, value in changes.items():
        setattr(policy.model.config, name, value)
    return policy


@pytest.fixture
def drawn(draws: Draws) -> list[int]:
    """How many responses were sampled, each time that some were."""
    return draws.asked


def kept(path: Path, asked: Asked, sampling: SamplingConfig = SAMPLING, **changes: Any) -> Kept:
    directory, policy, tokenizer, read = asked
    settings: dict[str, Any] = {
        "policy": policy, "directory": directory, "prompts": read.prompts, "ids": read.ids, "samples": 3,
        "iteration": 7, "seed": 0, "how": sampling_of(sampling, policy, tokenizer), "stop": sampling.stop, **changes,
    }  # fmt: skip
    return Kept(path, **settings)


def nothing(amount: int) -> None: ...


def same(found: Rollout, expected: Rollout) -> bool:
    """Equal but for the log-probs, which are not kept."""
    names = {*ROLLOUT_TENSORS} - {"behaviour_logprobs_BR"}
    tensors = all(torch.equal(getattr(found, name), getattr(expected, name)) for name in names)
    return tensors and found.prompts == expected.prompts and found.prompt_ids == expected.prompt_ids


def test_the_responses_are_those_of_the_sampler_and_not_sampled_again(
    asked: Asked, drawn: list[int], tmp_path: Path
) -> None:
    _, policy, tokenizer, read = asked
    advanced: list[int] = []
    found = kept(tmp_path / "answers", asked).rollout(advanced.append)
    how = sampling_of(SAMPLING, policy, tokenizer)
    assert same(found, collect(policy, read.prompts, read.ids, range(45), samples=3, iteration=7, seed=0, how=how))
    assert torch.equal(found.behaviour_logprobs_BR.isnan(), found.mask_BR)  # nobody takes them for log-probs
    assert 0 < found.truncated_B.sum() < 135  # both kinds of ending
    assert drawn == [135] and sum(advanced) == len(found) == 135
    again = kept(tmp_path / "answers", asked)
    assert len(again.responses) == 135
    assert same(again.rollout(nothing), found) and drawn == [135]


@pytest.mark.parametrize("after", [0, 1, 50, 134])
def test_what_had_ended_before_an_interruption_is_not_sampled_again(
    after: int, asked: Asked, drawn: list[int], tmp_path: Path
) -> None:
    expected = kept(tmp_path / "whole", asked).rollout(nothing)
    one, ended = kept(tmp_path / "answers", asked), 0

    def interrupted(amount: int) -> None:
        nonlocal ended
        ended += amount
        if ended > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one.rollout(interrupted)
    assert len(one.responses) == ended > after
    del drawn[:]
    assert same(kept(tmp_path / "answers", asked).rollout(nothing), expected)
    assert drawn == [135 - ended] * (ended < 135)


def test_a_file_that_ends_anywhere_is_gone_on_with_after_its_last_whole_line(
    asked: Asked, drawn: list[int], tmp_path: Path
) -> None:
    whole, path = tmp_path / "whole", tmp_path / "answers"
    expected = kept(whole, asked).rollout(nothing)
    written = whole.read_bytes()
    for end in {0, 5, len(written)} | {at + move for at in (29, len(written) // 2) for move in range(-2, 25, 3)}:
        path.write_bytes(written[:end])
        del drawn[:]
        found = max(written[:end].count(b"\n") - 1, 0)
        assert same(kept(path, asked).rollout(nothing), expected)
        assert drawn == [135 - found] * (found < 135)
        assert sorted(path.read_bytes().splitlines()) == sorted(written.splitlines())


@pytest.mark.parametrize("damage", [b"[[]]\n", b"null\n", b'[1, [2], "x", 3]\n', b"\x00" * 99, b"7\n"])
def test_a_damaged_line_and_all_after_it_are_sampled_again(
    damage: bytes, asked: Asked, drawn: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "answers"
    expected = kept(path, asked).rollout(nothing)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:40], damage, *lines[41:]]))
    del drawn[:]
    assert same(kept(path, asked).rollout(nothing), expected)
    assert drawn == [135 - 39]
    assert sorted(path.read_bytes().splitlines(keepends=True)) == sorted(lines)


OTHER: dict[str, Callable[[Asked, Trained], dict[str, Any]]] = {
    "samples": lambda asked, other: {"samples": 2},
    "iteration": lambda asked, other: {"iteration": 8},
    "seed": lambda asked, other: {"seed": 1},
    "length": lambda asked, other: {"sampling": SamplingConfig(max_new_tokens=7, max_rows=16)},
    "temperature": lambda asked, other: {"sampling": SamplingConfig(max_new_tokens=6, temperature=0.9)},
    "stop": lambda asked, other: {"sampling": SamplingConfig(max_new_tokens=6, stop=("e",))},
    "other stop": lambda asked, other: {"sampling": SamplingConfig(max_new_tokens=6, stop=("f",))},
    "eos": lambda asked, other: {
        "how": dataclasses.replace(sampling_of(SAMPLING, asked[1], asked[2]), eos_ids=[0])
    },
    "prompts": lambda asked, other: {"prompts": asked[3].prompts[:44], "ids": asked[3].ids[:44]},
    "weights": lambda asked, other: {"directory": other.sft},
    "config": lambda asked, other: {"policy": configured(asked[0], rms_norm_eps=2e-5)},
    "precision": lambda asked, other: {"policy": policy_of(asked[0], Compute(torch.device("cpu"), torch.bfloat16))},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_responses_of_other_work_are_not_taken(
    name: str, asked: Asked, drawn: list[int], trained_top: Trained, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = OTHER[name](asked, trained_top)
    path = tmp_path / "answers"
    before = {"sampling": SamplingConfig(max_new_tokens=6, stop=("e",))} if name == "other stop" else {}
    kept(path, asked, **before).rollout(nothing)
    capsys.readouterr()
    found = kept(path, asked, **other)
    assert found.responses == {}
    assert f"{path}: found answers of other weights, prompts, settings or versions" in capsys.readouterr().out
    rollout = found.rollout(nothing)
    assert len(kept(path, asked, **other).responses) == len(rollout)
    assert kept(path, asked, **before).responses == {}
    assert json.loads(path.read_text().splitlines()[0]).keys() == {"work"}


def test_responses_of_another_version_are_not_taken(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(tmp_path / "answers", asked).rollout(nothing)
    monkeypatch.setattr(stage, "__version__", "0.0.0")
    assert kept(tmp_path / "answers", asked).responses == {}


def test_fewer_rows_side_by_side_are_the_same_work(asked: Asked, drawn: list[int], tmp_path: Path) -> None:
    expected = kept(tmp_path / "answers", asked).rollout(nothing)
    narrow = SamplingConfig(max_new_tokens=6, max_rows=3, max_cache_tokens=999)
    assert same(kept(tmp_path / "answers", asked, sampling=narrow).rollout(nothing), expected)
    assert drawn == [135]


def test_what_cannot_be_written_is_said_with_the_file(asked: Asked, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match=r"file/answers: cannot save"):
        kept(tmp_path / "file" / "answers", asked).rollout(nothing)


def test_a_first_response_that_cannot_be_written_leaves_nothing(asked: Asked, tmp_path: Path) -> None:
    one = kept(tmp_path / "answers", asked)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        with pytest.raises(SaveError, match="answers: cannot save"):
            one.rollout(nothing)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [] and one.responses == {}
