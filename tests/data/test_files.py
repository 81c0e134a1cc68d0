from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ppomax.data.files import check_spec, iter_rows
from ppomax.types import DataError, SetupError

ROWS = [{"prompt": "a"}, {"prompt": "b", "n": 2}]


def rows_of(spec: object) -> list[dict]:
    return [row.fields for row in iter_rows(str(spec))]


def test_the_four_formats_hold_the_same_rows(tmp_path: Path, write: Callable[..., Path]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    lines = write(*ROWS)
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    listed = tmp_path / "rows.json"
    listed.write_text(json.dumps(ROWS))
    table = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS, pyarrow.schema([("prompt", "string"), ("n", "int64")])), table)
    assert rows_of(lines) == rows_of(packed) == rows_of(listed) == ROWS
    # A table has every column in every row.
    assert rows_of(table) == [{"prompt": "a", "n": None}, {"prompt": "b", "n": 2}]
    for path in (lines, packed, listed, table):
        assert [row.place for row in iter_rows(str(path))] == [f"{path}:1", f"{path}:2"]


@pytest.mark.parametrize("name", ["rows.txt", "rows.txt.gz"])
def test_every_line_of_a_text_file_is_a_row(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    text = "\ufeffA first text.\r\n\n  Zweiter Text: „ä“\n".encode()
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert [(row.fields, row.place) for row in iter_rows(str(path))] == [
        ({"text": "A first text."}, f"{path}:1"), ({"text": "Zweiter Text: „ä“"}, f"{path}:3"),
    ]  # fmt: skip


def test_blank_lines_count_as_lines_and_a_byte_order_mark_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\n{"prompt": "b\xe2\x80\xa8c"}')
    rows = list(iter_rows(str(path)))
    assert [(row.fields["prompt"], row.place) for row in rows] == [("a", f"{path}:1"), ("b\u2028c", f"{path}:3")]


def test_source_label(write: Callable[..., Path]) -> None:
    path = write(*ROWS)
    assert [row.source for row in iter_rows(f"{path}#source=harmless")] == ["harmless", "harmless"]
    assert [row.source for row in iter_rows(str(path))] == [None, None]
    with pytest.raises(DataError, match="found the tag 'source=', expected PATH#source=NAME"):
        check_spec(f"{path}#source=")


def test_a_weight_and_a_source_may_follow_a_path(write: Callable[..., Path]) -> None:
    path = write({"prompt": "a"})
    for tags, expected in {
        "": (None, 1.0), "#weight=2": (None, 2.0), "#source=x&weight=0.5": ("x", 0.5), "#weight=1e1&source=a b": ("a b", 10.0),
    }.items():  # fmt: skip
        (row,) = iter_rows(f"{path}{tags}")
        assert (row.source, row.weight) == expected
    for wrong in ("0", "-1", "nan", "inf", "many"):
        with pytest.raises(DataError, match=rf"found the weight '{wrong}', expected a number above 0"):
            check_spec(f"{path}#weight={wrong}")
    with pytest.raises(DataError, match="found the tag 'wieght=2', expected"):
        check_spec(f"{path}#wieght=2")
    # A file that is called so is that file.
    odd = path.with_name("odd#weight=2.jsonl")
    odd.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    assert [row.weight for row in iter_rows(str(odd))] == [1.0]


@pytest.mark.parametrize(
    "spec",
    ["data/pairs.jsonl", "./pairs", "/a/pairs", "../a/b", "a/b/c", "pairs.parquet", "pairs", "a\\b", "a/b:c:d"],
)
def test_a_missing_path_is_no_such_file(spec: str) -> None:
    with pytest.raises(DataError) as error:
        list(iter_rows(spec))
    assert str(error.value).startswith(f"{spec}: no such file. Expected a local file (.jsonl")
    assert "http" not in str(error.value)


@pytest.mark.parametrize("spec", ["owner/name", "owner/name:test", "owner/Hermes-2.5", "owner/name:train[:10%]"])
def test_hub_names_pass_the_check(spec: str) -> None:
    check_spec(spec)


def test_hub_rows_come_from_the_named_split(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str, config: str | None, data_dir: str | None, split: str) -> object:
        asked.append((name, config, data_dir, split))
        return datasets.Dataset.from_list(ROWS[:1])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [(row.fields, row.place) for row in iter_rows("owner/name:test")] == [(ROWS[0], "owner/name:test:1")]
    assert rows_of("owner/name") == ROWS[:1]
    assert rows_of("owner/name:test#folder=harmless-base&weight=2") == rows_of("owner/name#config=en") == ROWS[:1]
    assert asked == [
        ("owner/name", None, None, "test"), ("owner/name", None, None, "train"),
        ("owner/name", None, "harmless-base", "test"), ("owner/name", "en", None, "train"),
    ]  # fmt: skip


def test_a_hub_failure_names_the_spec_and_says_that_there_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(name: str, *choice: str | None, **options: str | None) -> object:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"owner/name: no such file, and as a hub dataset \(split train\).*offline"):
        rows_of("owner/name")


