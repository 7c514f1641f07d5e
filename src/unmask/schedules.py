"""How many scalars are unmasked when: target(step, steps, budget), cumulative and exact."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from unmask.allot import down, up
from unmask.errors import UnmaskError
from unmask.part import Part

__all__ = [
    "Cosine",
    "Cubic",
    "Custom",
    "Exponential",
    "FrontLoaded",
    "Linear",
    "Plateau",
    "Schedule",
    "Strided",
    "Uniform",
]


class Schedule(Part, ABC):
    """A non-decreasing count that ends at the budget: target(steps, steps, budget) == budget."""

    @abstractmethod
    def target(self, step: int, steps: int, budget: int) -> int:
        """How many scalars are unmasked after optimiser step `step` (1 is the first) of `steps`."""

    def hear(self, heard: tuple[float, ...], loss: float) -> tuple[float, ...]:
        """What to remember of the losses that `tuner.report` was told, given what was remembered
        so far (at first, nothing); a few numbers, kept in checkpoints."""
        return heard

    def hearing(self, heard: tuple[float, ...]) -> Schedule:
        """The schedule that goes by what is remembered."""
        return self


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
        super().__post_init__()
        if self.every < 1:
            raise UnmaskError(f"Strided was asked for every={self.every}; every is 1 or more")

    def target(self, step: int, steps: int, budget: int) -> int:
        selections = -(-steps // self.every)
        done = -(-min(step, steps) // self.every)
        return budget * done // selections


@dataclass(frozen=True)
class FrontLoaded(Schedule):
    """Uniform, but done by this share of the run: ⌊B·t / ⌈by·T⌉⌋, then a fixed set.

    >>> [FrontLoaded(by=0.5).target(t, 4, 10) for t in range(1, 5)]
    [5, 10, 10, 10]
    """

    by: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.by <= 1:
            raise UnmaskError(f"FrontLoaded was asked for by={self.by}; by is a share in (0, 1]")

    def target(self, step: int, steps: int, budget: int) -> int:
        last = max(1, up(steps * self.by))
        return budget * min(step, last) // last


@dataclass(frozen=True)
class Linear(Schedule):
    """The quota falls linearly to nothing: B·(1 - (1 - t/T)²), rounded down.

    >>> [Linear().target(t, 4, 16) for t in range(1, 5)]
    [7, 12, 15, 16]
    """

    def target(self, step: int, steps: int, budget: int) -> int:
        left = max(0, steps - step)
        return budget * (steps**2 - left**2) // steps**2


@dataclass(frozen=True)
class Cubic(Schedule):
    """The quota falls quadratically to nothing: B·(1 - (1 - t/T)³), rounded down.

    Source: the sparsity schedule of Zhu and Gupta, "To prune, or not to prune", 2017,
    arXiv 1710.01878.

    >>> [Cubic().target(t, 2, 16) for t in range(1, 3)]
    [14, 16]
    """

    def target(self, step: int, steps: int, budget: int) -> int:
        left = max(0, steps - step)
        return budget * (steps**3 - left**3) // steps**3


@dataclass(frozen=True)
class Cosine(Schedule):
    """Slow, fast, slow: B·(1 - cos(π·t/T)) / 2, rounded down.

    >>> [Cosine().target(t, 4, 16) for t in range(1, 5)]
    [2, 8, 13, 16]
    """

    def target(self, step: int, steps: int, budget: int) -> int:
        return _exact((1 - math.cos(math.pi * step / steps)) / 2, step, steps, budget)


@dataclass(frozen=True)
class Exponential(Schedule):
    """The quota falls by the same factor at each step: B·(1 - e^(-rate·t/T)) / (1 - e^(-rate)),
    rounded down. A negative rate makes it grow.

    >>> [Exponential(rate=3.0).target(t, 4, 16) for t in range(1, 5)]
    [8, 13, 15, 16]
    """

    rate: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < abs(self.rate) <= 500:
            raise UnmaskError(
                f"Exponential was asked for rate={self.rate}; it is up to 500, and not 0: that is "
                "Uniform()"
            )

    def target(self, step: int, steps: int, budget: int) -> int:
        share = math.expm1(-self.rate * step / steps) / math.expm1(-self.rate)
        return _exact(share, step, steps, budget)


def uniform_share(share: float) -> float:
    """The curve of `Uniform`.

    >>> uniform_share(0.25)
    0.25
    """
    return share


@dataclass(frozen=True)
class Custom(Schedule):
    """B·curve(t/T), rounded down, with a function of your own from [0, 1] to [0, 1].

    Where the curve falls the count stays; at the end it is B whatever the curve says. For `to_dict`
    the function must have a name in a module; `from_dict` finds it there once that is imported.

    >>> [Custom(lambda share: share**2).target(t, 4, 16) for t in range(1, 5)]
    [1, 4, 9, 16]
    """

    curve: Callable[[float], float] = uniform_share

    def target(self, step: int, steps: int, budget: int) -> int:
        past = min(step / steps, 1.0)
        share = self.curve(past)
        if not math.isfinite(share):
            raise UnmaskError(f"Custom's curve({past}) is {share}; it must be from 0 to 1")
        return _exact(share, step, steps, budget)


@dataclass(frozen=True)
class Plateau(Schedule):
    """`parts` equal shares; the next comes when the loss has stopped falling, and no later than if
    they came evenly over the run.

    Report the loss of each step by `tuner.report(loss)`. It has stopped falling when `patience`
    reports in a row were not below the best of this share by more than `tolerance` times that best;
    one that is NaN doesn't count.

    >>> schedule, heard = Plateau(parts=4, patience=2), ()
    >>> for loss in (1.0, 0.9, 0.95, 0.91):
    ...     heard = schedule.hear(heard, loss)
    >>> schedule.target(1, 100, 16), schedule.hearing(heard).target(5, 100, 16)
    (4, 8)
    """

    parts: int = 10
    patience: int = 10
    tolerance: float = 0.001
    reached: int = 0  # plateaus so far; filled in by `hearing`

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parts < 1 or self.patience < 1 or not self.tolerance >= 0:
            raise UnmaskError(
                f"Plateau was asked for parts={self.parts}, patience={self.patience}, "
                f"tolerance={self.tolerance}; they are 1 or more, 1 or more, and 0 or more"
            )

    def target(self, step: int, steps: int, budget: int) -> int:
        clock = self.parts * min(step, steps) // steps
        return budget * min(max(1 + self.reached, clock), self.parts) // self.parts

    def hear(self, heard: tuple[float, ...], loss: float) -> tuple[float, ...]:
        if math.isnan(loss):
            return heard
        best, waited, reached = heard or (math.inf, 0.0, 0.0)
        if best == math.inf or loss < best - self.tolerance * abs(best):
            return loss, 0.0, reached
        if waited + 1 < self.patience:
            return best, waited + 1, reached
        return math.inf, 0.0, reached + 1

    def hearing(self, heard: tuple[float, ...]) -> Schedule:
        reached = int(heard[2]) if heard else 0
        return Plateau(self.parts, self.patience, self.tolerance, reached)


def _exact(share: float, step: int, steps: int, budget: int) -> int:
    """That share of the budget in whole scalars; all of it at the end."""
    if step >= steps:
        return budget
    return min(budget, max(0, down(share * budget)))
