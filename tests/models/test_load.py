"""Opening models: what is not a whole, trained model of the right kind is an error that names it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from models.architectures import BFLOAT16, FLOAT32, save_model
from ppomax.models.load import (
    context_length,
    load_causal_lm,
    load_scalar_lm,
    load_tokenizer,
    model_directory,
    resolve_compute,
    same_vocabulary,
    tied,
)
from ppomax.types import SetupError

LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A causal LM whose unembedding is a tensor of its own."""
    return save_model("llama-untied", tmp_path_factory.mktemp("untied"))


@pytest.fixture
def damaged(untied: str, tmp_path: Path) -> Callable[..., str]:
    """A copy of `untied` whose tensors went through a function."""

    def damage(change: Callable[[dict[str, torch.Tensor]], object]) -> str:
        folder = shutil.copytree(untied, tmp_path / "damaged")
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return str(folder)

    return damage


def both_loaders(name: str) -> list[Callable[[], object]]:
    return [lambda: load_causal_lm(name, FLOAT32), lambda: load_scalar_lm(name, FLOAT32, fresh_head_seed=1)]


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "runs/sft/final", "plain-name"])
def test_a_missing_directory_lists_what_a_model_may_be(name: str) -> None:
    with pytest.raises(SetupError, match=re.escape(f"{name}: no such directory. Expected a Hugging Face model")):
        model_directory(name)


def test_a_missing_directory_below_a_real_one_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(SetupError, match=re.escape("runs/sft: no such directory (there is a directory runs/ but not")):
        model_directory("runs/sft")
    assert model_directory("owner/name") == "owner/name"


def test_a_directory_without_config_json(tmp_path: Path) -> None:
    for load in (*both_loaders(str(tmp_path)), lambda: load_tokenizer(str(tmp_path))):
        with pytest.raises(SetupError, match=re.escape(f"{tmp_path}: found a directory without config.json")):
            load()


