"""Scalars of many tensors, to and from vectors, as bits: the inner loops of applying a delta."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unmask.kernels.lazy import compiled

if TYPE_CHECKING:  # brings numba in
    from unmask.kernels import swap_cpu

__all__ = ["Exchange", "Move", "Moves", "gather", "scatter"]

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


class Moves(NamedTuple):
    """Many tensors' moves in three vectors: those of tensors[k] are starts[k]:starts[k + 1]."""

    tensors: Sequence[Tensor]
    starts: np.ndarray[Any, Any]
    at: Tensor
    new: Tensor
    old: Tensor

    @classmethod
    def of(cls, move: Move) -> Moves:
        """One tensor's."""
        return cls([move.tensor], np.array([0, len(move.at)]), *move[1:])

    def each(self) -> list[Move]:
        """One after another."""
        counts = np.diff(self.starts).tolist()
        vectors = (vector.split(counts) for vector in (self.at, self.new, self.old))
        return [Move(*parts) for parts in zip(self.tensors, *vectors, strict=True)]


def gather(moves: Sequence[Moves]) -> None:
    """Read every move's scalars into `old`."""
    kernels, able, rest = _shared_out(moves)
    if kernels:
        kernels.gather(able)
    _gather(rest)


def _gather(moves: Sequence[Move]) -> None:
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

    def __init__(self, moves: Sequence[Moves], known: bool = False) -> None:
        self._known, self._writing = known, False
        self._compiled: swap_cpu.Exchange | None = None
        kernels, able, self._moves = _shared_out(moves)
        if kernels:
            attempt = kernels.Exchange(able, known)
            if attempt.apart():
                self._compiled = attempt
            else:
                self._moves = _each(moves)

    def start(self) -> bool:
        """Read what is there; whether it is what was known. If not, there is only `revert`."""
        if not self._known:
            _gather(self._moves)
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


def _shared_out(moves: Sequence[Moves]) -> tuple[Any, list[Moves], list[Move]]:
    """Compiled code if there is any, what it can move, and what plain torch has to."""
    kernels = compiled("swap_cpu", sum(len(some.at) for some in moves))
    if kernels is None:
        return None, [], _each(moves)
    able: list[Moves] = []
    others: list[Move] = []
    for some in moves:
        if all(_able(tensor) for tensor in some.tensors):
            able.append(some)
            continue
        for move in some.each():
            if _able(move.tensor):
                able.append(Moves.of(move))
            else:
                others.append(move)
    return kernels, able, others


def _able(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.is_contiguous()


def _each(moves: Sequence[Moves]) -> list[Move]:
    return [move for some in moves for move in some.each()]


def _read(move: Move) -> Tensor:
    flat, at = _flat(move.tensor), move.at.to(move.tensor.device)
    if flat.is_contiguous():
        return flat.view(-1).index_select(0, at)
    # Indices count in the shape's order, not the memory's (channels_last, a transpose).
    return flat[torch.unravel_index(at, flat.shape)]


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().view(INTEGER[tensor.element_size()])
