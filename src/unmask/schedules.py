"""How many scalars are unmasked when: target(step, steps, budget), cumulative and exact."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from unmask.errors import UnmaskError

__all__ = ["Schedule", "Strided", "Uniform"]


class Schedule(ABC):
    """A non-decreasing count that ends at the budget: target(steps, steps, budget) == budget."""

    @abstractmethod
    def target(self, step: int, steps: int, budget: int) -> int:
        """How many scalars are unmasked after optimiser step `step` (1 is the first) of `steps`."""


@dataclass(frozen=True)
class Uniform(Schedule):
    """u_t = B / T in whole scalars: after step t, ⌊B·t / T⌋ are unmasked (the ID3 paper's default).

    >>> [Uniform().target(t, 4, 10) for t in range(1, 5)]
    [2, 5, 7, 10]
    """

    def target(self, step: int, steps: int, budget: int) -> int:
        return budget * min(step, steps) // steps


@dataclass(frozen=True)
class Strided(Schedule):
    """Unmask at steps 1, 1 + every, 1 + 2·every, ... only, in equal shares that add up to B.

    Between those steps nothing is scored, so they are as cheap as training a fixed set.

    >>> [Strided(every=2).target(t, 4, 10) for t in range(1, 5)]
    [5, 5, 10, 10]
    """

    every: int = 10

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UnmaskError(f"Strided was asked for every={self.every}; every is 1 or more")

    def target(self, step: int, steps: int, budget: int) -> int:
        selections = -(-steps // self.every)
        done = -(-min(step, steps) // self.every)
        return budget * done // selections
