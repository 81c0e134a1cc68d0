"""The doctor: findings about this machine are true, and every concern is raised by its cause alone."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from ppomax import __version__
from ppomax.cli import main
from ppomax.config import DoctorConfig
from ppomax.models.load import resolve_compute
from ppomax.stages.doctor import GIB, OPTIONAL, concerns, doctor
from ppomax.types import SetupError

GOOD: dict[str, Any] = {
    "device": "cuda", "dtype": "bfloat16", "cores": 8, "host_cores": 8, "threads": 8, "omp_num_threads": None, "load": 0.5,
    "memory_total": 64 * GIB, "memory_available": 50 * GIB, "disk_free": {"/": 100 * GIB}, "smollm2_converted": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("PPOMAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_findings_are_those_of_this_machine(cache: Path) -> None:
    found = doctor(DoctorConfig())
    versions = {package["name"]: package["version"] for package in found["packages"]}
    assert versions["ppomax"] == __version__ and versions["torch"] == version("torch")
    assert {*OPTIONAL} <= {*versions}
    numbers = found["numbers"]
    assert numbers["dtype"] == str(resolve_compute("auto", "auto").dtype).removeprefix("torch.")
    assert 0 < numbers["memory_available"] <= numbers["memory_total"]
    assert 1 <= numbers["cores"] <= (os.cpu_count() or 1)
    assert numbers["disk_free"].keys() == {str(cache), str(Path.cwd())}
    assert found["machine"]["python"] == platform.python_version()
    assert found["machine"]["smollm2-135m"] == f"not converted yet ({cache})"
    assert not cache.exists()
    assert "gflops" not in found


def test_a_converted_model_is_seen(cache: Path) -> None:
    (cache / "smollm2-135m-v2").mkdir(parents=True)
    (cache / "smollm2-135m-v2" / "config.json").write_text("{}")
    found = doctor(DoctorConfig())
    assert found["machine"]["smollm2-135m"] == f"converted ({cache})"
    assert not any("smollm2" in concern for concern in found["concerns"])


def test_a_good_machine_raises_no_concern() -> None:
    assert concerns(GOOD) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"device": "cpu"}, ["no GPU"]),
        ({"device": "cpu", "dtype": "float32"}, ["no GPU", "no bfloat16 instructions"]),
        ({"device": "cpu", "threads": 1, "omp_num_threads": "1"}, ["no GPU", "OMP_NUM_THREADS is 1; unset it"]),
        ({"device": "cpu", "threads": 4}, ["no GPU", "torch uses 4 of 8 cores: set OMP_NUM_THREADS"]),
        (
            {"device": "cpu", "threads": 64, "omp_num_threads": "64"},
            ["no GPU", "64 threads on 8 cores, and they wait for each other: OMP_NUM_THREADS is 64; unset it"],
        ),
        ({"device": "cpu", "load": 11.0}, ["no GPU", "load 11.0 on 8 cores"]),
        ({"memory_available": 7.9 * GIB}, ["7.9 GiB of memory is free, less than 8.0 GiB"]),
        ({"disk_free": {"/": 100 * GIB, "/small": 2 * GIB}}, ["2.0 GiB of disk is free at /small"]),
        ({"smollm2_converted": False}, ["not converted yet"]),
    ],
)
def test_each_cause_raises_its_concern(change: dict[str, Any], expected: list[str]) -> None:
    found = concerns({**GOOD, **change})
    assert len(found) == len(expected)
    for concern, part in zip(found, expected, strict=True):
        assert part in concern


def test_the_products_of_a_model_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppomax.stages.doctor.SECONDS_PER_MEASUREMENT", 0.01)
    found = doctor(DoctorConfig(measure=True, model="tiny"))
    assert found["shapes"].keys() == {"float32", found["numbers"]["dtype"]}
    for rates in found["shapes"].values():
        assert rates.keys() == {"attention", "up", "down", "vocabulary"} and min(rates.values()) > 0
    assert found["gflops"].keys() == {"float32", "bfloat16"} and min(found["gflops"].values()) > 0
    assert found["copy_gbytes"] > 0


def test_a_model_that_is_not_there_is_named() -> None:
    with pytest.raises(SetupError, match="/no/such/model: no such directory"):
        doctor(DoctorConfig(measure=True, model="/no/such/model"))


def test_the_command_prints_everything(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppomax.stages.doctor.SECONDS_PER_MEASUREMENT", 0.05)
    monkeypatch.setitem(OPTIONAL, "no-such-package", ("things that nobody needs", "pip install no-such-package"))
    assert main(["doctor", "--measure"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for name in OPTIONAL:
        assert name in out
    assert "missing: needed for things that nobody needs; pip install no-such-package" in out
    assert "matrix products float32 " in out and "GFLOP/s, bfloat16 " in out
    assert (
        "smollm2-135m, float32 attention " in out and "vocabulary " in out and "(1,024 tokens; vocabulary: 64)" in out
    )
    assert "memory copies " in out and "GB/s" in out
    assert "first use takes some ten seconds more" in out
