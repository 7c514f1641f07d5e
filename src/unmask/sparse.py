"""Scalars of one tensor by position, and the fingerprint of many: bits, never floats."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from unmask.errors import UnmaskError
from unmask.kernels import swap
from unmask.kernels.swap import Move

__all__ = ["Sparse", "bits", "describe", "fingerprint", "read", "write"]

# Values travel as integers of their width: then no float rule can touch a NaN's payload or a -0.0.
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class Sparse:
    """Some scalars of one tensor: `values[i]` stands at flat index `indices[i]` of `shape`.

    An instance is valid, wherever its parts came from: both vectors lie in CPU memory, `indices`
    is int64, strictly increasing and inside the shape, `values` has the weights' own dtype.
    """

    shape: tuple[int, ...]
    indices: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        for part in ("indices", "values"):
            object.__setattr__(self, part, getattr(self, part).detach().cpu().contiguous())
        if self.values.dtype not in _FLOATS:
            raise UnmaskError(f"values are {describe(self.values)}, not 16 to 64-bit floats")
        if self.indices.dtype != torch.int64 or self.indices.ndim != 1:
            raise UnmaskError(f"indices are {describe(self.indices)}, not an int64 vector")
        if self.values.shape != self.indices.shape:
            raise UnmaskError(f"{len(self.indices)} indices for values {list(self.values.shape)}")
        at = self.indices.numpy()
        if at.size and not (at[0] >= 0 and at[-1] < self.numel and np.all(at[1:] > at[:-1])):
            raise UnmaskError(
                f"indices from {at[0]} to {at[-1]} aren't strictly increasing "
                f"within the {self.numel:,} scalars of shape {list(self.shape)}"
            )

    @property
    def numel(self) -> int:
        """Scalars of the whole tensor."""
        return math.prod(self.shape)

    def holding(self, values: Tensor) -> Sparse:
        """Return the same positions with other values, of as many scalars in CPU memory."""
        other = object.__new__(Sparse)
        vars(other).update(vars(self), values=values)  # valid by what is promised: not checked
        return other


def read(sparse: Mapping[str, Sparse], tensors: Mapping[str, Tensor]) -> dict[str, Sparse]:
    """Return the same positions with the values that `tensors`, of these shapes, hold there."""
    dtypes = {name: tensors[name].dtype for name in sparse}
    room = {}
    for dtype in set(dtypes.values()):  # a few large vectors instead of many small ones
        counts = [part.indices.numel() for n, part in sparse.items() if dtypes[n] == dtype]
        room[dtype] = iter(torch.empty(sum(counts), dtype=dtype).split(counts))
    found = {name: part.holding(next(room[dtypes[name]])) for name, part in sparse.items()}
    swap.gather([Move(tensors[name], part.indices, part.values) for name, part in found.items()])
    return found


def write(sparse: Mapping[str, Sparse], tensors: Mapping[str, Tensor]) -> None:
    """Write the values into `tensors`, of these shapes and dtypes, on whatever device."""
    swap.scatter([Move(tensors[name], part.indices, part.values) for name, part in sparse.items()])


def fingerprint(sparse: Mapping[str, Sparse]) -> str:
    """SHA-256 over names, shapes, dtypes and the raw bytes of the values, by sorted name.

    Handed a base's values at the changed positions, it identifies that base in O(B).
    """
    digest = hashlib.sha256()
    for name, part in sorted(sparse.items()):
        digest.update(_header(name, part.shape, part.values.dtype, part.values.numel()))
        digest.update(bits(part.values).numpy().data)
    return digest.hexdigest()


@lru_cache(maxsize=1 << 14)  # hashed anew at every swap of the same deltas
def _header(name: str, shape: tuple[int, ...], dtype: torch.dtype, count: int) -> bytes:
    # JSON delimits itself and the count delimits the bytes: no two contents share a stream.
    return json.dumps([name, shape, str(dtype), count]).encode()


def bits(tensor: Tensor) -> Tensor:
    """View `tensor` as integers of the same width."""
    if tensor.element_size() not in _INTEGER:
        raise UnmaskError(f"{describe(tensor)} is too wide to be kept bit for bit")
    return tensor.view(_INTEGER[tensor.element_size()])


def describe(tensor: Tensor) -> str:
    """Dtype and shape, for messages and comparisons."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
