"""Whole rows, columns, heads and blocks as one choice each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.eligible import Eligible
from unmask.errors import UnmaskError
from unmask.heuristics import Heuristic, Scalars
from unmask.scopes import Scope
from unmask.select import Piece, ranked
from unmask.selectors import Selector, finite

__all__ = ["Units"]

RUN = 1 << 22  # scalars scored at once


@dataclass(frozen=True)
class Units(Scope):
    """The best rectangles of `rows` x `columns` scalars, each taken whole; None means all of them.

    Units() are rows, Units(None, 1) columns, Units(64, None) heads of 64 in what makes queries,
    keys and values, Units(None, 64) those in what brings them together, Units(32, 32) blocks. A
    matrix is cut from its top left; what remains at its edges is a smaller unit. Dimensions behind
    the first are columns, and a vector is one column.

    A unit is worth the mean score of its scalars and costs their number. The best are taken as
    long as the budget lasts; of the one that it doesn't suffice for, the best-scored scalars, so
    that the budget is spent exactly. With a growing set such a begun unit goes on before all
    others. A set from which some must go loses whole units, those that have moved least on
    average, and a part of one more. Memory for the length of a choice: the scores of one tensor,
    and the scalars of the best units.
    """

    rows: int | None = 1
    columns: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rows", "columns"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise UnmaskError(f"Units was asked for {name}={size}; it is 1 or more, or None")

    def selector(
        self, count: int, heuristic: Heuristic, eligible: Eligible, kept: Tensor
    ) -> Selector:
        return _UnitSelector(count, heuristic, eligible, kept.device, self)

    def staying(self, index: Tensor, worth: Tensor, count: int, eligible: Eligible) -> Tensor:
        first = torch.empty_like(index)
        for k, start, stop in eligible.split(index):
            flat, tensor = index[start:stop] - eligible.offsets[k], eligible.tensors[k]
            first[start:stop] = (
                self.firsts(tensor)[self.numbers(tensor)[flat]] + eligible.offsets[k]
            )
        unit, scalar = first.unique(return_inverse=True)
        size = torch.bincount(scalar, minlength=len(unit))
        mean = _summed(worth, scalar, len(unit)) / size
        return _fill(mean, unit, scalar, worth, index, count)

    def numbers(self, tensor: Tensor) -> Tensor:
        """Which unit each scalar is in, counted from 0: left to right, then down."""
        height, width, rows, columns = self._sizes(tensor)
        down = torch.arange(height, device=tensor.device) // rows * -(-width // columns)
        return (down[:, None] + torch.arange(width, device=tensor.device) // columns).flatten()

    def firsts(self, tensor: Tensor) -> Tensor:
        """The flat index of each unit's first scalar."""
        height, width, rows, columns = self._sizes(tensor)
        top = torch.arange(0, height, rows, device=tensor.device) * width
        return (top[:, None] + torch.arange(0, width, columns, device=tensor.device)).flatten()

    def _sizes(self, tensor: Tensor) -> tuple[int, int, int, int]:
        height = len(tensor) if tensor.ndim else 1
        width = tensor.numel() // height if height else 0
        return height, width, self.rows or max(1, height), self.columns or max(1, width)


