"""Files and folders that are whole or absent, whatever kills the process: written aside, synced, then renamed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ppomax.errors import DataError, SaveError

TEMPORARY, REPLACED = ".tmp-", ".old-"


def publish(temporary: Path, target: Path) -> None:
    """Sync a finished temporary folder to disk and give it its name; a folder of that name is replaced."""
    sync_tree(temporary)
    replaced = target.parent / f"{REPLACED}{target.name}"
    if target.exists():
        os.rename(target, replaced)
    os.rename(temporary, target)
    sync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def settle(folder: Path) -> None:
    """Clear what a killed writer left in `folder`; only for the process that owns it.

    A folder that was being replaced gets its name back if its successor had not taken it yet.
    """
    for entry in list(folder.iterdir()) if folder.is_dir() else []:
        if entry.name.startswith(REPLACED) and not (folder / entry.name[len(REPLACED) :]).exists():
            os.rename(entry, folder / entry.name[len(REPLACED) :])
        elif entry.name.startswith((TEMPORARY, REPLACED)):
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, and itself."""
    for parent, _, names in os.walk(folder):
        for name in names:
            sync_folder(Path(parent) / name)
        sync_folder(Path(parent))


def sync_folder(path: Path) -> None:
    """fsync one folder (or file): a new name in it survives a power cut only after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) in one step: a reader sees the old file or the new one, never a part."""
    temporary = path.parent / f"{TEMPORARY}{path.name}"
    with disk_errors(path, needed=len(text.encode()), temporary=temporary):
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)


def write_json_atomic(path: Path, obj: Any) -> None:
    """`write_text_atomic` of indented JSON; NaN and infinities are refused with a DataError."""
    write_text_atomic(path, json_text(obj, str(path), indent=2) + "\n")


def json_text(obj: Any, where: str, indent: int | None = None) -> str:
    """Strict JSON: NaN, infinities and objects are a DataError that begins with `where`."""
    try:
        return json.dumps(obj, allow_nan=False, ensure_ascii=False, indent=indent)
    except (ValueError, TypeError) as error:
        raise DataError(f"{where}: found a value that JSON cannot hold ({error}); write None for no value") from None


@contextmanager
def disk_errors(path: Path, *, needed: int | None = None, temporary: Path | None = None) -> Iterator[None]:
    """Turn a failure of the disk into a SaveError that says what to do; `temporary` is removed on any failure."""
    try:
        yield
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        code = _errno(error)
        if code is None or isinstance(error, SaveError):
            raise
        full = code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free some space" if full else "make it a directory that can be written"
        space = f"{size_text(needed)} needed, " if needed is not None else ""
        failure = SaveError(
            f"{path}: cannot save ({os.strerror(code)}; {space}{size_text(free_bytes(path))} free). What was saved "
            f"before is untouched; {advice} or choose another output directory, then go on with --resume "
            "(verbs without it: the same command, without --fresh)"
        )
        failure.errno = code
        raise failure from error


def _errno(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # safetensors writes in Rust and reports a full disk only in its text.
    found = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    return int(found.group(1)) if found else None


def free_bytes(path: Path) -> int:
    """Free bytes on the file system that holds `path`, which need not exist yet."""
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def size_text(size: float) -> str:
    """A size for people: 1536 → '1.5 kB' (powers of 1000)."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "bytes" else f"{size:.0f} bytes"
        size /= 1000
    return f"{size:.4g} TB"
