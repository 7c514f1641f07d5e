"""What happens to the chosen set at each step: quota(step, active, budget, steps)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from unmask.schedules import Schedule, Uniform

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Increment", "Quota", "Repeat", "Static", "Strategy"]


class Quota(NamedTuple):
    """How many of the current scalars to let go of (those of least `worth`), then how many of all
    others to take.

    A scalar that is let go of competes again in the same step; if it is taken again it keeps its
    optimiser state.
    """

    drop: int
    grow: int


class Strategy(ABC):
    """A rule for the chosen set; states nothing about which scalars, only how many."""

    @abstractmethod
    def quota(self, step: int, active: int, budget: int, steps: int | None) -> Quota:
        """The quota of optimiser step `step` (1 is the first), with `active` scalars chosen."""

    def worth(self, values: Tensor, base: Tensor) -> Tensor:
        """How much each current scalar deserves to stay where some must go: how far it has moved."""
        return (values - base).abs()

    @property
    def needs_steps(self) -> bool:
        """Whether the rule depends on the number of steps of the run."""
        return False


@dataclass(frozen=True)
class Static(Strategy):
    """static-S: choose the whole budget at the first step and keep it."""

    def quota(self, step: int, active: int, budget: int, steps: int | None) -> Quota:
        return Quota(drop=0, grow=budget - active)


@dataclass(frozen=True)
class Repeat(Strategy):
    """repeat-S: choose the whole budget anew at every step, from all eligible scalars.

    What was chosen once and isn't now keeps its value, so the scalars ever touched outnumber
    the budget (Section 6 of the ID3 paper).
    """

    def quota(self, step: int, active: int, budget: int, steps: int | None) -> Quota:
        return Quota(drop=active, grow=budget)


@dataclass(frozen=True)
class Increment(Strategy):
    """increment-S: add what the schedule says to what is unmasked already (ID3, Algorithm 1)."""

    schedule: Schedule = field(default_factory=Uniform)

    def quota(self, step: int, active: int, budget: int, steps: int | None) -> Quota:
        assert steps is not None  # the tuner asks for steps before the first quota
        return Quota(drop=0, grow=max(0, self.schedule.target(step, steps, budget) - active))

    @property
    def needs_steps(self) -> bool:
        return True
