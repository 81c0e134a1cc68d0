"""Memory that runs out in a process whose address space is limited: what it says of where, with how much, and of what to lower."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ppomax.cli import main
from ppomax.models import load

# A short run first: whatever is imported or kept is there before the limit.
LIMITED = """
import resource, sys
from pathlib import Path
import torch
from ppomax.cli import main
torch.set_num_threads(1)
words, more = sys.argv[1].split(), sys.argv[2].split()
assert main([*words, "--run-dir", "warm"]) == 0

def limit():
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + 24 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (size, size))

import memory_rewards
memory_rewards.at_next_call = limit if sys.argv[3] == "score" else None
if not memory_rewards.at_next_call:
    limit()
sys.exit(main([*words, *more, "--run-dir", "full"]))
"""
REWARDS = """
at_next_call = None

def limiting(prompts, responses, **columns):
    if at_next_call:
        at_next_call()
    return [0.0] * len(responses)
"""
COMMON = "--compute.dtype float32 --compute.device cpu --compute.tokens-per-microbatch 64000"
SFT = f"sft --model tiny --data long.jsonl --heldout 0 --batch-size 1 --epochs 0.02 {COMMON}"
PPO = (
    "ppo --policy tiny --critic.init policy --critic.pretrain-iterations 0 --prompts long.jsonl --iterations 1 "
    f"--rollout-batch 1 --minibatch 1 --sampling.max-new-tokens 4 --reward memory_rewards:limiting {COMMON}"
)
CASES = {
    "train": (SFT, "--batch-size 64 --epochs 1", r"a microbatch of 64 × 4\d\d = [\d,]+ tokens", "--compute.tokens-per-microbatch, --compute.train-layers"),
    "generate": (PPO, "--rollout-batch 64 --minibatch 64", r"side by side (?:8 × 4\d\d = 3|64 × 4\d\d = \d\d),\d\d\d tokens", "--sampling.max-rows, --sampling.max-new-tokens"),
    "score": (PPO, "--rollout-batch 64 --minibatch 64", r"a microbatch of 64 × 4\d\d = [\d,]+ tokens", "--compute.tokens-per-microbatch"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("phase", CASES)
def test_out_of_memory_names_the_phase_the_tokens_and_the_knob(phase: str, tmp_path: Path) -> None:
    words, more, tokens, flags = CASES[phase]
    rows = [{"prompt": f"{i} " * 115, "response": "yes"} for i in range(100, 200)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "memory_rewards.py").write_text(REWARDS)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, words, more, phase], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    said = " ".join(done.stderr.split())
    assert done.returncode == 1, said
    assert re.search(rf"error: out of memory in {phase}, {tokens} \(.*\)\. Lower {flags}, or free some memory", said)
    assert "Traceback" not in said


def test_out_of_memory_in_an_export_is_out_of_memory_while_saving(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "whole_state", full)
    Path("long.jsonl").write_text(json.dumps({"prompt": "one", "response": "yes"}) + "\n")
    assert main(SFT.split()) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "out of memory while saving (no room). Free some memory and start again" in said
