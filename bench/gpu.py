"""`make bench` on one NVIDIA GPU: the same contenders and the same counting, in bfloat16 and with more rows.

    make bench-gpu                                   # the model of the CPU benchmark
    make bench-gpu ARGS="--model HuggingFaceTB/SmolLM2-1.7B-Instruct --rows 128 --new-tokens 256"

Takes every option of `bench.run`; writes bench/results-cuda.md. Memory is the GPU's peak. ppomax samples natively here,
which is its portable sampler: `make bench-vllm` measures the one for GPUs.
"""

from __future__ import annotations

import sys

import torch

from bench import run

# Before the given words, which therefore win.
DEFAULTS = ("--device", "cuda", "--rows", "256", "--precision", "autocast", "bfloat16", "--repeats", "3")


def main() -> None:
    """The benchmark with this machine's GPU."""
    if not torch.cuda.is_available():
        sys.exit(
            "bench.gpu: found no CUDA device that torch can use, expected one; `make bench` measures the processor"
        )
    sys.argv[1:1] = DEFAULTS
    run.main()


if __name__ == "__main__":
    main()
