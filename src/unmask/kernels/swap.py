"""Scalars of many tensors, to and from vectors, as bits: the inner loops of applying a delta."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unmask.kernels.lazy import compiled

__all__ = ["Move", "gather", "scatter"]

# Values travel as integers of their width: then no float rule can touch a NaN's payload or a -0.0.
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Move(NamedTuple):
    """`values[i]` belongs to the scalar at flat index `at[i]` of `tensor`, on whatever device.

    Both vectors lie in CPU memory, contiguous; `at` is int64, without repeats, and inside the
    tensor; `values` is of the tensor's dtype.
    """

    tensor: Tensor
    at: Tensor
    values: Tensor


def gather(moves: Sequence[Move]) -> None:
    """Read every move's scalars into its `values`."""
    for move in _compiled(moves, "gather"):
        flat, at = _flat(move.tensor), move.at.to(move.tensor.device)
        if flat.is_contiguous():
            found = flat.view(-1).index_select(0, at)
        else:  # indices count in the shape's order, not the memory's (channels_last, a transpose)
            found = flat[torch.unravel_index(at, flat.shape)]
        _flat(move.values).copy_(found)


def scatter(moves: Sequence[Move]) -> None:
    """Write every move's `values` to its scalars."""
    for move in _compiled(moves, "scatter"):
        flat, at = _flat(move.tensor), move.at.to(move.tensor.device)
        values = _flat(move.values).to(move.tensor.device)
        if flat.is_contiguous():
            flat.view(-1).scatter_(0, at, values)  # several times as fast as index_copy_
        else:
            flat[torch.unravel_index(at, flat.shape)] = values


def _compiled(moves: Sequence[Move], way: str) -> Sequence[Move]:
    """Do with compiled code what it can do; the moves that are left."""
    kernels = compiled("swap_cpu", sum(move.at.numel() for move in moves))
    if kernels is None:
        return moves
    able = [move.tensor.device.type == "cpu" and move.tensor.is_contiguous() for move in moves]
    getattr(kernels, way)([move for move, can in zip(moves, able, strict=True) if can])
    return [move for move, can in zip(moves, able, strict=True) if not can]


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().view(INTEGER[tensor.element_size()])
