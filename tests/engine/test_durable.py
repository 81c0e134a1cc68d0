"""Files and folders that are whole or absent, and disk failures that say what to do."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ppomax.engine.durable import (
    SaveError,
    disk_errors,
    free_bytes,
    publish,
    settle,
    size_text,
    write_json_atomic,
    write_text_atomic,
)
from ppomax.types import DataError

# Run in a process of its own: files may have 64 KiB at most, as on a disk that is full after them.
LIMITED = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from ppomax.engine.durable import SaveError, write_text_atomic
from ppomax.engine.rundir import save_final
folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
works = [
    lambda: write_text_atomic(folder / "config.yaml", "x" * 100_000),
    lambda: save_final(folder / "final", lambda p: save_file({"w": torch.zeros(50_000)}, p / "model.safetensors")),
]
for work in works:
    try:
        work()
        print("no error")
    except SaveError as error:
        print(error.errno, error)
"""


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("old")
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "model").write_text("old")
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stdout + done.stderr
    for line, name in zip(lines, ["config.yaml", "final"], strict=True):
        assert line.startswith(f"{errno.EFBIG} {tmp_path / name}: cannot save (File too large;")
        assert "free" in line and "untouched" in line and "--resume" in line
    assert "100 kB needed" in lines[0]
    assert (tmp_path / "config.yaml").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "final"]
    assert (tmp_path / "final" / "model").read_text() == "old"


def test_a_write_under_a_file_names_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match=r"file/a\.txt: cannot save \(Not a directory; 2 bytes needed") as caught:
        write_text_atomic(tmp_path / "file" / "a.txt", "ab")
    assert caught.value.errno == errno.ENOTDIR and isinstance(caught.value, OSError)


def test_text_and_json_replace_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json_atomic(path, {"win_rate": 0.5, "text": "ü"})
    assert path.read_text(encoding="utf-8") == '{\n  "win_rate": 0.5,\n  "text": "ü"\n}\n'
    with pytest.raises(DataError, match=r"summary\.json: found a value that JSON cannot hold.*None"):
        write_json_atomic(path, {"win_rate": float("nan")})
    assert "0.5" in path.read_text() and [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_errors_that_are_not_the_disks_pass_through(tmp_path: Path) -> None:
    temporary = tmp_path / ".tmp-x"
    temporary.mkdir()
    with pytest.raises(KeyboardInterrupt), disk_errors(tmp_path / "x", temporary=temporary):
        raise KeyboardInterrupt
    assert not temporary.exists()


def test_a_full_disk_that_safetensors_reports_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="cannot save") as caught, disk_errors(tmp_path):
        save_file({"w": torch.zeros(2)}, tmp_path / "no" / "such" / "folder.safetensors")
    assert caught.value.errno == errno.ENOENT


def _folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file").write_text(text)
    return path


def test_publish_replaces_a_folder(tmp_path: Path) -> None:
    _folder(tmp_path / "final", "old")
    publish(_folder(tmp_path / ".tmp-final", "new"), tmp_path / "final")
    assert (tmp_path / "final" / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


@pytest.mark.parametrize(
    ("left", "text"),
    [
        ({"final": "old", ".tmp-final": "half"}, "old"),  # killed while writing
        ({".old-final": "old", ".tmp-final": "new"}, "old"),  # killed between the two renames
        ({".old-final": "old", "final": "new"}, "new"),  # killed before the old one was deleted
    ],
)
def test_settle_after_a_kill_at_each_point_of_publish(tmp_path: Path, left: dict[str, str], text: str) -> None:
    for name, content in left.items():
        _folder(tmp_path / name, content)
    (tmp_path / ".tmp-config.yaml").write_text("half")
    settle(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final" / "file").read_text() == text


def test_sizes() -> None:
    assert [size_text(n) for n in (0, 999, 1536, 2_500_000, 3_240_000_000, 5e12)] == [
        "0 bytes", "999 bytes", "1.54 kB", "2.5 MB", "3.24 GB", "5 TB",
    ]  # fmt: skip


def test_free_bytes_of_a_folder_to_be_made(tmp_path: Path) -> None:
    stat = os.statvfs(tmp_path)
    assert abs(free_bytes(tmp_path / "not" / "yet") - stat.f_bavail * stat.f_frsize) < 1e9
