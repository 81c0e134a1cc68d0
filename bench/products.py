"""Float32 products of a linear layer for few rows: x · weightᵀ beside weight · xᵀ.

Where `models/few_rows.py` has its limit from:

    python -m bench.products
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ppomax.engine.speed import most_calls

LAYERS, SHAPES, ROWS = 30, ((1536, 576), (576, 1536), (576, 576), (192, 576)), (4, 16, 32, 64, 96, 128, 256)
SECONDS = 0.4


def main() -> None:
    """One line for every shape and number of rows; the weights of many layers, so that none waits in a cache."""
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, GFLOP/s\nweight         rows  x·wᵀ  w·xᵀ  ratio")
    for outputs, inputs in SHAPES:
        weights = [torch.randn(outputs, inputs) for _ in range(LAYERS)]
        for rows in ROWS:
            x = torch.randn(rows, inputs)
            work = 2e-9 * rows * inputs * outputs * LAYERS

            def plain(x: torch.Tensor = x, weights: list[torch.Tensor] = weights) -> None:
                for weight in weights:
                    F.linear(x, weight)

            def first(x: torch.Tensor = x, weights: list[torch.Tensor] = weights) -> None:
                for weight in weights:
                    torch.mm(weight, x.t()).t().contiguous()

            theirs, ours = (work * most_calls(call, torch.device("cpu"), SECONDS) for call in (plain, first))
            print(f"{outputs:5d} × {inputs:5d} {rows:5d} {theirs:5.0f} {ours:5.0f} {ours / theirs:5.2f}×", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
