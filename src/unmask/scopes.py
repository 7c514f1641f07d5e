"""Over what the best scalars are the best: selector(count, heuristic, eligible, kept)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from unmask.eligible import Eligible
from unmask.heuristics import Heuristic
from unmask.select import Piece, TopK

__all__ = ["Global", "Scope", "Selector"]


class Selector(Protocol):
    """Chooses while tensors stream past in any order."""

    count: int

    def offer(self, pieces: Iterable[Piece]) -> None:
        """Look at these tensors; each is offered once."""

    def best(self) -> tuple[Tensor, Tensor]:
        """The chosen scalars' global indices, sorted, int64, and their gradients."""


class Scope(ABC):
    """Where a budget is spent."""

    @abstractmethod
    def selector(
        self, count: int, heuristic: Heuristic, eligible: Eligible, kept: Tensor
    ) -> Selector:
        """Something that chooses `count` scalars outside `kept` (sorted global indices)."""


@dataclass(frozen=True)
class Global(Scope):
    """The best of the whole model, wherever they are (the ID3 paper's choice)."""

    def selector(
        self, count: int, heuristic: Heuristic, eligible: Eligible, kept: Tensor
    ) -> Selector:
        return TopK(count, heuristic, kept.device)
