"""Tests with a real vLLM, where one is installed: `make test-vllm`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models.architectures import EOS, FLOAT32, VOCABULARY, enliven
from transformers import LlamaConfig, LlamaForCausalLM

from ppomax.models.load import export, load_causal_lm, load_tokenizer
from ppomax.models.players import Policy
from ppomax.rollout.vllm import VLLM

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]

LONGEST, MAX_ROWS = 192, 8
# vLLM's attention for processors wants heads of at least 32.
LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256, "bos_token_id": 1,
    "eos_token_id": EOS, "pad_token_id": EOS, "tie_word_embeddings": True,
}  # fmt: skip


def llama(folder: Path, **changes: object) -> str:
    """The directory of a small Llama with lively weights and the tokenizer of `tiny`."""
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes}))  # type: ignore[arg-type]
    enliven(model)
    export(model.eval(), load_tokenizer("tiny"), folder)
    return str(folder)


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def policy(directory: str) -> Policy:
    """The policy in float32, loaded anew for each test."""
    return Policy(load_causal_lm(directory, FLOAT32), train_layers=None, trained=True)


@pytest.fixture(scope="module")
def engine(directory: str) -> Iterator[VLLM]:
    """One engine for all tests of a file: a start takes seconds, and a process has one at a time."""
    model = Policy(load_causal_lm(directory, FLOAT32), train_layers=None, trained=False)
    engine = VLLM(directory, model, FLOAT32, longest=LONGEST, max_rows=MAX_ROWS)
    yield engine
    engine.close()
    assert not torch.distributed.is_initialized()
