"""Checkpoints: bit for bit, whole or absent, and damage that is found and named."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem

from ppomax.engine import checkpoint as module
from ppomax.engine.checkpoint import (
    checkpoints,
    file_hash,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from ppomax.types import DataError

STATE: dict[str, Any] = {
    "iteration": 12, "kl_coef": 0.1 + 0.2, "none": None, "text": "ü", "flag": True,
    "philox": [2**127 + 1, 0], "moments": {"mean": -1e-300, "count": 3},
}  # fmt: skip


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save(folder: Path, number: int, **options: int) -> Path:
    return save_checkpoint(folder, f"iteration-{number}", {"w": torch.full((4,), number)}, {"n": number}, **options)


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    a, b = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found, expected))
    assert a.equal(b)


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        step(model, optimiser)
    return model, optimiser


def step(model: torch.nn.Module, optimiser: torch.optim.Optimizer) -> None:
    model(torch.linspace(-1, 1, 20).view(4, 5)).pow(2).mean().backward()
    optimiser.step()
    optimiser.zero_grad()


def flat(model: torch.nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    moments = optimiser.state_dict()["state"]
    return {f"model.{k}": v for k, v in model.state_dict().items()} | {
        f"optimiser.{i}.{k}": v for i, entry in moments.items() for k, v in entry.items()
    }


def test_every_kind_of_tensor_returns_bit_for_bit(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    tensors = {
        "bf16": torch.randn(7, 5).bfloat16(), "f32": base, "f64": torch.randn(3).double(), "i64": torch.arange(5),
        "scalar": torch.tensor(3.25), "int scalar": torch.tensor(-7), "bool": torch.tensor([True, False]),
        "u8": torch.arange(9, dtype=torch.uint8), "empty": torch.zeros(0, 4), "transposed": torch.randn(6, 4).t(),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "tied": base, "view of tied": base[2:4], "part": torch.arange(100)[10:20],
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }  # fmt: skip
    path = save_checkpoint(tmp_path, "iteration-12", tensors, STATE)
    loaded, state = load_checkpoint(path)
    assert state == STATE and loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_same_bits(loaded[name], tensor)
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    returned, _ = load_checkpoint(path, into=into)
    for name, tensor in tensors.items():
        assert returned[name] is into[name]
        assert_same_bits(into[name], tensor)


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    model, optimiser = trained()
    path = save_checkpoint(tmp_path, "step-3", flat(model, optimiser), {})
    other, other_optimiser = trained()
    for _ in range(4):
        step(other, other_optimiser)
    load_checkpoint(path, into=flat(other, other_optimiser))
    for pair in ((model, optimiser), (other, other_optimiser)):
        step(*pair)
    for name, tensor in flat(model, optimiser).items():
        assert_same_bits(flat(other, other_optimiser)[name], tensor)


def test_beside_a_gpu_nothing_waits_for_the_stream_of_another_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ahead(*arguments: Any, **options: Any) -> None:
        raise AssertionError("copies ahead wait for the current device")

    monkeypatch.setattr(filesystem, "_OverlappingCpuLoader", ahead)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert verify_checkpoint(save(tmp_path, 1)) == []


def test_no_tensors_and_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_checkpoint(save_checkpoint(tmp_path, "step-1", {}, {"a": 1})) == ({}, {"a": 1})
    monkeypatch.setattr(module, "FILE_BYTES", 100)
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)} | {"large": torch.ones(99)}
    path = save_checkpoint(tmp_path, "step-2", tensors, {})
    # two tensors of 40 bytes per file, and one file for what is above the limit
    assert len(list(path.glob("*.safetensors"))) == 4
    loaded, _ = load_checkpoint(path)
    assert all(loaded[name].equal(tensor) for name, tensor in tensors.items())


def test_layout_and_manifest(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == set(names(path)) - {"manifest.json"}
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}  # nothing pickled
    for name, entry in manifest["files"].items():
        data = (path / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        assert file_hash(path / name) == entry["sha256"]


def test_numbers_sort_as_numbers_and_old_ones_go(tmp_path: Path) -> None:
    for number in (8, 9, 10, 11):
        save(tmp_path, number)
    assert names(tmp_path) == ["iteration-10", "iteration-11"]
    assert latest_checkpoint(tmp_path) == (tmp_path / "iteration-11", [])
    save(tmp_path, 100, keep=1)
    assert names(tmp_path) == ["iteration-100"]
    assert latest_checkpoint(tmp_path / "missing") == (None, [])


def test_going_back_supersedes_later_checkpoints(tmp_path: Path) -> None:
    for number in (10, 12, 14):
        save(tmp_path, number, keep=3)
    save_checkpoint(tmp_path, "iteration-12", {"w": torch.tensor(-1)}, {"n": -12}, keep=3)
    assert names(tmp_path) == ["iteration-10", "iteration-12"]
    assert load_checkpoint(tmp_path / "iteration-12")[1] == {"n": -12}


def test_superseded_ones_go_before_the_new_one_counts(tmp_path: Path) -> None:
    for number in (10, 12, 13):
        save(tmp_path, number, keep=3)
    save_checkpoint(tmp_path, "iteration-20", {}, {}, keep=3, superseded={"iteration-12", "iteration-13"})
    assert names(tmp_path) == ["iteration-10", "iteration-20"]
    save_checkpoint(tmp_path, "iteration-20", {}, {"again": 1}, keep=2, superseded={"iteration-20"})
    assert names(tmp_path) == ["iteration-10", "iteration-20"]


def test_who_reads_beside_a_run_sees_a_checkpoint_whole_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    cleared, rmtree = [], shutil.rmtree

    def slow(path: Path, **options: Any) -> None:
        cleared.append(path.name)
        rmtree(path, **options)

    save(tmp_path, 1)
    monkeypatch.setattr(module.shutil, "rmtree", slow)
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["iteration-2"]
    assert cleared and not [name for name in cleared if name.startswith("iteration-")]


def test_one_that_is_deleted_while_it_is_read_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    hashed, verify = [], module.file_hash

    def meanwhile(file: Path) -> str:
        if not hashed:
            hashed.append(file)
            save(tmp_path, 2, keep=1)
        return verify(file)

    with monkeypatch.context() as patched:
        patched.setattr(module, "file_hash", meanwhile)
        assert latest_checkpoint(tmp_path) == (tmp_path / "iteration-2", [])


def test_what_was_just_verified_is_not_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 1)
    monkeypatch.setattr(module, "file_hash", None)
    assert load_checkpoint(path, verified=True)[1] == {"n": 1}
    with pytest.raises(TypeError):
        load_checkpoint(path)


def test_leftovers_are_ignored_then_cleaned(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "iteration-1", tmp_path / ".tmp-iteration-2")
    (tmp_path / "notes-to-self").write_text("mine")
    assert latest_checkpoint(tmp_path) == (tmp_path / "iteration-1", [])
    save(tmp_path, 3)
    assert names(tmp_path) == ["iteration-1", "iteration-3", "notes-to-self"]


def test_trap_30_a_flipped_byte_anywhere_is_found_and_the_one_before_used(tmp_path: Path) -> None:
    older, path = save(tmp_path, 1), save(tmp_path, 2)
    for name in names(path):
        file, good = path / name, (path / name).read_bytes()
        for place in range(len(good)):
            file.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            found, problems = latest_checkpoint(tmp_path)
            assert found == older and problems, (name, place)
            assert "found" in problems[0] and "expected" in problems[0] and str(path) in problems[0]
            if name != "manifest.json":
                assert problems == verify_checkpoint(path) and problems[0].startswith(f"{file}: found SHA-256")
        file.write_bytes(good)
    assert latest_checkpoint(tmp_path) == (path, [])


def test_trap_30_a_save_that_fails_leaves_the_only_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1, keep=1)
    unwritable = {"w": torch.zeros(4), "z": torch.zeros(2, dtype=torch.complex128)}  # no such type in safetensors
    with pytest.raises(KeyError):
        save_checkpoint(tmp_path, "iteration-2", unwritable, {}, keep=1)
    assert latest_checkpoint(tmp_path) == (tmp_path / "iteration-1", [])
    assert load_checkpoint(tmp_path / "iteration-1")[1] == {"n": 1}
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["iteration-2"]


def test_each_damage_is_described(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    shard = next(path.glob("*.safetensors"))
    good = shard.read_bytes()
    shard.write_bytes(good[:-3])
    assert verify_checkpoint(path) == [f"{shard}: found {len(good) - 3} bytes, expected {len(good)}"]
    with pytest.raises(DataError, match=rf"{path}: damaged checkpoint: {shard}: found .* use the one before it"):
        load_checkpoint(path)
    shard.unlink()
    (path / "stray.safetensors").write_bytes(good)
    assert verify_checkpoint(path) == [
        f"{shard}: found nothing, expected a file of {len(good)} bytes",
        f"{path / 'stray.safetensors'}: found a file that manifest.json does not list, expected none",
    ]
    (path / "manifest.json").write_text('{"format": "ppomax-checkpoint-9", "files": {}}')
    assert "found format 'ppomax-checkpoint-9', expected 'ppomax-checkpoint-1'" in verify_checkpoint(path)[0]
    (path / "manifest.json").unlink()
    assert "manifest.json: found nothing, expected" in verify_checkpoint(path)[0]
    assert latest_checkpoint(tmp_path)[0] is None


@pytest.mark.parametrize("name", ["/dev/zero", "../iteration-1/state.json"])
def test_a_manifest_reaches_no_file_elsewhere(name: str, tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"size": 0, "sha256": ""}
    (path / "manifest.json").write_text(json.dumps(manifest))
    said = f"{path / 'manifest.json'}: found the file '{name}', expected names of files beside it"
    assert verify_checkpoint(path) == [said]


def test_a_listed_file_that_is_none_is_not_read(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "state.json").unlink()
    os.mkfifo(path / "state.json")  # opening it would wait for ever
    assert "state.json: found no regular file, expected one of" in verify_checkpoint(path)[0]


def test_a_copy_that_somebody_keeps_is_not_the_runs(tmp_path: Path) -> None:
    kept = tmp_path / "good-3"
    shutil.copytree(save(tmp_path, 3), kept)
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["good-3", "iteration-2"] and not verify_checkpoint(kept)
    assert [path.name for path in checkpoints(tmp_path)] == ["iteration-2"]


def test_loading_into_another_model_names_the_tensors(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, "step-1", {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}, {})
    into = {"a": torch.ones(3), "b": torch.ones(3).bfloat16(), "d": torch.ones(1)}
    with pytest.raises(DataError) as caught:
        load_checkpoint(path, into=into)
    for part in (
        str(path), "tensor a: found float32 [2], expected float32 [3]",
        "tensor b: found float32 [3], expected bfloat16 [3]", "tensor c: found float32 [1], expected no such tensor",
        "(and 1 more)", "load it with the model and settings that wrote it",
    ):  # fmt: skip
        assert part in str(caught.value)
    assert into["a"].equal(torch.ones(3))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"moments": {"mean": float("nan")}}, r"state\.moments\.mean: found nan, expected a finite number"),
        ({"a": [0.0, float("-inf")]}, r"state\.a\[1\]: found -inf, expected a finite number"),
        ({"a": {3: 1}}, r"state\.a: found the key 3, expected a string"),
        ({"a": (1, 2)}, r"state\.a: found tuple, expected a JSON value"),
        ({"a": torch.zeros(1)}, r"state\.a: found Tensor, expected a JSON value"),
    ],
)
def test_state_that_json_would_change_is_refused(tmp_path: Path, state: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        save_checkpoint(tmp_path, "step-1", {}, state)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "keep", "message"), [("best", 2, "'best', expected a word and a number"), ("step-1", 0, "found 0")]
)
def test_bad_arguments(tmp_path: Path, name: str, keep: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path, name, {}, {}, keep=keep)