class _UnitSelector:
    """Holds the scalars of the best units so far, and no more."""

    def __init__(
        self, count: int, heuristic: Heuristic, eligible: Eligible, home: torch.device, cut: Units
    ) -> None:
        self.count, self._heuristic, self._eligible = count, heuristic, eligible
        self._cut, self._home = cut, home
        none = torch.empty(0, device=home)
        # Of units: mean score, global index of the first scalar, size. Of scalars: score, global
        # index, gradient, and that first index of theirs.
        self._units = [none.double(), none.long(), none.long()]
        self._scalars = [none, none.long(), none, none.long()]

    def offer(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            finite(piece, self._heuristic)
            self._look(piece)

    def best(self) -> tuple[Tensor, Tensor]:
        mean, unit, _ = self._units
        score, index, gradient, of = self._scalars
        order = unit.argsort()
        mean, unit = mean[order], unit[order]
        scalar = torch.searchsorted(unit, of)
        chosen = _fill(mean, unit, scalar, score, index, self.count)
        index, order = index[chosen].sort()
        return index, gradient[chosen][order]

    def _look(self, piece: Piece) -> None:
        tensor = self._eligible.tensors[self._eligible.owner(piece.offset)]
        first, number = self._cut.firsts(tensor), self._cut.numbers(tensor)
        taken = piece.taken
        score = self._scores(piece)
        size = torch.bincount(number, minlength=len(first))
        size -= torch.bincount(number[taken], minlength=len(first))
        mean = _summed(score.index_fill(0, taken, 0.0), number, len(first)) / size
        mean[number[taken]] = torch.inf  # begun
        # Only scalars of units that can win are looked up one by one.
        alive = torch.zeros(len(first), dtype=torch.bool, device=first.device)
        alive[_worth_holding(mean, first, size, self.count)] = True
        free = alive[number].index_fill_(0, taken, False)
        flat = free.nonzero().squeeze(1)
        grad = torch.zeros_like(score) if piece.grad is None else piece.grad.detach().reshape(-1)
        grad = grad[flat] if grad.dtype == torch.float64 else grad[flat].float()
        unit = first + piece.offset
        units = (mean[alive], unit[alive], size[alive])
        scalars = (score[flat], flat + piece.offset, grad, unit[number[flat]])
        for held, new in ((self._units, units), (self._scalars, scalars)):
            held[:] = [torch.cat([a, b.to(self._home)]) for a, b in zip(held, new, strict=True)]
        self._thin()

    def _scores(self, piece: Piece) -> Tensor:
        parts = []
        weights = piece.theta.detach().reshape(-1)
        given = self._heuristic.uses_gradient and piece.grad is not None
        gradients = piece.grad.detach().reshape(-1) if given else None  # type: ignore[union-attr]
        for start in range(0, len(weights), RUN):
            flat = range(start, min(start + RUN, len(weights)))
            run = slice(flat.start, flat.stop)
            theta = weights[run].float()
            grad = torch.zeros_like(theta) if gradients is None else gradients[run].float()
            seen = None if piece.seen is None else piece.seen[run]
            scalars = Scalars(theta, grad, piece.name, piece.offset, flat, seen)
            parts.append(self._heuristic.score(scalars).float())
        return torch.cat(parts) if parts else weights.float()

    def _thin(self) -> None:
        """Let go of units that can't be chosen any more."""
        mean, unit, size = self._units
        order = _worth_holding(mean, unit, size, self.count)
        self._units = [part[order] for part in self._units]
        stay = torch.isin(self._scalars[3], self._units[1])
        self._scalars = [part[stay] for part in self._scalars]


def _summed(values: Tensor, of: Tensor, groups: int) -> Tensor:
    return torch.zeros(groups, dtype=torch.float64, device=of.device).index_add_(
        0, of, values.double()
    )


def _worth_holding(mean: Tensor, unit: Tensor, size: Tensor, count: int) -> Tensor:
    """Positions of the units that `count` scalars can come from: the best, as long as they last."""
    order = ranked(mean, unit)
    before = size[order].cumsum(0) - size[order]
    order = order[before < count]
    return order[size[order] > 0]


def _fill(
    mean: Tensor, unit: Tensor, scalar: Tensor, score: Tensor, index: Tensor, count: int
) -> Tensor:
    """Positions of `count` scalars: those of the best units, whole, and the best of one more.

    Units by mean and first index, scalars by the unit they are in, score and global index.
    """
    order = ranked(mean, unit)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    by_score = ranked(score, index)
    return by_score[rank[scalar[by_score]].argsort(stable=True)][:count]
