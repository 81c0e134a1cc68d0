"""Checkpoints: tensors by torch Distributed Checkpoint in safetensors files, all else in JSON, hashes of everything.

folder/iteration-12/  shard-*.safetensors   tensors; each rank writes its own shards of DTensors
                      state.json            what is not a tensor
                      manifest.json         size and SHA-256 of every other file
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from ppomax.engine import world
from ppomax.engine.durable import (
    TEMPORARY,
    SaveError,
    disk_errors,
    free_bytes,
    json_text,
    publish,
    settle,
    size_text,
    sync_folder,
    write_json_atomic,
    write_text_atomic,
)
from ppomax.engine.world import first
from ppomax.types import DataError, SetupError

JSON: TypeAlias = "dict[str, JSON] | list[JSON] | str | int | float | bool | None"

# safetensors builds a whole file in memory before it writes it, so a file stays small: it also costs less time.
FILE_BYTES = 32 * 1024**2
_NAME = re.compile(r"[A-Za-z][A-Za-z_]*-\d+")
# Those of a run. A copy under another name, which somebody keeps beside them, is left alone.
_OF_RUNS = re.compile(r"(iteration|step)-\d+")
_FORMAT = "ppomax-checkpoint-1"


def save_checkpoint(
    folder: Path, name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, keep: int = 2,
    spare: Collection[str] = (), superseded: Collection[str] = (),
) -> Path:  # fmt: skip
    """Write the checkpoint `folder/name` and, once it is complete and checked, delete old ones.

    name: "iteration-12" or "step-300". tensors: any dtype and shape, DTensors too; with a process group every rank
    calls this with the same names. state: JSON values only; rank 0's is kept. keep: how many stay, this one included;
    spare: names of others that stay as well. Checkpoints with a higher number go as well, and those named in
    `superseded`: the run went back before them.
    Raises SaveError when the disk fails (old checkpoints are then untouched), DataError for state that is not JSON.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"name: found {name!r}, expected a word and a number like 'iteration-12'")
    if keep < 1:
        raise ValueError(f"keep: found {keep}, expected at least 1")
    _check_json(dict(state), "state")
    folder = Path(folder)
    temporary, target = folder / f"{TEMPORARY}{name}", folder / name
    with disk_errors(target, needed=_bytes(tensors), temporary=temporary):
        first(lambda: _begin(temporary))
        _write_tensors(temporary, tensors)
        first(lambda: _finish(temporary, target, tensors, state, superseded))
    first(lambda: _delete_old(folder, keep, spare))
    return target


