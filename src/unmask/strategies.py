"""What happens to the chosen set at each step: quota(step, active, budget, steps)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from unmask.allot import down
from unmask.errors import UnmaskError
from unmask.part import Part
from unmask.schedules import Schedule, Uniform

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DropGrow", "Increment", "Quota", "Repeat", "Reselect", "Static", "Strategy"]


class Quota(NamedTuple):
    """How many of the current scalars to let go of (those of least `worth`), then how many of all
    others to take.

    A scalar that is let go of competes again in the same step; if it is taken again it keeps its
    optimiser state.
    """

    drop: int
    grow: int


class Strategy(Part, ABC):
    """A rule for the chosen set; states nothing about which scalars, only how many.

    rewinds  whether a scalar that leaves gets its base value back; else it keeps the value it has
    once     whether the first choice is the last, so that what it was based on can be forgotten
    """

    rewinds: ClassVar[bool] = False
    once: ClassVar[bool] = False

    @abstractmethod
    def quota(self, step: int, active: int, budget: int, steps: int | None) -> Quota:
        """The quota of optimiser step `step` (1 is the first), with `active` scalars chosen."""

    def worth(self, values: Tensor, base: Tensor) -> Tensor:
        """How much each current scalar deserves to stay where some must go: how far it has
        moved."""
        return (values - base).abs()

    @property
    def needs_steps(self) -> bool:
        """Whether the rule depends on the number of steps of the run."""
        return False

    def hear(self, heard: tuple[float, ...], loss: float) -> tuple[float, ...]:
        """What to remember of the reported losses; see `Schedule.hear`."""
        return heard

    def hearing(self, heard: tuple[float, ...]) -> Strategy:
        """The rule that goes by what is remembered."""
        return self


@dataclass(frozen=True)
class Static(Strategy):
    """static-S: choose the whole budget at the first step and keep it."""

    once: ClassVar[bool] = True

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
class Reselect(Strategy):
    """Choose the whole budget anew at steps 1, 1 + every, 1 + 2·every, ...; what stays keeps its
    optimiser state, what enters starts with none (LIFT).

    What was chosen once and isn't now keeps its value, so the scalars ever touched outnumber
    the budget.
    Source: Liu et al., ICML 2025, arXiv 2506.00772.
    """

    every: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise UnmaskError(f"Reselect was asked for every={self.every}; every is 1 or more")

    def quota(self, step: int, active: int, budget: int, steps: int | None) -> Quota:
        if active < budget:
            return Quota(drop=0, grow=budget - active)
        anew = step > 1 and (step - 1) % self.every == 0
        return Quota(drop=active, grow=budget) if anew else Quota(0, 0)


@dataclass(frozen=True)
class Increment(Strategy):
    """increment-S: add what the schedule says to what is unmasked already (ID3, Algorithm 1)."""

    schedule: Schedule = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.schedule, Schedule):
            raise UnmaskError(
                f"Increment was given {self.schedule!r} for its schedule; give an instance of "
                "unmask.Schedule, unmask.Uniform() say"
            )

    def quota(self, step: int, active: int, budget: int, steps: int | None) -> Quota:
        assert steps is not None  # the tuner asks for steps before the first quota
        return Quota(drop=0, grow=max(0, self.schedule.target(step, steps, budget) - active))

    @property
    def needs_steps(self) -> bool:
        return True

    def hear(self, heard: tuple[float, ...], loss: float) -> tuple[float, ...]:
        return self.schedule.hear(heard, loss)

    def hearing(self, heard: tuple[float, ...]) -> Strategy:
        return replace(self, schedule=self.schedule.hearing(heard))


@dataclass(frozen=True)
class DropGrow(Strategy):
    """Choose the whole budget at step `first`; then, every `every` steps, let go of the share p_t
    that has moved least, back to its base value, and take as many of the best scored (SpIEL).

    decay="linear": p_t = rate·(1 - t/T); "cosine": p_t = rate·(1 + cos(π·t/T)) / 2. The scalars
    ever in force never outnumber the budget.
    Source: Ansell et al., arXiv 2401.16405.
    """

    rewinds: ClassVar[bool] = True
    every: int = 20
    rate: float = 0.2
    decay: str = "linear"
    first: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1 or self.first < 1 or not 0 <= self.rate <= 1:
            raise UnmaskError(
                f"DropGrow was asked for every={self.every}, first={self.first}, rate={self.rate}; "
                "they are 1 or more, 1 or more, and a share in [0, 1]"
            )
        if self.decay not in ("linear", "cosine"):
            raise UnmaskError(
                f"DropGrow was asked for decay={self.decay!r}; it is one of linear, cosine"
            )

    def quota(self, step: int, active: int, budget: int, steps: int | None) -> Quota:
        if step < self.first:
            return Quota(0, 0)
        if active < budget:
            return Quota(drop=0, grow=budget - active)
        assert steps is not None
        if step <= self.first or step >= steps or (step - self.first) % self.every:
            return Quota(0, 0)
        past = step / steps
        left = 1 - past if self.decay == "linear" else (1 + math.cos(math.pi * past)) / 2
        change = down(budget * self.rate * left)
        return Quota(drop=change, grow=change)

    @property
    def needs_steps(self) -> bool:
        return True
