"""Scalars of many tensors, to and from vectors, as bits: the inner loops of applying a delta."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from unmask.kernels.lazy import compiled

if TYPE_CHECKING:  # brings numba in
    from unmask.kernels import swap_cpu

__all__ = ["Exchange", "Move", "gather", "scatter"]

# Values travel as integers of their width: then no float rule can touch a NaN's payload or a -0.0.
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Move(NamedTuple):
    """At flat index `at[i]` of `tensor`, on whatever device, is `old[i]` and shall be `new[i]`.

    The three vectors lie in CPU memory, contiguous; `at` is int64, strictly increasing, and inside
    the tensor; the values are of the tensor's dtype.
    """

    tensor: Tensor
    at: Tensor
    new: Tensor
    old: Tensor


def gather(moves: Sequence[Move]) -> None:
    """Read every move's scalars into `old`."""
    if kernels := _kernels(moves):
        able, moves = _split(moves)
        kernels.gather(able)
    for move in moves:
        _flat(move.old).copy_(_read(move))


def scatter(moves: Sequence[Move]) -> None:
    """Write every move's `new` to its scalars."""
    for move in moves:
        flat, at = _flat(move.tensor), move.at.to(move.tensor.device)
        values = _flat(move.new).to(move.tensor.device)
        if flat.is_contiguous():
            flat.view(-1).scatter_(0, at, values)  # several times as fast as index_copy_
        else:
            flat[torch.unravel_index(at, flat.shape)] = values


class Exchange:
    """`new` for `old`, and at any moment back again, bit for bit.

    `start` reads `old`, or, if that is `known`, compares it. After `finish` all is written.
    `revert` undoes whatever was done so far. Compiled code writes at the start already, so that a
    scalar's memory is fetched once and not twice.
    """

    def __init__(self, moves: Sequence[Move], known: bool = False) -> None:
        self._moves, self._known, self._writing = moves, known, False
        self._compiled: swap_cpu.Exchange | None = None
        if kernels := _kernels(moves):
            able, rest = _split(moves)
            attempt = kernels.Exchange(able, known)
            if attempt.apart():
                self._compiled, self._moves = attempt, rest

    def start(self) -> bool:
        """Read what is there; whether it is what was known. If not, there is only `revert`."""
        if not self._known:
            gather(self._moves)
        elif not all(torch.equal(_read(move).cpu(), _flat(move.old)) for move in self._moves):
            return False
        return self._compiled is None or self._compiled.start()

    def finish(self) -> None:
        """Write what isn't written yet."""
        self._writing = True
        scatter(self._moves)
        if self._compiled:
            self._compiled.finish()

    def revert(self) -> None:
        """Leave every tensor as it was before the start."""
        if self._compiled:
            self._compiled.revert()
        if self._writing:
            scatter([move._replace(new=move.old) for move in self._moves])


def _kernels(moves: Sequence[Move]) -> Any:
    return compiled("swap_cpu", sum([move.at.numel() for move in moves]))


def _split(moves: Sequence[Move]) -> tuple[list[Move], list[Move]]:
    """The moves that compiled code can do, and the others."""
    able: list[Move] = []
    others: list[Move] = []
    for move in moves:
        tensor = move.tensor
        (able if tensor.is_cpu and tensor.is_contiguous() else others).append(move)
    return able, others


def _read(move: Move) -> Tensor:
    flat, at = _flat(move.tensor), move.at.to(move.tensor.device)
    if flat.is_contiguous():
        return flat.view(-1).index_select(0, at)
    # Indices count in the shape's order, not the memory's (channels_last, a transpose).
    return flat[torch.unravel_index(at, flat.shape)]


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().view(INTEGER[tensor.element_size()])