def load_checkpoint(
    path: Path,
    *,
    into: Mapping[str, Tensor] | None = None,
    like: Mapping[str, Tensor] | None = None,
    verified: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and state of a checkpoint, after its sizes and hashes were verified.

    into: tensors (or DTensors of any sharding) that are filled in place; names, shapes and dtypes must be those of
    the checkpoint, exactly. None: new tensors, those of `like` where it has the name (DTensors: each process then reads
    its own shards), else whole ones on the CPU. verified: `latest_checkpoint` has just found it intact.
    Raises DataError naming what is damaged or different.
    """
    path = Path(path)
    if not verified:
        first(lambda: _expect_valid(path))
    saved = _saved(path)
    if into is None:
        given = like or {}
        into = {
            name: given[name] if name in given else torch.empty(shape, dtype=dtype)
            for name, (shape, dtype) in saved.items()
        }
    problems = _differences({name: (tuple(t.shape), t.dtype) for name, t in into.items()}, saved)
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise DataError(f"{path}: {'; '.join(problems[:3])}{more}; load it with the model and settings that wrote it")
    tensors = dict(into)
    if tensors:
        _quietly(lambda: dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path))))
    return tensors, json.loads((path / "state.json").read_text(encoding="utf-8"))


def verify_checkpoint(path: Path) -> list[str]:
    """What is wrong with a checkpoint, one message per file (path, found, expected); empty when it is intact."""
    path = Path(path)
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            return [f"{path / 'manifest.json'}: found format {manifest['format']!r}, expected {_FORMAT!r}"]
        listed = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        return [f"{path / 'manifest.json'}: found nothing, expected the list of the checkpoint's files"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{path / 'manifest.json'}: found {error!r} on reading, expected the list of the checkpoint's files"]
    elsewhere = [name for name in listed if Path(name).name != name]
    if elsewhere:
        return [f"{path / 'manifest.json'}: found the file {elsewhere[0]!r}, expected names of files beside it"]
    problems = [found for name, entry in listed.items() if (found := _file_problem(path / name, *entry))]
    if "state.json" not in listed:
        problems.append(f"{path / 'manifest.json'}: found no entry for state.json, expected one")
    # The reader takes every safetensors file of the folder, listed or not.
    strays = sorted(file.name for file in path.glob("*.safetensors") if file.name not in listed)
    return problems + [
        f"{path / name}: found a file that manifest.json does not list, expected none" for name in strays
    ]


def latest_checkpoint(folder: Path, *, at_most: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint of a folder, and what is wrong with the newer ones that were passed over.

    at_most: leave those with a higher number out.
    """
    problems: list[str] = []
    for path in reversed(checkpoints(Path(folder))):
        if at_most is not None and checkpoint_number(path) > at_most:
            continue
        found = verify_checkpoint(path)
        if not found:
            return path, problems
        if not os.path.lexists(path):  # deleted meanwhile by the run that goes on there, when it had a newer one
            return latest_checkpoint(folder, at_most=at_most)
        problems += found
    return None, problems


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run in a folder, by number, intact or not; temporary names do not match."""
    found: list[Path] = []
    with suppress(FileNotFoundError):
        found = [path for path in folder.iterdir() if _OF_RUNS.fullmatch(path.name)]
    return sorted(found, key=checkpoint_number)


def checkpoint_number(path: Path) -> int:
    """iteration-12 → 12."""
    return int(path.name.rsplit("-", 1)[1])


def dry_run(folder: Path, bytes_needed: int, *, copies: int = 2, freed: int = 0) -> None:
    """Save and delete a small checkpoint in `folder`, and compare the free space with `copies` of `bytes_needed`.

    One more than are kept, because a new checkpoint is complete before an old one goes. freed: bytes of what will be
    deleted before the first save. Raises SetupError.
    """
    folder, room = Path(folder), size_text(copies * bytes_needed)
    probe: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = first(lambda: Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}probe-", dir=folder)))
        save_checkpoint(probe, "probe-0", {"probe": torch.arange(1024)}, {})
    except OSError as error:
        reason = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error.strerror
        raise SetupError(
            f"{folder}: cannot save here ({reason or error}), expected a directory that can be written with "
            f"{room} free; found {size_text(free_bytes(folder))} free. Free some space or "
            "choose another output directory"
        ) from error
    finally:
        if probe is not None:
            shutil.rmtree(probe, ignore_errors=True)
    free = first(lambda: free_bytes(folder)) + freed  # one answer, while other jobs write to the same disk
    if free < copies * bytes_needed:
        raise SetupError(
            f"{folder}: found {size_text(free)} free, expected {room} ({copies} checkpoints of "
            f"{size_text(bytes_needed)} more: a new one is complete before an old one goes). Free some space, keep "
            "fewer (save.keep), or choose another output directory"
        )


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _begin(temporary: Path) -> None:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    settle(temporary.parent)
    temporary.mkdir()


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    if not tensors:
        return
    number, filled, file_of = 1, 0, {}
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if filled and filled + size > FILE_BYTES:
            number, filled = number + 1, 0
        file_of[name], filled = number, filled + size
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=file_of, save_distributed=True)
    # One process syncs its files in `_finish`, while it reads them; several may stand on several machines.
    writer.sync_files = world.size() > 1
    # Copied from a GPU one by one, and waited for. Copies ahead wait for the current device's stream: the wrong one for
    # a run on another device or in another thread, and in a run on the processor the GPU's start.
    writer.per_thread_copy_ahead = 0
    _quietly(lambda: dcp.save(_writable(tensors), storage_writer=writer, process_group=world.group()))


def _writable(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The tensors as safetensors takes them: contiguous, and none a view of another (tied weights are copied)."""
    seen: set[int] = set()
    ready: dict[str, Any] = {}
    for name, tensor in tensors.items():
        value = tensor.detach()
        if not isinstance(value, DTensor):
            storage = value.untyped_storage().data_ptr()
            value = value.clone() if storage in seen else value
            seen.add(storage)
        ready[name] = value.contiguous()
    return ready


def _finish(
    temporary: Path, target: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], superseded: Collection[str]
) -> None:  # fmt: skip
    """State and manifest from the files as they are read back, a check that every tensor is there, the rename."""
    write_text_atomic(temporary / "state.json", json_text(dict(state), "state") + "\n")
    wanted = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    problems = _differences(wanted, _saved(temporary))
    if problems:
        raise SaveError(f"{target}: the files read back differ from what was written: {'; '.join(problems[:3])}")
    written = sorted(temporary.iterdir())
    with ThreadPoolExecutor(2) as pool:
        synced = pool.map(sync_folder, written)
        files = {file.name: {"size": file.stat().st_size, "sha256": file_hash(file)} for file in written}
        list(synced)
    write_json_atomic(temporary / "manifest.json", {"format": _FORMAT, "files": files})
    # Before the rename: a kill in between must not leave a superseded checkpoint as the newest.
    for path in checkpoints(target.parent):
        if checkpoint_number(path) > checkpoint_number(target) or path.name in superseded:
            _delete(path)
    publish(temporary, target)


