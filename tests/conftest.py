"""What every test shares: one thread, no hub, a model cache of the session's own, and small models."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported, and only here: the tests of the house rules must not pay for the import of torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where embedded models are made in this session: never the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("PPOMAX_CACHE", str(folder))
        yield folder


@pytest.fixture
def tiny_model() -> Any:
    """The embedded `tiny` Llama in float32, loaded anew for each test."""
    import torch

    from ppomax.models.load import Compute, load_causal_lm

    return load_causal_lm("tiny", Compute(torch.device("cpu"), torch.float32))


@pytest.fixture
def tiny_tokenizer() -> Any:
    """The tokenizer of `tiny`: bytes, ChatML, and one id for eos and pad."""
    from ppomax.models.load import load_tokenizer

    return load_tokenizer("tiny")


@pytest.fixture(scope="session")
def lively(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory like `tiny`, with weights so large that attention, order and neighbours visibly matter."""
    from models.architectures import save_model

    return save_model("llama", tmp_path_factory.mktemp("lively"))


@pytest.fixture(scope="session")
def lively_reward(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a reward model on the trunk of `lively`, in the exported layout."""
    from models.architectures import save_reward_model

    return save_reward_model("llama", tmp_path_factory.mktemp("lively-reward"))
