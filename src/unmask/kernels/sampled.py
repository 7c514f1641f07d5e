"""The sampled product: single entries of leftᵀ·right, without the others.

A weight's gradient is such a product over tokens, dW[o, i] = Σ_t dY[t, o]·X[t, i]. In plain torch
here, compiled for the CPU in `cpu_sampled` and for GPUs in `cuda_sampled`. Sums are float32
(float64 for float64) whatever the operands are, unless so many entries are asked for that the dense
product is the faster way; their order differs from a dense product's. In the compiled kernels it
depends on the shapes alone, so a result is the same at each run and for any number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from unmask.kernels import compiled_for

__all__ = ["Entries", "product", "reference"]

DENSE = 0.25  # share of entries asked for from which the dense product is the faster way
# The same on a GPU, by arithmetic and not by measurement: for an entry and a token, 4 bytes come
# through the cache at some 5 TB/s; the dense product does 2 operations at some 500 TFLOP/s.
GPU_DENSE = 0.005
CHUNK = 1 << 22  # numbers that the plain version gathers at once


@dataclass(frozen=True, eq=False)
class Entries:
    """Positions in a matrix of this shape, row by row, int32."""

    rows: Tensor
    columns: Tensor
    shape: tuple[int, int]

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def transposed(self) -> Entries:
        """The same entries, of the transposed matrix, still in this order."""
        return Entries(self.columns, self.rows, (self.shape[1], self.shape[0]))

    @cached_property
    def compiled(self) -> tuple[object, ...]:
        """What the CPU's kernel wants to know of them."""
        from unmask.kernels import cpu_sampled

        return cpu_sampled.prepared(self.rows, self.columns, self.shape)


def product(left: Tensor, right: Tensor, entries: Entries, along: int = 0) -> Tensor:
    """Σ_t left[t, row]·right[t, column] at each entry; with along=1, of left[row, t] and so on."""
    left, right = left.detach(), right.detach()
    gpu = left.is_cuda
    if left.dtype != right.dtype or (left.dtype == torch.float16 and not gpu):
        wide = torch.promote_types(torch.float32, torch.promote_types(left.dtype, right.dtype))
        left, right = left.to(wide), right.to(wide)
    if len(entries) > (GPU_DENSE if gpu else DENSE) * entries.shape[0] * entries.shape[1]:
        dense = left.t() @ right if along == 0 else left @ right.t()
        return wider(dense[entries.rows, entries.columns])
    left, right = left.contiguous(), right.contiguous()
    if compiled_for(left, right) is None or left.dtype == torch.float64:
        return reference(left, right, entries, along)
    if gpu:
        from unmask.kernels import cuda_sampled

        return cuda_sampled.product(left, right, entries.rows, entries.columns, along)
    from unmask.kernels import cpu_sampled

    return cpu_sampled.product(left, right, entries.compiled, len(entries), along)


def reference(left: Tensor, right: Tensor, entries: Entries, along: int = 0) -> Tensor:
    """As `product`: the formula, some entries at a time."""
    size = max(1, CHUNK // max(1, left.shape[along]))
    found = [
        (
            wider(left.index_select(1 - along, rows))
            * wider(right.index_select(1 - along, columns))
        ).sum(along)
        for rows, columns in zip(entries.rows.split(size), entries.columns.split(size), strict=True)
    ]
    return torch.cat(found)


def wider(x: Tensor) -> Tensor:
    """In the precision that sums are taken in."""
    return x if x.dtype == torch.float64 else x.float()
