"""Opening data: a spec string in, rows with their place in the file out.

A spec is a local file (`.jsonl`, `.jsonl.gz`, `.json` holding a list or an object a line, `.parquet`, `.txt`) or a hub
dataset `owner/name[:split]`, optionally followed by tags: `#source=NAME` labels every row that comes from it,
`#weight=W` says how often an epoch reads each (`#source=NAME&weight=W` does both); `#folder=NAME` and `#config=NAME`
choose within a hub dataset.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppomax.errors import first_line
from ppomax.types import DataError, SetupError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.+-]+(\[[\d:%-]*\])?)?")
# A dot before a digit is a version, as in `owner/name-2.5`, not the extension of a file.
_EXTENSION = re.compile(r"\.[A-Za-z]\w{0,7}$")
_TAGS = re.compile(r"#(\w+=[^#]*)$")
_TAG_NAMES = ("source", "weight", "folder", "config")
_FORMATS = ".jsonl, .jsonl.gz, .json (a list, or an object a line), .parquet or .txt (a text a line)"


@dataclass(frozen=True)
class Row:
    """One JSON object with its place (`file:line`), and the source label (if there is one) and weight of its spec."""

    fields: dict[str, Any]
    place: str
    source: str | None
    weight: float = 1.0


def check_spec(spec: str) -> None:
    """Raise DataError unless `spec` names an existing local file of a known format or looks like a hub dataset."""
    name, tags = _split_spec(spec)
    _weight(tags, spec)
    path = Path(name)
    if not name:
        raise DataError(f"{spec!r}: no file named, expected a local file ({_FORMATS}) or owner/name[:split]")
    if _exists(path):
        if path.is_dir():
            raise DataError(f"{name}: is a directory, expected a file ({_FORMATS})")
        if _reader(path) is None:
            raise DataError(f"{name}: unknown file format, expected {_FORMATS}")
        if only_hub := [tag for tag in ("folder", "config") if tag in tags]:
            raise DataError(f"{spec}: found #{only_hub[0]} with a local file, expected it with a hub dataset only")
        return
    if _looks_local(name):
        raise DataError(
            f"{name}: no such file. Expected a local file ({_FORMATS}) or a hub dataset written as owner/name[:split]"
        )


def iter_rows(spec: str) -> Iterator[Row]:
    """Stream the rows of one spec, each with its `file:line` (items of lists and tables count from 1)."""
    check_spec(spec)
    name, tags = _split_spec(spec)
    source, weight = tags.get("source"), _weight(tags, spec)
    path = Path(name)
    if not _exists(path):
        rows = _hub_rows(name, folder=tags.get("folder"), config=tags.get("config"))
    else:
        reader = _reader(path)
        assert reader is not None  # the spec was checked
        rows = reader(path)
    try:
        for number, value in rows:
            place = f"{name}:{number}"
            if not isinstance(value, dict):
                raise DataError(f'{place}: found {_json_type(value)}, expected a JSON object such as {{"prompt": ...}}')
            yield Row(value, place, source, weight)
    except OSError as error:
        raise _unreadable(name, error) from error


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # a folder that may not be looked into, a name that is too long
        raise _unreadable(str(path), error) from error


def _unreadable(name: str, error: OSError) -> DataError:
    found = error.strerror or first_line(error)
    return DataError(f"{name}: it cannot be read ({found}); check its name, its permissions and the disk")


def _split_spec(spec: str) -> tuple[str, dict[str, str]]:
    """Name and tags of a spec."""
    found = _TAGS.search(spec)
    if found is None or _exists(Path(spec)):
        return spec, {}
    tags: dict[str, str] = {}
    for tag in found[1].split("&"):
        key, _, value = tag.partition("=")
        if key not in _TAG_NAMES or not value:
            raise DataError(
                f"{spec}: found the tag {tag!r}, expected PATH#source=NAME, PATH#weight=W, or both with &; of a hub "
                "dataset also #folder=NAME or #config=NAME"
            )
        tags[key] = value
    return spec[: found.start()], tags


def _weight(tags: Mapping[str, str], spec: str) -> float:
    text = tags.get("weight", "1")
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise DataError(f"{spec}: found the weight {text!r}, expected a number above 0 (2: twice an epoch, 0.5: half)")
    return weight


def _looks_local(name: str) -> bool:
    return name[:1] in (".", "/", "~") or bool(_EXTENSION.search(name)) or not _HUB_NAME.fullmatch(name)


def _reader(path: Path) -> Callable[[Path], Iterator[tuple[int, Any]]] | None:
    readers = {
        ".jsonl": _jsonl_rows, ".jsonl.gz": _jsonl_rows, ".txt": _text_rows, ".txt.gz": _text_rows,
        ".json": _json_rows, ".parquet": _parquet_rows,
    }  # fmt: skip
    return next((reader for ending, reader in readers.items() if path.name.lower().endswith(ending)), None)


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(path):
        yield number, _parse(line, f"{path}:{number}", path.name)


def _text_rows(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(path):
        yield number, {"text": line.strip()}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that hold something, with their numbers."""
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        # Bytes, so that only "\n" ends a line and invalid UTF-8 is found with its line number.
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, _decode(line, f"{path}:{number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); copy or download it again") from error


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """A list of objects; or, since many files are named so, an object a line."""
    if _holds_lines(path):
        yield from _jsonl_rows(path)
        return
    value = _parse(_decode(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), str(path)), str(path), path.name)
    if not isinstance(value, list):
        raise DataError(
            f"{path}: found {_json_type(value)}, expected a list of objects. "
            "Put the rows in one list, or write one object a line into a .jsonl file"
        )
    yield from enumerate(value, start=1)


def _holds_lines(path: Path) -> bool:
    """Whether the first two lines are an object each."""
    try:
        first = [json.loads(line) for _, line in itertools.islice(_lines(path), 2)]
    except ValueError:
        return False
    return len(first) == 2 and all(isinstance(value, dict) for value in first)


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    pyarrow = _optional("pyarrow", f"{path}: reading Parquet")
    parquet = _optional("pyarrow.parquet", f"{path}: reading Parquet")
    try:
        number = 0
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches():
                for value in batch.to_pylist():
                    number += 1
                    yield number, value
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error


def _hub_rows(name: str, *, folder: str | None, config: str | None) -> Iterator[tuple[int, Any]]:
    datasets = _optional("datasets", f"{name}: no such file, and reading it as a hub dataset")
    owner_and_name, _, split = name.partition(":")
    try:
        rows = datasets.load_dataset(owner_and_name, config, data_dir=folder, split=split or "train")
    except Exception as error:
        # The hub client raises many unrelated types; all of them mean that the name could not be read.
        raise DataError(
            f"{name}: no such file, and as a hub dataset (split {split or 'train'}) it could not be read: "
            f"{type(error).__name__}: {error}"
        ) from error
    yield from enumerate(rows, start=1)


def _optional(module: str, purpose: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise SetupError(f"{purpose} needs `{package}`: pip install {package}") from error


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: invalid UTF-8, byte 0x{data[error.start]:02x} at offset {error.start}; save the file as UTF-8"
        ) from error


def _parse(text: str, place: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        # In .jsonl the place is already the line; in .json the parser knows the line.
        line = f"line {error.lineno}, " if name.lower().endswith(".json") else ""
        start = text[:60].rstrip()
        raise DataError(
            f"{place}: malformed JSON, {line}column {error.colno}: {error.msg}. "
            f"It starts with: {start}{'...' if len(text.rstrip()) > 60 else ''}"
        ) from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists a thousand deep
        raise DataError(f"{place}: JSON that cannot be read ({first_line(error)})") from error


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
