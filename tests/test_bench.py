"""The benchmark script runs whole, ours alone: TRL is not installed in tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.plan import Contender, Workload, contenders, workloads
from bench.tables import fastest, ppo_section, scaling_picture, scaling_section, unequal

ROOT = Path(__file__).resolve().parents[1]
OURS, THEIRS = Contender("ppomax", "float32"), Contender("TRL", "float32")
FIXED = Workload("fixed", rows=8, new_tokens=16)


def run(seconds: float, generated: int = 128, **other: object) -> dict[str, object]:
    """A measurement of two iterations, the first of which is nothing like the second."""
    measured = {
        "seconds": [99.0, seconds], "generation": [50.0, 1.0], "generated": [1, generated], "trained": [1, generated],
        "minibatches": 4, "changed": [5, 5], "prompt_tokens": 100, "peak_gib": 2.0, "threads": 1,
    }  # fmt: skip
    return {**measured, **other}


def test_each_precision_of_theirs_has_ours_beside_it_once() -> None:
    names = [str(c) for c in contenders(("float32", "autocast", "bfloat16"), trl=True, layouts=True)]
    assert names == [
        "ppomax float32", "TRL float32", "ppomax bfloat16", "TRL autocast", "TRL bfloat16",
        "ppomax float32 lora", "ppomax float32 trunk", "ppomax bfloat16 lora", "ppomax bfloat16 trunk",
    ]  # fmt: skip
    assert [str(c) for c in contenders(("float32",), trl=False, layouts=False)] == ["ppomax float32"]


def test_the_first_iteration_and_the_slower_repetition_do_not_count() -> None:
    text, wrong = ppo_section(FIXED, {OURS: [run(5.0), run(4.0)], THEIRS: [run(6.0, peak_gib=3.0), run(7.0)]})
    assert wrong == []
    # 4 s and 6 s an iteration; 4 s / 0.128 thousand tokens = 31.25; 3 GiB / 2 GiB.
    assert "| ppomax float32 | 4.0 | – | 1.0 | 31.25 | – | 2.00 | – | 1.25 |" in text
    assert "| TRL float32 | 6.0 | 1.50× | 1.0 | 46.88 | 1.50× | 3.00 | 1.50× | 1.17 |" in text


def test_the_fastest_repetition_is_so_by_the_token() -> None:
    short, long = run(3.0, generated=50), run(4.0, generated=100)
    assert fastest([short, long]) is long


@pytest.mark.parametrize(
    ("theirs", "found"),
    [
        (run(1.0, generated=127), "generated: TRL float32 127, ppomax float32 128"),
        (run(1.0, changed=[5, 4]), "numbers changed by the optimisers: TRL float32 4, ppomax float32 5"),
        (run(1.0, minibatches=1), "minibatches: TRL float32 1, ppomax float32 4"),
        (run(1.0, prompt_tokens=99), "prompt tokens: TRL float32 99, ppomax float32 100"),
        (run(1.0, trained=[1, 120]), "TRL float32: generated [1, 128] tokens, trained on [1, 120]"),
        (run(1.0, threads=2), "threads: TRL float32 2, ppomax float32 1"),
    ],
)  # fmt: skip
def test_unequal_work_is_found(theirs: dict[str, object], found: str) -> None:
    text, wrong = ppo_section(FIXED, {OURS: [run(1.0)], THEIRS: [theirs]})
    assert found in wrong
    assert f"**Not equal:** {'; '.join(wrong)}" in text


def test_where_eos_stops_the_sides_may_sample_other_lengths_but_train_on_all_of_them() -> None:
    realistic = Workload("realistic", rows=8, new_tokens=32, stops=True)
    assert unequal(realistic, {OURS: run(1.0), THEIRS: run(1.0, generated=90)}) == []
    assert unequal(realistic, {OURS: run(1.0), THEIRS: run(1.0, trained=[1, 90])}) != []


def test_without_a_gpu_its_benchmark_says_so() -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", "bench.gpu"], cwd=ROOT, env=hidden, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("bench.gpu: found no CUDA device that torch can use, expected one; `make bench`")


def test_an_iteration_grows_by_its_rows_and_its_minibatches(tmp_path: Path) -> None:
    scaled = [w for w in workloads(32, 64, (0.5, 2, 8)).values() if w.name not in ("fixed", "realistic")]
    sizes = [(w.rows * w.new_tokens, w.rows, w.minibatches, w.rows // w.minibatches) for w in scaled]
    assert sizes == [(1024, 16, 2, 8), (4096, 64, 8, 8), (16384, 256, 32, 8)]
    # 3 s for 1,024 tokens: 2.93 s for 1,000.
    runs = {scaled[0]: run(3.0, generated=1024), scaled[1]: run(13.0, generated=4096)}
    assert "| 1,024 | 16 | 2 | 3.0 | 2.93 | 2.00 |" in scaling_section(runs)
    assert scaling_picture(runs, tmp_path / "scaling.svg") == "![seconds of an iteration by tokens](scaling.svg)"
    assert "<svg" in (tmp_path / "scaling.svg").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)  # eight processes, each of which imports everything
def test_our_half_of_the_quick_benchmark_runs(tmp_path: Path) -> None:
    out = tmp_path / "results.md"
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "bench.run", "--quick", "--ours-only", "--out", str(out)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    text = out.read_text(encoding="utf-8")
    assert text in done.stdout
    fixed, realistic = re.findall(r"\| ppomax float32 \| [\d,]+ \| (\d+) \| (\d+) \| (\d+) \|", text)
    # 8 responses of exactly 16 tokens, all of them trained on, although `tiny` samples its eos now and then.
    assert fixed == ("128", "128", "4")
    generated, trained, minibatches = realistic
    assert generated == trained and 8 <= int(generated) < 8 * 32 and minibatches == "4"
    for row in ("| ppomax float32 lora |", "| ppomax float32 trunk |", "| generation |", "| log-probs of"):
        assert row in text