def _delete_old(folder: Path, keep: int, spare: Collection[str]) -> None:
    for path in checkpoints(folder)[:-keep]:
        if path.name not in spare:
            _delete(path)


def _delete(path: Path) -> None:
    """By another name first: who reads the folder meanwhile finds a whole checkpoint or none."""
    gone = path.with_name(f"{TEMPORARY}gone-{path.name}")
    with suppress(OSError):
        if path.is_dir():
            os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _saved(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name → (shape, dtype) of every tensor in a checkpoint, from the file headers."""
    metadata = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    return {name: (tuple(entry.size), entry.properties.dtype) for name, entry in metadata.items()}  # type: ignore[union-attr]


def _differences(wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    def show(entries: Mapping[str, Any], name: str) -> str:
        return f"{str(entries[name][1])[6:]} {list(entries[name][0])}" if name in entries else "no such tensor"

    names = [name for name in sorted(wanted.keys() | saved.keys()) if wanted.get(name) != saved.get(name)]
    return [f"tensor {name}: found {show(saved, name)}, expected {show(wanted, name)}" for name in names]


def _file_problem(path: Path, size: int, sha256: str) -> str | None:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return f"{path}: found no regular file, expected one of {size} bytes"
        found_size = found.st_size
        if found_size != size:
            return f"{path}: found {found_size} bytes, expected {size}"
        digest = file_hash(path)
    except FileNotFoundError:
        return f"{path}: found nothing, expected a file of {size} bytes"
    except OSError as error:
        return f"{path}: found {error.strerror} on reading, expected {size} bytes"
    return None if digest == sha256 else f"{path}: found SHA-256 {digest[:12]}…, expected {sha256[:12]}…"


def _expect_valid(path: Path) -> None:
    problems = verify_checkpoint(path)
    if problems:
        raise DataError(f"{path}: damaged checkpoint: {'; '.join(problems)}; use the one before it")


def _check_json(value: Any, where: str) -> None:
    """Refuse what JSON would change or lose in silence: NaN, tuples, keys that are not strings, objects."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise DataError(f"{where}: found the key {key!r}, expected a string")
            _check_json(item, f"{where}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_json(item, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{where}: found {value}, expected a finite number; stop or roll back before saving")
    elif value is not None and not isinstance(value, str | int | float):
        raise DataError(f"{where}: found {type(value).__name__}, expected a JSON value (lists, not tuples)")


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _quietly(work: Callable[[], Any]) -> None:
    """Run a DCP call without its single-process warning, and raise the failure itself, not DCP's wrapper."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            work()
    except CheckpointException as wrapper:
        failure, _ = next(iter(wrapper.failures.values()))
        raise failure from None
