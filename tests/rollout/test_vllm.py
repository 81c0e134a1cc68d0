"""vLLM where there is none: said in one line before anything is read, and never imported unless asked for."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models.architectures import FLOAT32

from ppomax.cli import main
from ppomax.models.load import Compute
from ppomax.rollout.vllm import vllm_for
from ppomax.types import SetupError

without_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")


@without_vllm
def test_without_vllm_the_error_says_what_to_install() -> None:
    with pytest.raises(SetupError, match=r"No module named 'vllm'.*pip install 'vllm>=0.32'.*docs/vllm.md.*native"):
        vllm_for(FLOAT32)


@without_vllm
def test_ppo_says_so_before_anything_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["ppo", "--run-dir", str(tmp_path / "run"), "--policy", "no/such-model", "--sampling.engine", "vllm"]
    assert main(words) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "sampling.engine: found vllm, which cannot be imported here" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("device", "said"), [("mps", "device mps, expected cpu or cuda"), ("cuda:1", "CUDA_VISIBLE_DEVICES=1")]
)
def test_a_device_that_vllm_does_not_take(device: str, said: str) -> None:
    with pytest.raises(SetupError, match=said):
        vllm_for(Compute(torch.device(device), torch.float32))


def test_a_temperature_that_vllm_would_raise(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--run-dir", str(tmp_path / "run"), "--sampling.engine", "vllm", "--sampling.temperature", "0.005"]
    assert main(["ppo", *words]) == 2
    assert "sampling.temperature: found 0.005 with sampling.engine vllm" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("verb", ["evaluate", "chat"])
def test_other_verbs_have_no_other_sampler(
    verb: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([verb, "--sampling.engine", "vllm"]) == 2
    assert "expected native" in " ".join(capsys.readouterr().err.split())


def test_nothing_imports_vllm_unless_asked() -> None:
    program = "import sys, ppomax.stages.ppo, ppomax.cli; print('vllm' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
