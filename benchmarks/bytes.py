"""What a delta takes on disk against the least it could, and how fast its positions are coded.

The least is the entropy of the index set, log2 of the number of sets of B out of N scalars, and the
bits of the values. Files are counted whole, with headers and config. Speed is of the codec alone,
in bytes of the decoded indices, counted as 4 each (as in the plain layout) and as 8 (in memory).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import unmask
from benchmarks import common
from unmask import codec
from unmask.delta import Sparse
from unmask.kernels import rice

TENSORS, WIDTH = 200, 768  # as many as a base-sized encoder has


def uniform(generator: np.random.Generator, n: int, b: int) -> np.ndarray:
    return generator.choice(n, b, replace=False)


def clustered(generator: np.random.Generator, n: int, b: int) -> np.ndarray:
    """Neighbourhoods of 5,000 scalars of which a tenth is chosen."""
    centres = generator.integers(0, n, max(b // 450, 1))
    return np.unique((centres[:, None] + generator.integers(0, 5000, (1, 500))) % n)[:b]


def rows(generator: np.random.Generator, n: int, b: int) -> np.ndarray:
    """Whole rows of the weights."""
    chosen = generator.choice(n // WIDTH, max(b // WIDTH, 1), replace=False)
    return (chosen[:, None] * WIDTH + np.arange(WIDTH)).reshape(-1)


SETS: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "uniform": uniform,
    "clustered": clustered,
    "rows": rows,
}


def delta_of(index: np.ndarray, n: int, dtype: torch.dtype) -> unmask.Delta:
    size, sparse = n // TENSORS, {}
    for k in range(TENSORS):
        at = index[np.searchsorted(index, k * size) : np.searchsorted(index, (k + 1) * size)]
        if len(at):
            name = f"model.encoder.layer.{k // 16}.attention.self.projection_{k % 16}.weight"
            values = torch.randn(len(at)).to(dtype)
            sparse[name] = Sparse((size // WIDTH, WIDTH), torch.from_numpy(at - k * size), values)
    info = {"method": unmask.id3(budget=len(index)).to_dict(), "budget": len(index)}
    return unmask.Delta(sparse, base="0" * 64, info=info)


def entropy(n: int, b: int) -> float:
    return (math.lgamma(n + 1) - math.lgamma(b + 1) - math.lgamma(n - b + 1)) / math.log(2)


def bits_on_disk(delta: unmask.Delta, layout: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        delta.save(folder, layout=layout)  # type: ignore[arg-type]
        return 8 * sum(file.stat().st_size for file in Path(folder).iterdir())


def files(n: int, budgets: dict[str, list[int]]) -> list[dict[str, Any]]:
    found = []
    for kind, sizes in budgets.items():
        for b in sizes:
            index = np.sort(SETS[kind](np.random.default_rng(0), n, b)).astype(np.int64)
            for dtype in (torch.float32, torch.bfloat16):
                delta = delta_of(index, n, dtype)
                least = entropy(n, len(index)) + 8 * dtype.itemsize * len(index)
                found.append(
                    {
                        "kind": kind,
                        "dtype": str(dtype).removeprefix("torch."),
                        "scalars": len(index),
                        "density": len(index) / n,
                        "least": least,
                        **{x: bits_on_disk(delta, x) for x in ("plain", "compact")},
                    }
                )
    return found


def speed(n: int, b: int, repeats: int) -> dict[str, list[float]]:
    index = np.sort(uniform(np.random.default_rng(0), n, b)).astype(np.int64)
    size = n // TENSORS
    counts, sizes = np.bincount(index // size, minlength=TENSORS), np.full(TENSORS, size)
    index %= size
    coded = codec.Coded(*rice.encode(index, counts, sizes))
    return common.interleaved(
        {
            "numba, encode": lambda: rice.encode(index, counts, sizes),
            "numba, decode": lambda: rice.decode(*coded, counts, sizes),
            "numpy, encode": lambda: codec._encode(index, counts, sizes),
            "numpy, decode": lambda: codec._decode(*coded, counts, sizes),
        },
        repeats,
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = common.arguments(__doc__, repeats=7).parse_args(argv)
    n = TENSORS * WIDTH * (10 if options.smoke else 800)
    shares = (1e-4, 1e-3, 1e-2, 1e-1)
    budgets = {kind: [round(n * share) for share in shares] for kind in SETS}
    budgets["uniform"] = sorted(
        [*budgets["uniform"], *(() if options.smoke else (38_000, 320_000))]
    )
    found = files(n, budgets)
    b = n // 384
    times = speed(n, b, options.repeats)
    tables = [
        common.table(
            f"Bits on disk to the least possible, {n:,} scalars in {TENSORS} tensors",
            ["set", "values", "scalars", "compact", "plain", "plain, bytes a scalar"],
            [
                [
                    one["kind"],
                    one["dtype"],
                    f"{one['scalars']:,}",
                    f"{one['compact'] / one['least']:.3f}",
                    f"{one['plain'] / one['least']:.2f}",
                    f"{one['plain'] / 8 / one['scalars']:.2f}",
                ]
                for one in found
            ],
        ),
        common.table(
            f"Speed of the codec, {b:,} indices, MB/s",
            ["", "4 bytes an index", "8 bytes an index"],
            [
                [name, *(f"{size * b / common.median(taken) / 1e6:,.0f}" for size in (4, 8))]
                for name, taken in times.items()
            ],
        ),
    ]
    return common.finish("bytes", options, tables, {"files": found, "seconds": times})


if __name__ == "__main__":
    main()