def test_without_datasets_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SetupError, match=r"owner/name: no such file.*needs `datasets`: pip install datasets"):
        rows_of("owner/name")


def test_malformed_json_names_line_column_and_the_start_of_the_line(write: Callable[..., Path]) -> None:
    path = write({"prompt": "a"}, "", '{"prompt": "b" "x": ' + "1" * 100)
    with pytest.raises(DataError) as error:
        rows_of(path)
    message = str(error.value)
    assert message.startswith(f"{path}:3: malformed JSON, column 16: Expecting ',' delimiter")
    assert message.endswith('It starts with: {"prompt": "b" "x": ' + "1" * 40 + "...")


def test_malformed_json_list_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"prompt": "a"},\n {"prompt": }]')
    with pytest.raises(DataError, match=r"rows\.json: malformed JSON, line 2, column 13"):
        rows_of(path)


def test_json_that_is_no_list_gets_advice(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"data": []}')
    with pytest.raises(DataError, match=r"rows\.json: found an object, expected a list.*\.jsonl file"):
        rows_of(path)


def test_json_files_may_hold_an_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n')
    assert [(row.fields["prompt"], row.place) for row in iter_rows(str(path))] == [
        ("a", f"{path}:1"),
        ("b", f"{path}:3"),
    ]
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt"}\n')
    with pytest.raises(DataError, match=r"rows\.json:3: malformed JSON"):
        rows_of(path)


def test_invalid_utf8_names_line_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"prompt": "a"}\n{"prompt": "é"}\n'.encode("latin-1"))
    with pytest.raises(
        DataError, match=r"rows\.jsonl:2: invalid UTF-8, byte 0xe9 at offset 12; save the file as UTF-8"
    ):
        rows_of(path)


@pytest.mark.parametrize(
    ("line", "found"),
    [("[1]", "a list"), ('"a"', "a string"), ("3", "a number"), ("null", "null"), ("true", "a boolean")],
)
def test_a_row_that_is_no_object(write: Callable[..., Path], line: str, found: str) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: found {found}, expected a JSON object"):
        rows_of(write({"prompt": "a"}, line))


@pytest.mark.parametrize("keep", [-6, 14])
def test_a_damaged_gzip_file(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(ROWS[0]).encode() * 50)[:keep])
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz: damaged gzip file"):
        rows_of(path)


def test_a_gz_name_without_gzip_content(write: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="damaged gzip file"):
        rows_of(write(ROWS[0], name="rows.jsonl.gz"))


def test_a_damaged_parquet_file(write: Callable[..., Path]) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match=r"rows\.parquet: not a readable Parquet file"):
        rows_of(write(ROWS[0], name="rows.parquet"))


def test_a_spec_without_a_name() -> None:
    for spec in ("", "#source=web"):
        with pytest.raises(DataError, match=f"{spec!r}: no file named"):
            check_spec(spec)


def test_other_formats_and_directories_are_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.csv: unknown file format, expected \.jsonl"):
        rows_of(write("a,b", name="rows.csv"))
    with pytest.raises(DataError, match=r"is a directory, expected a file \(\.jsonl"):
        rows_of(tmp_path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.txt"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    memory = Path("/proc/self/mem")  # its first byte is an input/output error, for root too
    if not memory.exists():
        pytest.skip("needs Linux's /proc")
    path = tmp_path / name
    path.symlink_to(memory)
    with pytest.raises(DataError, match=rf"{name}: it cannot be read \(Input/output error\); check its name, its perm"):
        rows_of(path)


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.jsonl: it cannot be read \(File name too long\)"):
        check_spec(str(tmp_path / ("x" * 300 + ".jsonl")))
