"""N processes beside one on the same cores: the iteration of `make bench` (fixed), everything trained, by `torchrun`.

    python -m bench.processes [--rows 32] [--processes 2] [--shard none zero2 zero3] [--repeats 2]

One process uses all cores, N share them. They take turns; the fastest iteration counts, the first of each run warms up.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from bench.common import processor, spread, table
from bench.materials import prepare
from bench.plan import Contender, workloads
from bench.ppo import our_config
from ppomax.config.layers import plain
from ppomax.monitor.log import read_metrics


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--shard", nargs="+", choices=["none", "zero2", "zero3"], default=["none"])
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    options.device = "cpu"
    cores = os.cpu_count() or 1
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        workload = workloads(options.rows, options.new_tokens)["fixed"]
        prepare(options.model, None, [workload], work)
        config = plain(our_config(Contender("ppomax", "float32"), options, workload, work, work))
        for repeat in range(options.repeats):
            for shard in ("", *options.shard):
                name = f"{options.processes} processes, {shard}" if shard else "one process"
                given = work / f"{repeat}-{shard}.yaml"
                run_dir = work / f"run-{repeat}-{shard}"
                compute = {**config["compute"], **({"shard": shard} if shard else {})}
                given.write_text(yaml.safe_dump({**config, "run_dir": str(run_dir), "compute": compute}))
                _run(given, options.processes if shard else 1, cores)
                seconds = [row["seconds/total"] for row in read_metrics(run_dir / "metrics.jsonl")][1:]
                found.setdefault(name, []).extend(seconds)
                print(f"{repeat + 1}/{options.repeats} {name}: {seconds}", file=sys.stderr, flush=True)
    alone = min(found["one process"])
    rows = [[name, f"{min(s):.1f}", f"{min(s) / alone:.2f}", spread(s)] for name, s in found.items()]
    print(f"{processor()}; {workload}\n")
    print(table(("who", "s / iteration", "of one process", "slowest / fastest"), rows))


def _run(config: Path, processes: int, cores: int) -> None:
    launch = ["-m"] if processes == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m"]
    subprocess.run(
        [sys.executable, *launch, "ppomax", "ppo", "--config", str(config)],
        check=True, env={**os.environ, "OMP_NUM_THREADS": str(max(cores // processes, 1))}, stdout=sys.stderr,
    )  # fmt: skip


if __name__ == "__main__":
    main()