@pytest.mark.parametrize(
    "config", ["{", "[]", "{}", '{"model_type": "no-such"}', '{"model_type": "llama", "hidden_size": "wide"}']
)
def test_a_config_that_is_none(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    for load in both_loaders(str(tmp_path)):
        with pytest.raises(SetupError, match=re.escape(f"{tmp_path}: cannot be loaded as AutoModel")):
            load()
    with pytest.raises(SetupError, match=re.escape(f"{tmp_path}: no tokenizer could be loaded")):
        load_tokenizer(str(tmp_path))


def test_a_model_without_tokenizer(lively: str, tmp_path: Path) -> None:
    folder = shutil.copytree(lively, tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert load_causal_lm(str(folder), FLOAT32) is not None
    with pytest.raises(
        SetupError, match=r"no tokenizer could be loaded .*Expected tokenizer\.json beside config\.json"
    ):
        load_tokenizer(str(folder))


def test_weights_that_are_absent_cut_or_pickled(lively: str, tmp_path: Path) -> None:
    for name, change in {
        "absent": lambda file: file.unlink(),
        "cut": lambda file: file.write_bytes(file.read_bytes()[:-64]),
        "header": lambda file: file.write_bytes(file.read_bytes()[:6]),
        "pickled": lambda file: file.rename(file.with_name("pytorch_model.bin")),
    }.items():
        folder = shutil.copytree(lively, tmp_path / name)
        change(folder / "model.safetensors")
        for load in both_loaders(str(folder)):
            with pytest.raises(SetupError, match=re.escape(f"{folder}: cannot be loaded as")):
                load()


def test_a_tensor_that_is_absent_is_never_made_up(damaged: Callable[..., str]) -> None:
    folder = damaged(lambda tensors: tensors.pop(LAYER))
    for load in both_loaders(folder):
        with pytest.raises(SetupError, match=re.escape(f"{folder}: found incomplete weights ({LAYER} is missing; 1 ")):
            load()


def test_a_tensor_of_another_shape_is_never_made_up(damaged: Callable[..., str]) -> None:
    folder = damaged(lambda tensors: tensors.update({LAYER: tensors[LAYER][:-1].contiguous()}))
    for load in both_loaders(folder):
        with pytest.raises(SetupError, match=re.escape(f"({LAYER} has shape [47, 32], not [48, 32]; 1 ")):
            load()


def test_a_reward_model_is_no_policy_if_its_unembedding_is_gone(damaged: Callable[..., str]) -> None:
    folder = damaged(lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(SetupError, match=re.escape("(lm_head.weight is missing")):
        load_causal_lm(folder, FLOAT32)
    load_scalar_lm(folder, FLOAT32, fresh_head_seed=1)


def test_a_scalar_model_without_a_trained_head_is_refused(lively: str) -> None:
    with pytest.raises(
        SetupError, match=r"no trained score head \(score\.weight is missing\), expected a reward model"
    ):
        load_scalar_lm(lively, FLOAT32)


def test_a_classifier_with_two_labels_is_no_reward_model(lively: str, tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(lively, num_labels=2).save_pretrained(tmp_path)
    with pytest.raises(SetupError, match=re.escape("(score.weight has shape [2, 32], not [1, 32])")):
        load_scalar_lm(str(tmp_path), FLOAT32)
    assert load_scalar_lm(str(tmp_path), FLOAT32, fresh_head_seed=1).score.weight.shape == (1, 32)


def test_a_fresh_head_depends_on_its_seed_alone(lively: str, lively_reward: str) -> None:
    heads = [load_scalar_lm(lively, FLOAT32, fresh_head_seed=seed).score.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    # InstructGPT's start: standard deviation 1 / sqrt(H + 1).
    assert float(heads[0].detach().std()) == pytest.approx(33**-0.5, rel=0.4)
    trained = load_scalar_lm(lively_reward, FLOAT32).score.weight
    anew = load_scalar_lm(lively_reward, FLOAT32, fresh_head_seed=1).score.weight
    assert torch.equal(anew, heads[0]) and not torch.equal(trained, anew)


def test_loading_leaves_the_callers_random_state(lively: str) -> None:
    before = torch.get_rng_state()
    load_scalar_lm(lively, FLOAT32, fresh_head_seed=1)
    load_causal_lm("tiny", FLOAT32)
    assert torch.equal(torch.get_rng_state(), before)


def test_models_come_in_evaluation_mode_and_in_the_given_precision(lively: str) -> None:
    for compute in (FLOAT32, BFLOAT16):
        model = load_causal_lm(lively, compute)
        assert not model.training and {p.dtype for p in model.parameters()} == {compute.dtype}


@pytest.mark.parametrize("device", ["no-such-device", "cuda:977", "mps:9"])
def test_an_unknown_device_is_named(device: str) -> None:
    with pytest.raises(SetupError, match=f"device '{device}' cannot be used"):
        resolve_compute(device, "auto")


def test_auto_takes_what_is_there() -> None:
    compute = resolve_compute("auto", "auto")
    assert compute.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert compute.dtype in (torch.float32, torch.bfloat16)
    assert resolve_compute("cpu", "float32") == FLOAT32 and resolve_compute("cpu", "bfloat16") == BFLOAT16


def test_vocabularies_are_compared_id_by_id(lively: str, tmp_path: Path) -> None:
    folder = shutil.copytree(lively, tmp_path / "other")
    a, b = load_tokenizer(lively), load_tokenizer(str(folder))
    assert same_vocabulary(a, b)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    swapped = load_tokenizer(str(folder))
    assert len(swapped) == len(a) and not same_vocabulary(a, swapped)


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 512),
        ({"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
          "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}, 64),
    ],
)  # fmt: skip
def test_a_context_ends_where_longer_rows_would_turn_the_positions_of_others(
    rope: dict[str, Any], longest: int
) -> None:
    model = load_causal_lm("tiny", FLOAT32)
    model.config.rope_parameters = rope
    assert context_length(model) == longest


def test_weights_are_tied_if_they_are_one_tensor_whatever_the_configuration_says(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model("llama-untied", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert not tied(load_causal_lm(str(folder), FLOAT32))
    assert tied(load_causal_lm("tiny", FLOAT32))
    assert not tied(load_scalar_lm("tiny", FLOAT32, fresh_head_seed=0))
