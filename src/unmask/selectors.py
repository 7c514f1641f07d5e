"""How several selections make one: of groups of tensors, or of tensors with bounds each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from unmask.eligible import Eligible
from unmask.errors import UnmaskError
from unmask.heuristics import Heuristic
from unmask.select import NonFinite, Piece, TopK, ranked

__all__ = ["Grouped", "Selector", "Within", "finite"]

Found = tuple[Tensor, ...]  # scores, global indices, gradients


class Selector(Protocol):
    """Chooses while tensors stream past in any order."""

    count: int

    def offer(self, pieces: Iterable[Piece]) -> None:
        """Look at these tensors; each is offered once."""

    def best(self) -> tuple[Tensor, Tensor]:
        """The chosen scalars' global indices, sorted, int64, and their gradients."""


class Grouped:
    """A selector for every group of tensors."""

    def __init__(
        self,
        count: int,
        heuristic: Heuristic,
        eligible: Eligible,
        owner: list[int],
        selectors: list[Selector | None],
    ) -> None:
        self.count, self._heuristic, self._eligible = count, heuristic, eligible
        self._owner, self._selectors = owner, selectors

    def offer(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            selector = self._selectors[self._owner[self._eligible.owner(piece.offset)]]
            if selector is not None:
                selector.offer([piece])
            else:
                finite(piece, self._heuristic)

    def best(self) -> tuple[Tensor, Tensor]:
        found = [selector.best() for selector in self._selectors if selector is not None]
        index, gradient = (torch.cat(parts) for parts in zip(*found, strict=True))
        index, order = index.sort()
        return index, gradient[order]


class Within:
    """Of every tensor its best up to the cap; those up to the floor go before all others."""

    def __init__(
        self,
        count: int,
        heuristic: Heuristic,
        eligible: Eligible,
        home: torch.device,
        low: list[int],
        high: list[int],
    ) -> None:
        self.count, self._heuristic, self._eligible, self._home = count, heuristic, eligible, home
        self._low, self._high = low, high
        self._room = 0
        none = torch.empty(0, device=home)
        self._first: Found = (none, none.long(), none)
        self._rest: Found = self._first

    def offer(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            k = self._eligible.owner(piece.offset)
            self._room += self._high[k]
            most = min(self.count, self._high[k])
            if not most:
                finite(piece, self._heuristic)
                continue
            top = TopK(most, self._heuristic, self._home)
            top.offer([piece])
            found = top.scored()
            order = ranked(found[0], found[1])
            first, rest = (
                tuple(part[o] for part in found)
                for o in (order[: self._low[k]], order[self._low[k] :])
            )
            self._first, self._rest = (
                _best(self._first, first, self.count),
                _best(self._rest, rest, self.count),
            )

    def best(self) -> tuple[Tensor, Tensor]:
        if self._room < self.count:
            raise UnmaskError(
                f"the cap of each tensor leaves room for {self._room:,} more scalars, and "
                f"{self.count:,} are to be unmasked; raise cap= or lower the budget"
            )
        rest = tuple(part[: self.count - len(self._first[0])] for part in self._rest)
        _, index, gradient = _best(self._first, rest, self.count)
        index, order = index.sort()
        return index, gradient[order]


def _best(some: Found, more: Found, count: int) -> Found:
    """The best `count` of both, the best first."""
    both = [torch.cat(parts) for parts in zip(some, more, strict=True)]
    order = ranked(both[0], both[1])[:count]
    return tuple(part[order] for part in both)


def finite(piece: Piece, heuristic: Heuristic) -> None:
    """Raise NonFinite for a gradient that isn't, also where nothing is to be chosen."""
    if piece.grad is not None and heuristic.uses_gradient and not torch.isfinite(piece.grad).all():
        raise NonFinite(piece.name)
