"""What a save costs beside a plain copy: `save_checkpoint` against writing the same bytes to a file with their SHA-256.

    python -m bench.checkpoint [--megabytes 400] [--repeats 5] [--folder build/bench-checkpoint]

The two take turns, so that a busy machine slows both; the best of each counts. Both sync to the disk. The checkpoint is
tensors of the shapes of SmolLM2-135M's layers in float32.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
from pathlib import Path

import torch

from bench.common import seconds
from ppomax.engine.background import copied
from ppomax.engine.checkpoint import save_checkpoint

SHAPES = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576), "up": (1536, 576), "gate": (1536, 576),
          "down": (576, 1536), "norm": (576,)}  # fmt: skip


def layers(megabytes: int) -> dict[str, torch.Tensor]:
    """Random float32 tensors, whole layers up to the size."""
    generator, tensors, size, layer = torch.Generator().manual_seed(0), {}, 0, 0
    while size < megabytes * 10**6:
        for name, shape in SHAPES.items():
            tensors[f"layers.{layer}.{name}"] = torch.randn(shape, generator=generator)
            size += 4 * tensors[f"layers.{layer}.{name}"].numel()
        layer += 1
    return tensors


def plain_copy(source: Path, target: Path) -> None:
    """Copy a file block by block with its SHA-256, sync it, delete the copy before it."""
    digest = hashlib.sha256()
    with source.open("rb") as read, target.open("wb") as write:
        while block := read.read(1 << 20):
            digest.update(block)
            write.write(block)
        write.flush()
        os.fsync(write.fileno())
    target.with_suffix(".old").unlink(missing_ok=True)
    target.rename(target.with_suffix(".old"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("build/bench-checkpoint"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    tensors = layers(options.megabytes)
    size = sum(4 * tensor.numel() for tensor in tensors.values())
    source = options.folder / "source"
    with source.open("wb") as file:
        for tensor in tensors.values():
            file.write(tensor.numpy())
    saves, copies, waits = [], [], []
    try:
        for number in range(options.repeats):
            copies.append(seconds(lambda: plain_copy(source, options.folder / "copy")))
            name = f"step-{number}"
            saves.append(
                seconds(lambda name=name: save_checkpoint(options.folder / "saved", name, tensors, {}, keep=1))
            )
            waits.append(seconds(lambda: copied(tensors)))
            print(
                f"copy + SHA-256 {copies[-1]:.2f} s, save_checkpoint {saves[-1]:.2f} s, in the background training "
                f"waits {waits[-1]:.2f} s",
                flush=True,
            )
    finally:
        shutil.rmtree(options.folder)
    best, plain = min(saves), min(copies)
    print(
        f"{size / 1e6:.0f} MB, best of {options.repeats}: copy + SHA-256 {plain:.2f} s, save_checkpoint {best:.2f} s: "
        f"{best / plain:.2f} times as long; with save.background training waits {min(waits):.2f} s"
    )


if __name__ == "__main__":
    main()
