"""A frozen model by its hub name: the run remembers the commit that it read."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from ppomax.stages.inputs import expect_same_weights, weights_hash
from ppomax.types import SetupError

NAME = "someone/model"


def downloaded(cache: Path, commit: str) -> None:
    """What the hub's library leaves of a download."""
    folder = cache / "models--someone--model"
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "snapshots" / commit / "config.json").write_text("{}")
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)


def test_another_commit_is_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert weights_hash(NAME) == NAME, "nothing is in the cache"
    downloaded(tmp_path, "a" * 40)
    begun = weights_hash(NAME)
    assert begun == f"{NAME}@{'a' * 40}"
    expect_same_weights("frozen model", NAME, begun)
    expect_same_weights("frozen model", NAME, NAME)  # a run from before commits were kept
    downloaded(tmp_path, "b" * 40)
    with pytest.raises(SetupError, match="frozen model someone/model: its weights changed since the run began"):
        expect_same_weights("frozen model", NAME, begun)


def test_a_name_that_the_hub_could_not_have_stands_for_itself() -> None:
    assert weights_hash("no name/of a model") == "no name/of a model"
