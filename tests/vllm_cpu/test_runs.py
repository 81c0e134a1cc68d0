"""PPO with a real vLLM: goes through, agrees with the trainer, repeats and resumes; what it cannot run is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models.architectures import BFLOAT16, FLOAT32
from stages.toy import expect_exact_resume, metrics, ppo_config, prompt_rows, write_rows

from ppomax.config import KLConfig, OptimConfig, SamplingConfig
from ppomax.config.layers import plain
from ppomax.config.ppo import ObjectiveConfig
from ppomax.models.load import load_causal_lm
from ppomax.models.players import Policy
from ppomax.rollout.vllm import VLLM
from ppomax.stages.ppo import ppo
from ppomax.types import SetupError

BY_VLLM = SamplingConfig(max_new_tokens=10, engine="vllm", max_rows=8)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", prompt_rows(45))


def test_ppo_repeats_and_resumes_and_agrees_with_the_trainer(directory: str, prompts: str, tmp_path: Path) -> None:
    capped = ObjectiveConfig(importance_cap=2.0)
    config = ppo_config(tmp_path / "whole", directory, prompts, sampling=BY_VLLM, objective=capped)
    expect_exact_resume(config, ["final"])
    rows = metrics(config.run_dir)
    assert [row["phase"] for row in rows] == ["critic", "policy", "policy"]
    assert rows[2]["kl_per_sequence"] > 1e-3  # the policy has moved, and the engine has followed
    for row in rows:
        assert row["behaviour_gap_max"] < 1e-3
        assert 0 <= row["behaviour_kl"] < 1e-6
        assert row["behaviour_far_share"] == 0
        assert row["importance_weight"] == pytest.approx(1.0, abs=1e-4)
        assert row["importance_capped_share"] == 0
    first = json.loads((config.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert 0 < first["seconds/generate/weights"] < first["seconds/generate"]
    assert not VLLM.running
    assert not torch.distributed.is_initialized()


def share_of_even_ids(prompts: Sequence[Any], responses: Sequence[str], **columns: Any) -> list[float]:
    """Half of them to begin with, so that a model that was never trained has something to learn from at once."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in columns["response_ids"]]


def test_it_learns_as_with_the_native_sampler(directory: str, prompts: str, tmp_path: Path) -> None:
    fast = OptimConfig(lr=5e-3, warmup=0.0, schedule="constant")
    for sampling in (BY_VLLM, BY_VLLM.model_copy(update={"engine": "native"})):
        run_dir = tmp_path / sampling.engine
        changes = {"iterations": 18, "rollout_batch": 32, "minibatch": 16, "epochs": 2, "optim": fast}
        config = ppo_config(run_dir, directory, prompts, sampling=sampling, kl=KLConfig(coefficient=0.01), **changes)
        ppo(config, reward=share_of_even_ids)
        scores = [row["score_mean"] for row in metrics(run_dir)]
        assert sum(scores[-2:]) / 2 > scores[0] + 0.2
    assert "engine: vllm" in (tmp_path / "vllm" / "config.yaml").read_text()
    assert json.loads((tmp_path / "vllm" / "summary.json").read_text())["iterations"] == 18


def test_what_vllm_cannot_run_is_a_setup_error(tiny_model: torch.nn.Module) -> None:
    """The heads of `tiny` are 8 wide."""
    tiny = Policy(tiny_model, train_layers=None, trained=False)
    engine = VLLM("tiny", tiny, FLOAT32, longest=64, max_rows=2)
    try:
        with pytest.raises(SetupError, match=r"does not run LlamaForCausalLM here: .*head_dim=8.*engine native"):
            engine.check(tiny, [[1, 40, 50]], 1.0)
    finally:
        engine.close()


@pytest.mark.slow
def test_a_real_model_in_bfloat16() -> None:
    policy = Policy(load_causal_lm("smollm2-135m", BFLOAT16), train_layers=None, trained=False)
    engine = VLLM("smollm2-135m", policy, BFLOAT16, longest=64, max_rows=4)
    try:
        prompts = [[1, 4093, 198, 7306 + i, 506, 2, 198, 1, 520, 9531, 198] for i in range(4)]
        assert engine.check(policy, prompts, 1.0) < 0.1
    finally:
        engine.close()


@pytest.mark.slow
def test_two_processes_with_an_engine_each_do_what_one_does(directory: str, prompts: str, tmp_path: Path) -> None:
    for count in (1, 2):
        config = ppo_config(tmp_path / str(count), directory, prompts, sampling=BY_VLLM)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain(config)))
        launcher = ["torch.distributed.run", "--nproc-per-node", "2", "-m"] if count == 2 else []
        words = [sys.executable, "-m", *launcher, "ppomax", "ppo", "--config", str(tmp_path / "config.yaml")]
        path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    one, two = (metrics(tmp_path / str(count)) for count in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert a["response_length"] == b["response_length"]
        assert b["score_mean"] == pytest.approx(a["score_mean"], abs=1e-6)
        assert b["behaviour_gap_max"] < 1e-3
    assert two[2]["kl_per_sequence"] == pytest.approx(one[2]["kl_per_sequence"], rel=1e-2)
