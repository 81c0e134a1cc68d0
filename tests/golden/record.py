"""The golden run: 20 iterations of PPO-max on the tiny model. `make golden` records its metrics in golden.json.

A change of golden.json needs a line in CHANGELOG.md under "Numerics" that says why the numbers moved.

The run is a process of its own, because what makes its sums the same on every x86 processor is read when libraries load.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).with_name("golden.json")
# PyTorch's kernels without vector extensions, and MKL's code path for any x86 processor: each adds in one order.
SAME_ON_EVERY_PROCESSOR = {
    "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41", "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}  # fmt: skip
# Depends on the machine, is not a number, or says what was computed and not what came of it.
LEFT_OUT = (
    "seconds", "tokens_per_second", "peak_", "score_histogram", "alarms", "stop", "phase", "nonfinite", "flops",
    "utilisation", "padding", "tokens/generate/", "tokens/score/", "tokens/train/",
)  # fmt: skip


def golden_run(folder: Path) -> list[dict[str, float]]:
    """The metrics of every iteration, by name; `folder` is filled with the runs."""
    environment = {**os.environ, **SAME_ON_EVERY_PROCESSOR, "PPOMAX_CACHE": str(folder)}
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the golden run ended with {done.returncode}:\n{done.stderr[-4000:]}")
    lines = (folder / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [_numbers(json.loads(line)) for line in lines]


def _run(folder: Path) -> None:
    """Fill `folder` with the runs, in this process."""
    import torch
    from stages.toy import dialogue_rows, pair_rows, ppo_config, prompt_rows, reward_config, sft_config, write_rows

    from ppomax.config import CriticConfig, KLConfig, OptimConfig, ScoreConfig
    from ppomax.stages.ppo import ppo
    from ppomax.stages.reward import reward
    from ppomax.stages.sft import sft

    torch.set_num_threads(1)
    data = {"dialogues": dialogue_rows(), "pairs": pair_rows(), "prompts": prompt_rows(45)}
    specs = {name: write_rows(folder / f"{name}.jsonl", rows) for name, rows in data.items()}
    policy, scorer = (str(folder / name / "final") for name in ("sft", "reward"))
    # Adam divides by the gradient's size, so that where it is next to nothing its rounding would be enlarged.
    optim = OptimConfig(lr=5e-3, eps=1e-3)
    sft(sft_config(folder / "sft", specs["dialogues"], optim=optim))
    reward(reward_config(folder / "reward", policy, specs["pairs"], optim=optim))
    ppo(
        ppo_config(
            folder / "ppo", policy, specs["prompts"], iterations=20, reward=(scorer,),
            ptx_data=(specs["dialogues"],), ptx_weight=0.1, kl=KLConfig(), score=ScoreConfig(),
            critic=CriticConfig(optim=optim), optim=optim,
        )
    )  # fmt: skip


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if not name.startswith(LEFT_OUT)}


def _record() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = golden_run(Path(folder))
    lines = ",\n".join(json.dumps(row) for row in rows)
    GOLDEN.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(f"{GOLDEN}: {len(rows)} iterations recorded")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    if len(sys.argv) > 1:
        _run(Path(sys.argv[1]))
    else:
        _record()
