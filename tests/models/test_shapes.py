"""Shapes without weights: against real models, by hand, and between published sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from stages.planned import numel, small
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ppomax.models.shapes import shape_named, shape_of, shape_sized
from ppomax.types import SetupError
from tests.models.architectures import CONFIGS, OTHERS


@pytest.mark.parametrize(
    ("size", "published"),
    [
        ("135m", 134_515_008), ("1.1b", 1_100_048_384), ("7b", 6_738_415_616), ("8b", 8_030_261_248),
        ("13b", 13_015_864_320), ("70b", 68_976_648_192),
    ],
)  # fmt: skip
def test_sizes_are_those_of_the_published_models(size: str, published: int) -> None:
    assert shape_sized(size, 0).causal == published


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_parameters_are_those_of_the_real_model(name: str) -> None:
    config = CONFIGS[name]()
    shape = shape_of(config, name)
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(config)
    causal.tie_weights()  # which some versions of transformers leave to those who load weights
    assert shape.causal == numel(causal)
    if "gemma" not in name and "gpt" not in name:
        config.num_labels = 1
        with torch.device("meta"):
            assert shape.scalar == numel(AutoModelForSequenceClassification.from_config(config))


def test_a_layer_of_llama_by_hand() -> None:
    shape = shape_of(small(), "small")
    # Queries and output 64 × 64, keys and values 64 × 32, three maps 64 × 176; two norms of 64.
    assert shape.matrices == 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 176
    assert shape.layer == shape.matrices + 2 * 64
    assert shape.rank_one == 2 * 128 + 2 * 96 + 3 * 240
    assert (shape.embedding, shape.unembedding, shape.rest) == (500 * 64, 0, 64)
    assert shape.causal == 3 * shape.layer + 500 * 64 + 64
    assert shape.scalar == shape.causal + 64
    assert shape.gated and not shape_of(CONFIGS["gpt2"](), "gpt2").gated


@pytest.mark.parametrize("millions", [30, 135, 250, 500, 2_000, 5_000, 10_000, 20_000, 50_000, 180_000])
def test_a_size_between_is_near_what_was_asked(millions: int) -> None:
    shape = shape_sized(f"{millions}m", millions * 1e6)
    assert shape.causal == pytest.approx(millions * 1e6, rel=0.01)
    assert shape.hidden == shape.heads * shape.head_dim and shape.heads % shape.kv_heads == 0


def test_a_directory_needs_its_config_alone(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert shape_named(str(tmp_path)).causal == shape_of(small(), "small").causal


def test_models_that_are_not_dense_stacks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mixtral", "num_local_experts": 8, "hidden_size": 64})
    )
    with pytest.raises(SetupError, match="expected one stack of equal, dense decoder layers"):
        shape_named(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SetupError, match=r"config\.json cannot be read"):
        shape_named(str(tmp_path))


def test_of_a_model_for_images_the_text_part_is_planned() -> None:
    config = OTHERS["gemma3-images"]()
    assert shape_of(config, "images") == shape_of(config.get_text_config(), "text")
